"""The late snapshot where it sees the subject, the early one everywhere else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends.blend import Blend, Drawing, finite
from dreamblend.blending.recorder import Recorder
from dreamblend.errors import InputError


class Region(Blend):
    """Both snapshots at every step: the late one's prediction where it sees the subject, the early
    one's everywhere else.

    The late snapshot's cross-attention shows where the subject is, while it predicts. The snapshot
    that has not forgotten the place, the light and all else that a prompt asks for draws them, so
    nothing needs to be guided back.

    Args:
        edge: share of the range of the subject's map over which the late snapshot fades in: towards
            0 it draws everything but what its subject attends to least, and at 1 it fades over the
            whole range.
        grow: cells of the map's grid by which the region is grown: a subject's outline, and parts
            that only the late snapshot knows of (a mug's handle), lie between the cells or beside
            them.
        weight: of the late snapshot's prediction inside the region, as `Score` has one everywhere:
            below 1 is nearer to the prompt, above 1 nearer to the subject.
    """

    name = "region"
    passes = 4

    def __init__(self, edge: float = 0.2, grow: int = 1, weight: float = 1.3):
        if not 0 < edge <= 1 or grow < 0:
            raise InputError(
                f"edge is {edge} and grow {grow}: edge is a share of the map's range, above 0 and"
                " up to 1, grow 0 cells or more"
            )
        self.edge, self.grow, self.weight = edge, grow, finite(weight)

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        early, late = batch.predictor(batch.early), Recorder(batch, batch.late)

        def predict(z: Tensor, t: Tensor, step: int) -> Tensor:
            output = late(z, t, step)
            share = self.share(late.last, batch).to(output.dtype)
            return torch.lerp(early(z, t, step), output, share)

        return Drawing(batch.sample(predict), late.average)

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
