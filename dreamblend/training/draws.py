"""An endless, stateless stream of draws: which photos and class images each batch uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import count
from random import Random
from typing import Any

import torch
from torch.utils.data import IterableDataset


@lru_cache(maxsize=16)
def _permutation(length: int, key: str) -> tuple[int, ...]:
    return tuple(Random(key).sample(range(length), length))


class Draws(IterableDataset):
    """An endless stream of the photos that each batch uses. Draw i of a rank depends only on (seed,
    i, rank).

    So an interrupted run continues exactly by starting at i, without a saved state. Each iteration
    calls `start()` for its first i, as an epoch goes on where the previous one ended. All ranks
    read one common sequence of permutations, so each photo is used equally often (or `repeats`
    times as often), and n processes draw the same as one process that accumulates the gradients of
    n times as many batches. Use it
    with num_workers=0, as each worker would repeat the whole stream.

    A batch has photos of one bucket. Each bucket has its own sequence, and one of them comes as
    often as it has photos, so that these are used equally often too.

    Yields dict(index (n,) int64, flipped (n,) bool, prior (n,) bool, position (n,) int64, bucket
    int, draw int). The first `batch_size` entries are instance photos. If there are prior images,
    as many of them follow, and their index counts within the prior images. `draw` and `position`
    (of a row in its stream of photos or of prior images) count over all ranks.
    """

    def __init__(
        self,
        instances: int,
        priors: int,
        batch_size: int,
        flip: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: Callable[[], int] = int,
        repeats: Sequence[int] | None = None,
        buckets: Sequence[int] | None = None,
    ):
        self.instances = instances
        # each as often as it is drawn where another is drawn once
        photos = [i for i, n in enumerate(repeats or [1] * instances) for _ in range(n)]
        self.buckets = [buckets[i] if buckets else 0 for i in photos]
        self.photos = {
            bucket: [i for i, of in zip(photos, self.buckets) if of == bucket]
            for bucket in sorted({*self.buckets})
        }
        self.priors = priors
        self.batch_size = batch_size
        self.flip = flip
        self.seed, self.rank, self.world_size, self.start = seed, rank, world_size, start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.at, count(self.start()))

    def at(self, draw: int) -> dict[str, Any]:
        """The batch that this rank uses at `draw`."""
        number = draw * self.world_size + self.rank
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        bucket, first = self._bucket(number)
        photos = self.photos[bucket]
        stream = "instance" if len(self.photos) == 1 else f"instance/bucket/{bucket}"
        places = range(first * self.batch_size, (first + 1) * self.batch_size)
        index = [photos[_place(len(photos), f"{self.seed}/{stream}", p)] for p in places]
        flipped = [self._flipped("instance", p) for p in positions]
        if self.priors:
            index += [_place(self.priors, f"{self.seed}/prior", p) for p in positions]
            flipped += [self._flipped("prior", p) for p in positions]
        prior = torch.arange(len(index)) >= self.batch_size
        return dict(
            index=torch.tensor(index),
            flipped=torch.tensor(flipped),
            prior=prior,
            position=torch.tensor(positions).repeat(len(index) // self.batch_size),
            bucket=bucket,
            draw=number,
        )

    def _bucket(self, number: int) -> tuple[int, int]:
        """The bucket of a batch, and how many batches before it are of the same bucket: that of
        each photo in turn, in an order drawn anew each time around.
        """
        length = len(self.buckets)
        lap, offset = divmod(number, length)
        order = [self.buckets[i] for i in _permutation(length, f"{self.seed}/buckets/{lap}")]
        bucket = order[offset]
        return bucket, lap * order.count(bucket) + order[:offset].count(bucket)

    def _flipped(self, stream: str, position: int) -> bool:
        return self.flip and Random(f"{self.seed}/{stream}/flip/{position}").random() < 0.5


def _place(length: int, stream: str, position: int) -> int:
    """What an endless chain of permutations has at `position`."""
    lap, offset = divmod(position, length)
    # a text seeds Random the same way on every machine
    return _permutation(length, f"{stream}/{lap}")[offset]
