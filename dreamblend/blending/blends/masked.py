"""The late snapshot alone: its subject where the class word attends, the class prompt elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamblend.attention.collapse import subject_map
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends.blend import Blend, Drawing, share_of_steps
from dreamblend.blending.recorder import Recorder
from dreamblend.errors import InputError


class Masked(Blend):
    """Masked sampling (Soboleva and Nakhodnov, 2025, arXiv 2502.05895), by the late snapshot alone:
    the first steps draw the class prompt ("a mug on the beach"), and the others mix the predictions
    for the prompt and the class prompt where the class word attends.

    It is the nearest prior art of `Region`. There one model draws everything, and outside the mask
    it forgets no less: what keeps the scene is a prompt without the identifier. `Region` draws the
    outside with other weights, those of the early snapshot, and the prompt itself.

    Args:
        start: share of the calls, below 1, that draw the class prompt alone; published are 3 of 50.
        quantile: of the class word's map, above which it is the subject.
        share: of the prompt's prediction inside the mask; the rest is that for the class prompt.
    """

    name = "masked"

    def __init__(self, start: float = 0.06, quantile: float = 0.7, share: float = 0.5):
        share_of_steps("start", start)
        if not 0 <= quantile < 1 or not 0 <= share <= 1 or start == 1:
            raise InputError(
                f"start is {start}, quantile {quantile} and share {share}: each is a share, from 0"
                " to 1, start and quantile below 1"
            )
        self.start, self.quantile, self.share = start, quantile, share

    @property
    def passes(self) -> float:  # type: ignore[override]  # two prompts and the empty one
        return 3 - self.start

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        model, first = batch.late, min(round(self.start * batch.calls), batch.calls - 1)
        of_class = Recorder(batch.of_class, model)
        prompts = Recorder(batch.unguided, model)

        def predict(z: Tensor, t: Tensor, step: int) -> Tensor:
            empty, guided = of_class.halves(z, t, step)
            if step >= first:
                inside = self.share * self.mask(of_class.last, batch.of_class).to(guided.dtype)
                guided = torch.lerp(guided, prompts.halves(z, t, step)[1], inside)
            return batch.combined(model, empty, guided)

        return Drawing(batch.sample(predict), prompts.average)

    def mask(self, maps: Tensor, of_class: Batch) -> Tensor:
        """1 in each latent (batch, 1, height, width) where the class words attend, else 0: from the
        maps (batch, words, queries) of the class prompts.
        """
        noun = subject_map(maps, of_class.mask, of_class.subject)
        fine = F.interpolate(
            noun.view(-1, 1, *of_class.map_shape), of_class.latent_size, mode="bilinear"
        )
        values = fine.flatten(1)
        low = values.kthvalue(int(self.quantile * (values.shape[1] - 1)) + 1, dim=1).values
        return (fine > low.view(-1, 1, 1, 1)).float()
