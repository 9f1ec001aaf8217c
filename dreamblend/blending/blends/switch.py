"""The early snapshot first, then the late one."""

from __future__ import annotations

from torch import Tensor

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends.blend import Blend, Drawing, share_of_steps
from dreamblend.blending.blends.singles import Early
from dreamblend.blending.recorder import Recorder


class Switch(Blend):
    """The early snapshot for the first steps, the late one for the rest.

    Args:
        point: share of the steps that the early snapshot takes.
    """

    name = "switch"
    needs_words = False

    def __init__(self, point: float = 0.4):
        share_of_steps("point", point)
        self.point = point

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        first = round(self.point * batch.calls)
        if first == batch.calls:  # the late snapshot predicts nothing, and has no maps
            return Early().draw(batch, reference)
        early, late = batch.predictor(batch.early), Recorder(batch, batch.late)

        def predict(z: Tensor, t: Tensor, step: int) -> Tensor:
            return (early if step < first else late)(z, t, step)

        return Drawing(batch.sample(predict), late.average)
