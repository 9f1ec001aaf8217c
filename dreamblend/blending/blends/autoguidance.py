"""Away from the early snapshot: autoguidance, with a snapshot's own past as the weaker model."""

from __future__ import annotations

from dreamblend.blending.blends.score import Score
from dreamblend.errors import InputError


class Autoguidance(Score):
    """The late snapshot, guided away from the early one: early + weight (late - early), each with
    its own guidance (Karras et al., NeurIPS 2024, arXiv 2406.02507).

    It is `Score` with a weight above 1, by its published name. There the weaker model is one that
    was trained less, of the same data; here it is the early snapshot.

    Args:
        weight: of the late snapshot's prediction, 1 or more: how far to go away from the early one;
            1 is the late one alone.
    """

    name = "autoguidance"

    def __init__(self, weight: float = 1.5):
        if not weight >= 1:
            raise InputError(
                f"weight is {weight}: autoguidance takes 1 or more, and below 1 the blend is Score"
            )
        super().__init__(weight)
