"""What the families have in common that are trained as flows from noise to images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamblend.errors import InputError
from dreamblend.models import pipelines
from dreamblend.models.noise import TrainingNoise
from dreamblend.models.pipelines import Layout
from dreamblend.models.text import Conditioning


def pipeline(
    path: Path,
    layout: Layout,
    config: str | None,
    prediction: str | None,
    variant: str | None = None,
) -> Any:
    """The pipeline in a folder or a single file. A flow predicts one thing."""
    if prediction not in (None, "flow_prediction"):
        raise InputError(
            f"model.base_prediction is {prediction!r}, and {path} is of {layout.family}, which"
            " predicts a flow: leave it out"
        )
    if path.is_file():
        return pipelines.load_file(path, layout, pipelines.config_folder(path, layout, config))
    return pipelines.load_folder(path, layout, variant)


def shift_options(scheduler: Any, tokens: int) -> dict[str, Any]:
    """What a scheduler with a dynamic shift is told of the number of image tokens: mu, which rises
    linearly with it (as `calculate_shift` of diffusers' pipelines).
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return {}
    low, high = config.base_image_seq_len, config.max_image_seq_len
    slope = (config.max_shift - config.base_shift) / (high - low)
    return {"mu": tokens * slope + config.base_shift - slope * low}


def even_sigmas(num_inference_steps: int) -> np.ndarray:
    """Shares of noise from 1 to 1/n, before any shift."""
    return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)


def even_options(
    scheduler: Any, num_inference_steps: int, latent_size: tuple[int, int]
) -> dict[str, Any]:
    """What the pipelines with latents in patches of 2 x 2 tell their scheduler."""
    tokens = latent_size[0] * latent_size[1] // 4
    return {"sigmas": even_sigmas(num_inference_steps), **shift_options(scheduler, tokens)}


def told_scale(conditioning: Conditioning, scale: float) -> Conditioning:
    """The prompts with the guidance scale that a denoiser takes as an input."""
    scales = torch.full((len(conditioning.states),), scale, device=conditioning.states.device)
    return Conditioning(conditioning.states, {**conditioning.extras, "guidance": scales})


def logit_normal(noise: TrainingNoise) -> TrainingNoise:
    """The same levels, the middle ones drawn more often, and a loss of the clean image."""
    return replace(noise, logit_normal=True, weight=noise.sigma**2)
