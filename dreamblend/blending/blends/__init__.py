"""The ways to draw from a pair of snapshots, one file each, behind one interface."""

from dreamblend.blending.blends.blend import Blend, Drawing
from dreamblend.blending.blends.cag import CAG
from dreamblend.blending.blends.merge import Merge
from dreamblend.blending.blends.region import Region
from dreamblend.blending.blends.score import Score
from dreamblend.blending.blends.singles import Early, Late, draw_reference
from dreamblend.blending.blends.switch import Switch

BLENDS = {blend.name: blend for blend in (Early, Late, CAG, Switch, Merge, Score, Region)}

__all__ = [
    "BLENDS",
    "CAG",
    "Blend",
    "Drawing",
    "Early",
    "Late",
    "Merge",
    "Region",
    "Score",
    "Switch",
    "draw_reference",
]
