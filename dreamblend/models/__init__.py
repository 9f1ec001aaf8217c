"""Model families behind one interface. `load_backbone` finds the family of a base."""

from dreamblend.models.backbone import Backbone, Conditioning, Span
from dreamblend.models.bases import SANDBOX
from dreamblend.models.loading import load_backbone, locate_base

__all__ = ["SANDBOX", "Backbone", "Conditioning", "Span", "load_backbone", "locate_base"]
