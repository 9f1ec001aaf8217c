"""A model's predictions, recorded: its words' maps are read as it predicts."""

from __future__ import annotations

import math

from torch import Tensor

from dreamblend.attention import Maps, record
from dreamblend.attention.words import word_maps
from dreamblend.blending.batch import Batch
from dreamblend.models import Backbone


class Recorder:
    """A predictor `(latents, timestep, step) -> output` that keeps what its model attends to.

    Args:
        batch: what is drawn.
        model: which of the batch's models predicts.
        keep: the steps whose maps are kept site by site in `kept`, up to the last column that is a
            token: most columns are padding, and a large model's maps of all steps fill gigabytes.
    """

    def __init__(self, batch: Batch, model: Backbone, keep: range = range(0)):
        self.batch, self.model, self.keep = batch, model, keep
        self.prompts, empty = batch.encode(model)
        self._halves = batch.halves(model, self.prompts, empty)
        self._tokens = int(batch.weights.sum(1).max())  # of the longest prompt
        self._sum: Tensor | None = None
        self._count = 0
        self.kept: dict[int, Maps] = {}

    def __call__(self, z: Tensor, t: Tensor, step: int) -> Tensor:
        return self.batch.combined(self.model, *self.halves(z, t, step))

    def halves(
        self, z: Tensor, t: Tensor, step: int, both: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """What guidance combines: the predictions without and with the prompt (`Halves`)."""
        sites, tokens = self.batch.sites, self.batch.tokens
        with record(
            self.model.denoiser,
            sites,
            tokens,
            conditional_only=both and self._halves.twice,
            mean_heads=step not in self.keep,
        ) as maps:
            predicted = self._halves(z, t, both)
        self.last = word_maps(maps, self.batch.words)
        self._sum = self.last if self._sum is None else self._sum + self.last
        self._count += 1
        if step in self.keep:
            self.kept[step] = {site: m[..., : self._tokens].clone() for site, m in maps.items()}
        return predicted

    # (batch, words, queries), each word's share of the attention of each image row: at the last
    # prediction, and averaged over all of them
    last: Tensor

    @property
    def average(self) -> Tensor:
        if self._sum is None:  # a drawing that was interrupted before
            words = self.batch.words
            return words.new_zeros(*words.shape[:2], math.prod(self.batch.map_shape))
        return self._sum / self._count
