"""The ways to draw from a pair of snapshots, one file each, behind one interface."""

from dreamblend.blending.blends.autoguidance import Autoguidance
from dreamblend.blending.blends.blend import Blend, Drawing
from dreamblend.blending.blends.cag import CAG
from dreamblend.blending.blends.masked import Masked
from dreamblend.blending.blends.merge import Merge
from dreamblend.blending.blends.personalization import Personalization
from dreamblend.blending.blends.region import Region
from dreamblend.blending.blends.reward import Reward
from dreamblend.blending.blends.score import Score
from dreamblend.blending.blends.similarity import Similarity
from dreamblend.blending.blends.singles import Early, Late, draw_reference
from dreamblend.blending.blends.switch import Switch

BLENDS: dict[str, type[Blend]] = {
    blend.name: blend
    for blend in (
        *(Early, Late, CAG, Switch, Merge, Score, Region),
        *(Personalization, Autoguidance, Reward, Masked, Similarity),
    )
}

__all__ = [
    "BLENDS",
    "Autoguidance",
    "CAG",
    "Blend",
    "Drawing",
    "Early",
    "Late",
    "Masked",
    "Merge",
    "Personalization",
    "Region",
    "Reward",
    "Score",
    "Similarity",
    "Switch",
    "draw_reference",
]
