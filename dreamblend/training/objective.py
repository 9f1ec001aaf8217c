"""The training objective: noising, target and loss weighting as pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction")


def draw_noise(shape: torch.Size, generator: torch.Generator, offset: float = 0.0) -> Tensor:
    """Noise of `shape`. `offset` adds a constant per sample and channel, so that the model learns
    the overall brightness (Guttenberg, 2023).
    """
    noise = torch.randn(shape, generator=generator)
    if offset:
        noise = noise + offset * torch.randn(*shape[:2], 1, 1, generator=generator)
    return noise


def add_noise(z: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Noisy latents alpha z + sigma noise; alpha and sigma are (batch,)."""
    return _wide(alpha, z) * z + _wide(sigma, z) * noise


def target(prediction: str, z: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the denoiser should predict: the noise, v = alpha noise - sigma z (Salimans and Ho,
    2022), or the flow noise - z.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        return _wide(alpha, z) * noise - _wide(sigma, z) * z
    if prediction == "flow_prediction":
        return noise - z
    raise ValueError(
        f"unknown prediction type {prediction!r}: it is one of {', '.join(PREDICTIONS)}"
    )


def min_snr_weight(prediction: str, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights (batch,) for a loss on `prediction` (Hang et al., 2023): min(SNR, gamma) on
    the clean image.
    """
    snr = (alpha / sigma.clamp(min=1e-8)) ** 2
    clipped = snr.clamp(max=gamma)
    if prediction == "epsilon":
        return (gamma / snr.clamp(min=1e-8)).clamp(max=1)  # clipped / snr, defined also for 0 / 0
    if prediction == "v_prediction":
        return clipped / (snr + 1)
    return clipped * sigma**2  # the error of the clean image is sigma times the flow's


def sample_loss(predicted: Tensor, wanted: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, over its places (`sample_mean`): (batch,), fp32."""
    return sample_mean((predicted.float() - wanted.float()) ** 2, weight)


def sample_mean(errors: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean (batch,) of each sample's errors (batch, channels, height, width). `weight` (batch,
    height, width) weighs its places; the mean is that of the weights, so that a small subject
    counts as much as a large one.
    """
    if weight is None:
        return errors.flatten(1).mean(1)
    return (weight * errors.mean(1)).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-8)


def _wide(x: Tensor, like: Tensor) -> Tensor:
    return x.view(-1, *[1] * (like.ndim - 1)).to(like.device)
