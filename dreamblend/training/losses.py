"""The loss of a prediction, as diffusers' scripts have it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamblend.errors import InputError
from dreamblend.training.objective import sample_loss, sample_mean

TYPES = ("l2", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")


@dataclass
class Loss:
    """How far a prediction is from what it should be.

    Args:
        type: l2, or pseudo-Huber, which large errors change less: huber, or smooth_l1, which is it
            over c.
        huber_c: the error c from which on the loss is a line, at noise alone: 0.1 where None.
        huber_schedule: how c falls to huber_c from 1 at the clean image: with the share of noise
            (snr, where None), exponential in the timestep, or constant (Khrapov et al., 2024).
    """

    type: str = "l2"
    huber_c: float | None = None
    huber_schedule: str | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("type", self.type, TYPES),
            ("huber_schedule", self.huber_schedule, (None, *HUBER_SCHEDULES)),
        ):
            if value not in choices:
                raise InputError(
                    f"model.loss.{name} is {value!r}: it is one of"
                    f" {', '.join(filter(None, choices))}"
                )
        if self.type == "l2" and (self.huber_c is not None or self.huber_schedule is not None):
            raise InputError(
                "model.loss.huber_c and huber_schedule are of the losses huber and smooth_l1: set"
                " model.loss.type"
            )
        if self.huber_c is not None and not 0 < self.huber_c <= 1:
            raise InputError(f"model.loss.huber_c is {self.huber_c}: it is above zero, up to 1")

    @property
    def record(self) -> dict[str, Any]:
        """What snapshot.json says of it: nothing for l2."""
        if self.type == "l2":
            return {}
        return {"loss": {name: v for name, v in vars(self).items() if v is not None}}

    def __call__(
        self,
        predicted: Tensor,
        wanted: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        share: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The mean of each sample, (batch,), fp32.

        Args:
            predicted, wanted: (batch, ...).
            alpha, sigma: (batch,) shares of image and noise.
            share: (batch,) the timestep's of all of them, 0 at the clean image.
            weight: (batch, height, width) of their places, where these differ.
        """
        if self.type == "l2":
            return sample_loss(predicted, wanted, weight)
        c = self._c(alpha, sigma, share).view(-1, *[1] * (wanted.ndim - 1))
        root = torch.sqrt((predicted.float() - wanted.float()) ** 2 + c**2) - c
        scale = 2 * c if self.type == "huber" else 2
        return sample_mean(scale * root, weight)

    def _c(self, alpha: Tensor, sigma: Tensor, share: Tensor) -> Tensor:
        least = 0.1 if self.huber_c is None else self.huber_c
        if self.huber_schedule == "constant":
            return torch.full_like(alpha, least)
        if self.huber_schedule == "exponential":
            return torch.exp(math.log(least) * share)
        return (1 - least) / (1 + sigma / alpha) ** 2 + least
