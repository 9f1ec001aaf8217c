"""One sampling with interpolated weights."""

from __future__ import annotations

from dreamblend.blending.batch import Task
from dreamblend.blending.blends.blend import Blend, Drawn, finite, watched


class Merge(Blend):
    """One sampling with interpolated weights.

    Args:
        weight: of the late snapshot; 0 is the early one, 1 the late one.
    """

    name = "merge"

    def __init__(self, weight: float = 0.5):
        self.weight = finite(weight)

    def draw(self, task: Task) -> Drawn:
        model = task.merged(self.weight)
        return watched(task, model, task.predictor(model))[0]
