"""Model families behind one interface. `load_backbone` finds the family of a base."""

from dreamblend.models.backbone import Backbone, Site
from dreamblend.models.bases import SANDBOX, SHIPPED
from dreamblend.models.loading import load_backbone, locate_base
from dreamblend.models.text import Conditioning, Span

__all__ = [
    "SANDBOX",
    "SHIPPED",
    "Backbone",
    "Conditioning",
    "Site",
    "Span",
    "load_backbone",
    "locate_base",
]
