"""One sampling with interpolated weights."""

from __future__ import annotations

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends.blend import Blend, Drawing, finite
from dreamblend.blending.recorder import Recorder


class Merge(Blend):
    """One sampling with interpolated weights.

    Args:
        weight: of the late snapshot; 0 is the early one, 1 the late one.
    """

    name = "merge"
    needs_words = False

    def __init__(self, weight: float = 0.5):
        self.weight = finite(weight)

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        merged = Recorder(batch, batch.models.merged(self.weight))
        return Drawing(batch.sample(merged), merged.average)
