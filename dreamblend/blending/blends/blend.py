"""What every way to draw from a pair has in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dreamblend.attention import Maps
from dreamblend.blending.batch import Batch
from dreamblend.errors import InputError
from dreamblend.models import Backbone


@dataclass
class Drawing:
    """What a blend draws: one image for each pair of a batch."""

    latents: Tensor  # (batch, channels, height, width)
    maps: Tensor  # (batch, words, queries) averaged over the steps
    distance: Tensor | None = None  # (batch,) of the maps to the reference's, over the guided steps
    site_maps: dict[int, Maps] = field(default_factory=dict)  # of the steps that others want


class Blend(ABC):
    """A way to draw from a pair."""

    name: str
    # denoiser evaluations a sample, mean over the calls of the model, at a guidance scale above 1
    passes: float = 2  # as plain sampling: one for the prompt and one for the empty prompt
    needs_words = True  # it must know which tokens of a prompt are which words

    @abstractmethod
    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        """Draw one image for each pair of the batch.

        `reference` is the early snapshot's drawing of the same batch (`draw_reference`), if there
        is one already; a blend that needs a reference and gets none draws it.
        """

    def check(self, model: Backbone, guidance_scale: float) -> None:  # noqa: B027
        """Raise InputError where this model cannot be drawn with so, at this guidance scale."""

    def guided_steps(self, calls: int) -> range:
        """The calls, of `calls` calls of the model, that need the early snapshot's maps."""
        return range(0)

    @property
    def settings(self) -> dict[str, Any]:
        return {"blend": self.name, **vars(self)}


def finite(weight: float) -> float:
    """The weight. Raises InputError where it is no number."""
    if not math.isfinite(weight):
        raise InputError(
            f"weight is {weight}: it is a number, 0 for the early snapshot and 1 for the late one"
        )
    return weight


def one_of(name: str, value: str, values: tuple[str, ...]) -> str:
    """The value. Raises InputError where it is none of these."""
    if value not in values:
        raise InputError(f"{name} is {value!r}: it is one of {', '.join(values)}")
    return value


def share_of_steps(name: str, *values: float) -> None:
    """Raise InputError where values are not shares of the steps, in order."""
    if not all(0 <= v <= 1 for v in values) or list(values) != sorted(values):
        raise InputError(
            f"{name} is {values if len(values) > 1 else values[0]}: it is a share of the steps,"
            " from 0 to 1"
        )
