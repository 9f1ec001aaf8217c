"""At which timesteps training draws, and how often."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamblend.errors import InputError
from dreamblend.models.noise import TrainingNoise

DENSITIES = ("uniform", "logit_normal", "mode", "cosmap")


@dataclass
class Timesteps:
    """Which of the training timesteps are drawn, and how often (Esser et al., 2024).

    Args:
        density: uniform, logit_normal, mode or cosmap, as diffusers' scripts have them. If None,
            the family's own.
        logit_mean: of logit_normal: 0 where None. Above it, cleaner levels come more often.
        logit_std: of logit_normal: 1 where None.
        mode_scale: of mode: 1.29 where None. Above zero, the middle comes more often.
        range: [low, high] of the timesteps, from 0, the clean image, to 1000, noise alone; `high`
            itself is not drawn. The density is that of the range.
    """

    density: str | None = None
    logit_mean: float | None = None
    logit_std: float | None = None
    mode_scale: float | None = None
    range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.density not in (None, *DENSITIES):
            raise InputError(
                f"model.timesteps.density is {self.density!r}: it is one of {', '.join(DENSITIES)}"
            )
        for name, of in (
            ("logit_mean", "logit_normal"),
            ("logit_std", "logit_normal"),
            ("mode_scale", "mode"),
        ):
            if getattr(self, name) is not None and self.density != of:
                raise InputError(
                    f"model.timesteps.{name} is of the density {of}, which is"
                    f" {self.density or 'the own one of the family'}: leave it out, or set"
                    f" model.timesteps.density to {of}"
                )
        if self.logit_std is not None and self.logit_std <= 0:
            raise InputError(
                f"model.timesteps.logit_std is {self.logit_std}: it must be above zero"
            )
        if self.mode_scale is not None and not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise InputError(
                f"model.timesteps.mode_scale is {self.mode_scale}: it is from -1 to 1.75"
            )
        if self.range is not None:
            low, high = self.range
            self.range = (low, high)
            if not 0 <= low < high:
                raise InputError(
                    f"model.timesteps.range is {[low, high]}: it is a low and a higher"
                    " timestep, from 0 on"
                )

    @property
    def record(self) -> dict[str, Any]:
        """What snapshot.json says of it: what is set."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {"timesteps": given} if given else {}

    def check(self, noise: TrainingNoise) -> None:
        """Raise InputError where the range is none of a family's timesteps."""
        if self.range is not None and self.range[1] > len(noise):
            raise InputError(
                f"model.timesteps.range is {list(self.range)}, and this base has {len(noise)}"
                " timesteps"
            )

    def draw(self, noise: TrainingNoise, count: int, generator: torch.Generator) -> Tensor:
        """(count,) indices of levels, 0 the clean image."""
        low, high = self.range or (0, len(noise))
        if self.density is None:
            return noise.draw(count, generator, low, high)
        # as diffusers, whose share is of a list that begins with noise alone
        share = self._share(count, generator)
        return (high - 1 - (share * (high - low)).long()).clamp(low, high - 1)

    def _share(self, count: int, generator: torch.Generator) -> Tensor:
        from diffusers.training_utils import compute_density_for_timestep_sampling

        assert self.density is not None
        share = compute_density_for_timestep_sampling(
            self.density,
            count,
            0.0 if self.logit_mean is None else self.logit_mean,
            1.0 if self.logit_std is None else self.logit_std,
            1.29 if self.mode_scale is None else self.mode_scale,
            generator=generator,
        )
        if self.density == "cosmap":
            # diffusers draws all alike and weighs the loss by this density: drawn by it here
            share = 1 - 1 / (torch.tan(math.pi / 2 * share) + 1)
        return share
