"""Cross-attention: its maps, the words they are of, and their collapse."""

from dreamblend.attention.recording import Maps, record

__all__ = ["Maps", "record"]
