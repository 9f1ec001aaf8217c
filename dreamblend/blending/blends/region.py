"""The late snapshot where it sees the subject, the early one everywhere else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamblend.attention.collapse import subject_map
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends.blend import Blend, Drawing, finite
from dreamblend.blending.recorder import Recorder
from dreamblend.errors import InputError


class Region(Blend):
    """Both snapshots at every step: the late one's prediction where it sees the subject, the early
    one's everywhere else.

    The late snapshot's cross-attention shows where the subject is, while it predicts, and where the
    other words attend more. The snapshot that has not forgotten the place, the light and all else
    that a prompt asks for draws them, so nothing needs to be guided back.

    The prompts' predictions are mixed first, and the mixture is guided away from the early
    snapshot's empty prompt. What that predicts in the last calls hardly changes but with the
    prediction for the prompt: there its difference is held (the CFG-Cache of FasterCache, Lv et
    al., 2024).

    The nearest published sampler is masked sampling (`Masked`), which has one set of weights and
    draws the class prompt outside its mask. Here the early snapshot draws the prompt itself there.

    Args:
        edge: share of the range of the subject's map over which the late snapshot fades in: towards
            0 it draws everything but what its subject attends to least, and at 1 it fades over the
            whole range.
        grow: cells of the map's grid by which the region is grown: a subject's outline, and parts
            that only the late snapshot knows of (a mug's handle), lie between the cells or beside
            them.
        weight: of the late snapshot's prediction inside the region, as `Score` has one everywhere:
            below 1 is nearer to the prompt, above 1 nearer to the subject.
        asked: share of the calls, from the first, that make a prediction for the empty prompt. 1
            is exact and takes 3 passes a call, two thirds takes 2.67. A model that is distilled to
            one prediction makes none.
        margin: how far another word may attend above the subject, as a share of its own map's
            range, before the region begins to give way to it: a hat that the subject wears lies
            inside its outline, and late has forgotten it. 1 never gives way.
    """

    name = "region"

    def __init__(
        self,
        edge: float = 0.2,
        grow: int = 1,
        weight: float = 1.3,
        asked: float = 2 / 3,
        margin: float = 0.0,
    ):
        if not 0 < edge <= 1 or grow < 0:
            raise InputError(
                f"edge is {edge} and grow {grow}: edge is a share of the map's range, above 0 and"
                " up to 1, grow 0 cells or more"
            )
        if not 0 < asked <= 1:
            raise InputError(f"asked is {asked}: it is a share of the calls, above 0 and up to 1")
        if not 0 <= margin <= 1:
            raise InputError(f"margin is {margin}: it is a share of a map's range, 0 to 1")
        self.edge, self.grow, self.weight, self.asked = edge, grow, finite(weight), asked
        self.margin = margin

    @property
    def passes(self) -> float:  # type: ignore[override]  # both prompts, and early's empty one
        return 2 + self.asked

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        early = batch.halves(batch.early, *batch.encode(batch.early))
        late = Recorder(batch, batch.late)
        asked = self.asking(batch.calls)
        held: Tensor | None = None

        def predict(z: Tensor, t: Tensor, step: int) -> Tensor:
            nonlocal held
            _, of_late = late.halves(z, t, step, both=False)
            empty, of_early = early(z, t, both=step < asked)
            if empty is not None:
                held = empty - of_early
            elif held is not None:
                empty = of_early + held
            inside = self.share(late.last, batch).to(of_early.dtype)
            return batch.combined(batch.early, empty, torch.lerp(of_early, of_late, inside))

        return Drawing(batch.sample(predict), late.average)

    def asking(self, calls: int) -> int:
        """How many calls of the model, from the first, make a prediction for the empty prompt."""
        return max(1, round(self.asked * calls))

    def share(self, maps: Tensor, batch: Batch) -> Tensor:
        """The late snapshot's share of each latent (batch, 1, height, width), from its word maps
        (batch, words, queries).
        """
        subject = rises(subject_map(maps, batch.mask, batch.subject))
        others = rises(maps) * (batch.mask & ~batch.subject).unsqueeze(-1)
        shape = (-1, 1, *batch.map_shape)
        grown = F.max_pool2d(subject.view(shape), 2 * self.grow + 1, stride=1, padding=self.grow)
        ahead = (subject - others.amax(1) + self.margin).view(shape)
        inside, kept = (
            F.interpolate(x, batch.noise.shape[2:], mode="bilinear") / self.edge
            for x in (grown, ahead)
        )
        return inside.clamp(max=1) * (1 + kept).clamp(0, 1) * self.weight


def rises(maps: Tensor) -> Tensor:
    """Maps (..., queries) from 0 where they are lowest to 1 where they are highest."""
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)
