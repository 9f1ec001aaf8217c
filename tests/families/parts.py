"""What the families share: a VAE, and random weights that let every input show in the output."""

from __future__ import annotations

import diffusers
import torch
from torch import nn


@torch.no_grad()
def randomise(module: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Draws every weight anew: layers that start at zero, and memory that diffusers leaves as it
    was, would hide the prompt or give NaN. Matrices keep the size of what they are given (times
    gain), norms are near one, biases near zero, statistics of batch norms near (0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if id(weight) in embeddings:
            weight.copy_(noise)
        elif weight.dim() > 1 and min(weight.shape) > 0 and weight.squeeze().dim() > 1:
            weight.copy_(noise * gain / weight[0].numel() ** 0.5)
        else:
            weight.copy_(0.1 * noise + (0 if "bias" in name else 1))
    for name, statistic in module.named_buffers():
        if name.endswith("running_mean"):
            statistic.copy_(0.1 * torch.randn(statistic.shape, generator=generator))
        elif name.endswith("running_var"):
            statistic.copy_(0.5 + torch.rand(statistic.shape, generator=generator))
    return module.eval()


def pipeline(name: str, **parts) -> diffusers.DiffusionPipeline:
    """The diffusers pipeline of that name over its parts, with random weights."""
    for seed, key in enumerate(sorted(parts)):
        if hasattr(parts[key], "parameters"):
            randomise(parts[key], seed)
    return getattr(diffusers, name)(**parts)


def kl_vae(
    channels: int, scale: float, shift: float | None = None, **config
) -> diffusers.AutoencoderKL:
    """VAEs with a shift have no convolution around their latents."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
        **config,
    )
