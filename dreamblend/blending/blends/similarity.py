"""Both snapshots, each where it differs from the base: weights by place without attention maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends.blend import Blend, Drawing
from dreamblend.blending.recorder import Recorder
from dreamblend.errors import InputError


class Similarity(Blend):
    """LoRAtorio's weights (Foteinopoulou et al., 2025, arXiv 2508.11624): both snapshots at every
    step, mixed patch by patch, and the one whose prediction is less like the base's weighs more.

    There they compose adapters of several subjects: one that differs from the base is in its own
    domain. Here they choose between an early and a late snapshot of one subject. The predictions
    for the prompt are compared by their cosine, and mixed; guidance leads away from the base's
    prediction for the empty prompt as well as theirs ("re-centring").

    Args:
        patch: side of a patch, in latents.
        temperature: of the soft minimum over the cosines: towards 0 the snapshot that is less like
            the base draws a patch alone.
        recentre: share of the base's prediction in that for the empty prompt; at 1 the snapshots
            predict none, which takes 4 passes for 6.
    """

    name = "similarity"
    needs_words = False

    def __init__(self, patch: int = 2, temperature: float = 0.1, recentre: float = 0.5):
        if patch < 1 or not temperature > 0 or not 0 <= recentre <= 1:
            raise InputError(
                f"patch is {patch}, temperature {temperature} and recentre {recentre}: patch is 1"
                " or more latents, temperature above 0, and recentre a share, from 0 to 1"
            )
        self.patch, self.temperature, self.recentre = patch, temperature, recentre

    @property
    def passes(self) -> float:  # type: ignore[override]
        return 4 if self.recentre == 1 else 6 if self.recentre else 5

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        models, guided = batch.models, batch.unguided if self.recentre == 1 else batch
        late = Recorder(guided, models.late)
        early = guided.halves(models.early, *guided.encode(models.early))
        own = batch if self.recentre else batch.unguided
        base = own.halves(models.plain, *own.encode(models.plain))

        def predict(z: Tensor, t: Tensor, step: int) -> Tensor:
            (empty_late, of_late), (empty_early, of_early) = late.halves(z, t, step), early(z, t)
            empty, of_base = base(z, t)
            share = self.share(of_early, of_late, of_base)
            if empty_late is not None and empty_early is not None:
                mixed = torch.lerp(empty_early, empty_late, share)
                empty = mixed if empty is None else torch.lerp(mixed, empty, self.recentre)
            return batch.combined(models.late, empty, torch.lerp(of_early, of_late, share))

        return Drawing(batch.sample(predict), late.average)

    def share(self, early: Tensor, late: Tensor, base: Tensor) -> Tensor:
        """The late snapshot's share of each latent (batch, 1, height, width), from predictions
        (batch, channels, height, width).
        """
        unlike = self._cosine(early, base) - self._cosine(late, base)
        share = (unlike / self.temperature).sigmoid().to(late.dtype)
        height, width = late.shape[2:]
        wide = share.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        return wide[..., :height, :width]

    def _cosine(self, a: Tensor, b: Tensor) -> Tensor:
        """Of the patches of two predictions: (batch, 1, rows, columns), fp32. Those at the lower
        and the right edge may be smaller.
        """

        def inner(x: Tensor, y: Tensor) -> Tensor:
            products = (x.float() * y.float()).sum(1, keepdim=True)
            return F.avg_pool2d(products, self.patch, ceil_mode=True)

        return inner(a, b) / (inner(a, a) * inner(b, b)).sqrt().clamp(min=1e-12)
