"""The late snapshot where it sees the subject, the early one everywhere else."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends.blend import Blend, Drawing, finite, share_of_steps
from dreamblend.blending.recorder import Recorder
from dreamblend.errors import InputError

Empty = Literal["early", "both"]


class Region(Blend):
    """Both snapshots at every step: the late one's prediction where it sees the subject, the early
    one's everywhere else.

    The late snapshot's cross-attention shows where the subject is, while it predicts. The snapshot
    that has not forgotten the place, the light and all else that a prompt asks for draws them, so
    nothing needs to be guided back.

    The predictions for the prompt are mixed first, and the mixture is guided as one prediction is.
    What it is led away from is the early snapshot's prediction for the empty prompt: the late one's
    shows the subject, so that guidance by it leads away from the subject. No guidance is needed
    once the image is laid out (Kynkäänniemi et al., 2024).

    Args:
        edge: share of the range of the subject's map over which the late snapshot fades in: towards
            0 it draws everything but what its subject attends to least, and at 1 it fades over the
            whole range.
        grow: cells of the map's grid by which the region is grown: a subject's outline, and parts
            that only the late snapshot knows of (a mug's handle), lie between the cells or beside
            them.
        weight: of the late snapshot's prediction inside the region, as `Score` has one everywhere:
            below 1 is nearer to the prompt, above 1 nearer to the subject.
        empty: whose prediction for the empty prompt guides: the early snapshot's, or those of both,
            mixed as the others are, so that each snapshot is guided by its own.
        guided: share of the steps that are guided, from the first on. A model that makes one
            prediction (guidance-distilled) has none that are not.
    """

    name = "region"

    def __init__(
        self,
        edge: float = 0.2,
        grow: int = 1,
        weight: float = 0.7,
        empty: Empty = "early",
        guided: float = 0.7,
    ):
        if not 0 < edge <= 1 or grow < 0:
            raise InputError(
                f"edge is {edge} and grow {grow}: edge is a share of the map's range, above 0 and"
                " up to 1, grow 0 cells or more"
            )
        if empty not in get_args(Empty):
            raise InputError(f"empty is {empty!r}: it is one of {', '.join(get_args(Empty))}")
        share_of_steps("guided", guided)
        self.edge, self.grow, self.weight = edge, grow, finite(weight)
        self.empty, self.guided = empty, guided

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        early, late = batch.halves(batch.early), batch.halves(batch.late)
        maps = Recorder(batch, batch.late)
        last = round(self.guided * batch.calls)

        def predict(z: Tensor, t: Tensor, step: int) -> Tensor:
            guided = early.twice and step < last
            both = guided and self.empty == "both"
            with maps.reading(step, twice=both):
                late_empty, late_prompt = late(z, t) if both else (None, late.with_prompt(z, t))
            empty, prompt = early(z, t) if guided else (None, early.with_prompt(z, t))
            share = self.share(maps.last, batch).to(prompt.dtype)
            if late_empty is not None:
                empty = torch.lerp(empty, late_empty, share)
            return batch.combined(empty, torch.lerp(prompt, late_prompt, share))

        return Drawing(batch.sample(predict), maps.average)

    def share(self, maps: Tensor, batch: Batch) -> Tensor:
        """The late snapshot's share of each latent (batch, 1, height, width), from its word maps
        (batch, words, queries).
        """
        subject = (maps * (batch.subject & batch.mask).unsqueeze(-1)).sum(1)
        low, high = subject.amin(-1, keepdim=True), subject.amax(-1, keepdim=True)
        rises = ((subject - low) / (high - low).clamp(min=1e-12)).view(-1, 1, *batch.map_shape)
        grown = F.max_pool2d(rises, 2 * self.grow + 1, stride=1, padding=self.grow)
        fades = F.interpolate(grown, batch.noise.shape[2:], mode="bilinear") / self.edge
        return fades.clamp(max=1) * self.weight
