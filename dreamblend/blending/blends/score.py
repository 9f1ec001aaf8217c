"""Both snapshots' predictions, mixed everywhere alike."""

from __future__ import annotations

import torch

from dreamblend.blending.batch import Task
from dreamblend.blending.blends.blend import Blend, Drawn, finite, watched


class Score(Blend):
    """Both snapshots at every step, their predictions mixed: early + weight (late - early).

    A weight above 1 extrapolates away from the early snapshot: autoguidance (Karras et al., 2024).

    Args:
        weight: of the late snapshot's prediction.
    """

    name = "score"

    def __init__(self, weight: float = 0.5):
        self.weight = finite(weight)

    def draw(self, task: Task) -> Drawn:
        early, late = task.predictor(task.early), task.predictor(task.late)
        return watched(
            task,
            task.late,
            late,
            mix=lambda output, _, *at: torch.lerp(early(*at), output, self.weight),
        )[0]
