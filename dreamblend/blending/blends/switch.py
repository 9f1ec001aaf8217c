"""The early snapshot first, then the late one."""

from __future__ import annotations

from dreamblend.blending.batch import Task
from dreamblend.blending.blends.blend import Blend, Drawn, share_of_steps, watched


class Switch(Blend):
    """The early snapshot for the first steps, the late one for the rest.

    Args:
        point: share of the steps that the early snapshot takes.
    """

    name = "switch"

    def __init__(self, point: float = 0.4):
        share_of_steps("point", point)
        self.point = point

    def draw(self, task: Task) -> Drawn:
        early, late = task.predictor(task.early), task.predictor(task.late)
        first, last = round(self.point * task.calls), task.calls
        reader, reads = (
            (task.late, range(first, last)) if first < last else (task.early, range(last))
        )
        return watched(
            task,
            reader,
            lambda z, t, step: (early if step < first else late)(z, t, step),
            reads=reads,
        )[0]
