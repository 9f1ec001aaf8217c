"""Prompts and seeds -> the (prompt, seed) pairs of a blend, in batches."""

from __future__ import annotations

from math import ceil

import lightning as L

from dreamblend.blending.prompts import Pair, read_prompts, read_seeds, read_shard
from dreamblend.errors import InputError


class Batches(list[list[Pair]]):
    """A list that Lightning takes for one loader; it would take a plain list for many."""


class PromptData(L.LightningDataModule):
    """The (prompt, seed) pairs to draw.

    Args:
        prompts: a text file with one prompt a line, or the prompts; `{subject}` stands for
            identifier and class noun.
        seeds: such as 0-3 or 0,5,7-9; the noise of seed s is that of a diffusers pipeline with
            `torch.Generator().manual_seed(s)`.
        batch_size: pairs a process draws at once.
        shard: I/N draws every N-th pair from the I-th on, from 0: N jobs share the work.
    """

    def __init__(
        self, prompts: list[str] | str, seeds: str = "0-3", batch_size: int = 8, shard: str = "0/1"
    ):
        super().__init__()
        if batch_size < 1:
            raise InputError(f"data.batch_size is {batch_size}: it must be at least 1")
        self.prompts = prompts
        self.seeds = read_seeds(seeds)
        self.batch_size = batch_size
        self.shard = read_shard(shard)
        self.pairs: list[Pair] = []  # those to draw: the writer leaves out images that are there

    def all_pairs(
        self, identifier: str, class_noun: str, weighting: str | None = None
    ) -> list[Pair]:
        """All pairs of this shard, prompt by prompt. Args as `read_prompts`."""
        prompts = read_prompts(self.prompts, identifier, class_noun, weighting)
        return [(p, s) for p in prompts for s in self.seeds][self.shard]

    def predict_dataloader(self) -> Batches:
        """This process's share of the pairs. All processes have the same number of batches, at
        least one; the last may hold fewer pairs, or none.

        Lightning skips the end hooks of a process without a batch, and the others would wait there.
        """
        rank, processes, pairs = 0, 1, self.pairs
        if (trainer := self.trainer) is not None:
            rank, processes, pairs = (
                trainer.global_rank,
                trainer.world_size,
                trainer.strategy.broadcast(pairs),
            )  # as the first process saw them
        share, size = pairs[rank::processes], self.batch_size
        return Batches(
            share[i * size : (i + 1) * size]
            for i in range(max(1, ceil(len(pairs) / (processes * size))))
        )
