"""Both snapshots' predictions, mixed with one weight everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends.blend import Blend, Drawing, finite
from dreamblend.blending.recorder import Recorder


class Score(Blend):
    """Both snapshots at every step, their predictions mixed: early + weight (late - early).

    A weight above 1 extrapolates away from the early snapshot: that is `Autoguidance`.

    Args:
        weight: of the late snapshot's prediction.
    """

    name = "score"
    passes = 4
    needs_words = False

    def __init__(self, weight: float = 0.5):
        self.weight = finite(weight)

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        early, late = batch.predictor(batch.early), Recorder(batch, batch.late)

        def predict(z: Tensor, t: Tensor, step: int) -> Tensor:
            output = late(z, t, step)
            return torch.lerp(early(z, t, step), output, self.weight)

        return Drawing(batch.sample(predict), late.average)
