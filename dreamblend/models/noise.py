"""The noise that a family is trained on: how much of it at which timestep, how often, and what is
predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainingNoise:
    """The training timesteps of a scheduler, from the clean image to noise alone.

    Args:
        prediction: what the denoiser says: epsilon, v_prediction or flow_prediction.
        alpha, sigma: (n,) shares of image and noise at each: noisy = alpha image + sigma noise.
        timesteps: (n,) what the denoiser is told; 0 to n - 1 where empty.
        weight: (n,) of the loss; 1 where empty.
        logit_normal: draw the levels near the middle more often: a logistic of a normal draw
            (Esser et al., 2024). All alike where False.
    """

    prediction: str
    alpha: Tensor
    sigma: Tensor
    timesteps: Tensor = field(default_factory=lambda: torch.empty(0))
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    logit_normal: bool = False

    def __len__(self) -> int:
        return len(self.alpha)

    def draw(
        self, count: int, generator: torch.Generator, low: int = 0, high: int | None = None
    ) -> Tensor:
        """(count,) indices of levels, from `low` to below `high`."""
        high = len(self) if high is None else high
        if not self.logit_normal:
            return torch.randint(low, high, (count,), generator=generator)
        share = torch.randn(count, generator=generator).sigmoid()
        return low + (share * (high - low)).long().clamp(max=high - low - 1)

    def at(self, share: float) -> int:
        """The index of the level at a share of all: 0 is clean, 1 noise alone."""
        return min(int(share * len(self)), len(self) - 1)

    def timestep(self, index: Tensor) -> Tensor:
        """What the denoiser is told of levels by index, (batch,)."""
        return self.timesteps[index] if len(self.timesteps) else index


def predicted(config: Mapping[str, Any]) -> str:
    """What a denoiser says, as the configuration of its scheduler has it
    (`scheduler_config.json`).
    """
    flow = str(config.get("_class_name")).startswith("FlowMatch") or config.get("use_flow_sigmas")
    return "flow_prediction" if flow else config.get("prediction_type", "epsilon")


def noise_of(scheduler: Any) -> TrainingNoise:
    """The training noise of a scheduler of diffusers as it was loaded, before its timesteps are
    set.
    """
    config = scheduler.config
    if hasattr(scheduler, "alphas_cumprod") and not config.get("use_flow_sigmas"):
        cumulative = scheduler.alphas_cumprod.float().cpu()
        return TrainingNoise(config.prediction_type, cumulative.sqrt(), (1 - cumulative).sqrt())
    count = config.num_train_timesteps
    if hasattr(scheduler, "alphas_cumprod"):  # made for another kind: its own tables are of that
        sigma = torch.arange(1, count + 1) / count
        return TrainingNoise("flow_prediction", 1 - sigma, sigma, sigma * count)
    # a static shift is in these tables, and a dynamic one is not
    sigma = scheduler.sigmas[:count].float().cpu().flip(0)
    timesteps = scheduler.timesteps[:count].float().cpu().flip(0)
    return TrainingNoise("flow_prediction", 1 - sigma, sigma, timesteps)
