"""Each snapshot of a pair alone."""

from __future__ import annotations

from dreamblend.blending.batch import Task
from dreamblend.blending.blends.blend import Blend, Drawn, watched


class Early(Blend):
    """The early snapshot alone. Leaves the maps of the task's guided steps as its reference."""

    name = "early"

    def draw(self, task: Task) -> Drawn:
        drawn, task.reference = watched(
            task, task.early, task.predictor(task.early), keep=task.guided
        )
        return drawn


class Late(Blend):
    """The late snapshot alone."""

    name = "late"

    def draw(self, task: Task) -> Drawn:
        return watched(task, task.late, task.predictor(task.late))[0]
