"""What every way to draw from a pair has in common: its interface, and sampling while the words'
maps are read.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from dreamblend.attention import Maps, record
from dreamblend.attention.words import word_maps
from dreamblend.blending.batch import Task
from dreamblend.errors import InputError
from dreamblend.models import Backbone
from dreamblend.sampling import Predictor, predicts_twice, sample


@dataclass
class Drawn:
    """Latents (batch, channels, height, width), and word maps (batch, words, queries) averaged over
    the steps.
    """

    latents: Tensor
    maps: Tensor
    distance: Tensor | None = (
        None  # (batch,) map distance to the reference, averaged over the guided steps
    )


class Blend(ABC):
    """A way to draw from a pair."""

    name: str

    @abstractmethod
    def draw(self, task: Task) -> Drawn:
        """Draw one image for each pair of the task."""

    def guided_steps(self, steps: int) -> range:
        """Those of `steps` calls of the model at which the early snapshot's maps are wanted."""
        return range(0)

    @property
    def settings(self) -> dict:
        return {"blend": self.name, **vars(self)}


def watched(
    task: Task,
    model: Backbone,
    predict: Predictor,
    adjust=None,
    keep: range = range(0),
    reads: range | None = None,
    mix=None,
) -> tuple[Drawn, dict[int, Maps]]:
    """Sample with `predict` while reading the maps of `model`: their average, and whole at the
    steps of `keep`.

    `reads` are the steps that `model` makes, where not all: what another one records in shared
    layers is not its own. `mix` makes the output of the model's, given also the word maps just
    read: (output, maps, latents, timestep, step).
    """
    total, read, kept = 0, 0, {}
    with record(
        model.denoiser,
        model.sites(task.grid),
        task.tokens,
        conditional_only=predicts_twice(model, task.scale),
    ) as maps:

        def reading(z: Tensor, t: Tensor, step: int) -> Tensor:
            nonlocal total, read
            maps.clear()
            output = predict(z, t, step)
            if reads is None or step in reads:
                seen = word_maps(maps, task.words)
                total, read = total + seen, read + 1
                if step in keep:
                    kept[step] = dict(maps)
            return output if mix is None else mix(output, seen, z, t, step)

        z = sample(reading, task.noise, model.scheduler, task.steps, adjust, task.seeds)
    return Drawn(z, total / read), kept


def finite(weight: float) -> float:
    """The weight. Raises InputError where it is no number."""
    if not math.isfinite(weight):
        raise InputError(
            f"weight is {weight}: it is a number, 0 for the early snapshot and 1 for the late one"
        )
    return weight


def share_of_steps(name: str, *values: float) -> None:
    """Raise InputError where values are not shares of the steps, in order."""
    if not all(0 <= v <= 1 for v in values) or list(values) != sorted(values):
        raise InputError(
            f"{name} is {values if len(values) > 1 else values[0]}: it is a share of the steps,"
            " from 0 to 1"
        )
