"""Cross-attention: recording its maps, the words they belong to, and how far they have collapsed."""

from dreamblend.attention.recording import Maps, record

__all__ = ["Maps", "record"]
