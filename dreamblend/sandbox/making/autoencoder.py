"""The sandbox's autoencoder: 128 x 128 pixels to 16 x 16 latents of 8 channels."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dreamblend.sandbox import world
from dreamblend.sandbox.drawing import LABELS
from dreamblend.sandbox.making.fitting import Batch, Run, fit
from dreamblend.storage.photos import to_pixels

FACTOR = 8  # pixels to a latent, each way
_BATCH = 16


def make_autoencoder() -> AutoencoderKL:
    """The autoencoder, untrained. It has no attention, so that crops of scenes can train it."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )


def shares(labels: Tensor) -> Tensor:
    """Labels (batch, height, width) to the share of each in every latent's square: (batch, labels,
    height / 8, width / 8).
    """
    return F.avg_pool2d(F.one_hot(labels, len(LABELS)).permute(0, 3, 1, 2).float(), FACTOR)


class _Fitted(nn.Module):
    """The autoencoder, and a linear reading of what its latents show."""

    vae: Any  # type checkers see the stand-in that diffusers has where torch is missing

    def __init__(self):
        super().__init__()
        self.vae = make_autoencoder()
        self.reading = nn.Conv2d(self.vae.config.latent_channels, len(LABELS), 1)


def fit_autoencoder(steps: int, run: Run) -> AutoencoderKL:
    """Reconstruct scenes, half of them crowded with things: their colours and patterns are what a
    subject is made of.

    Things count more than the place and thin parts more than bulk, wrong colours more than fine
    errors (the square), and detail through the image gradients. Noise on the latents teaches the
    decoder to bear a denoiser's errors. What a latent shows (which class, which part) can be read
    off it linearly: such latents are learnt faster by a denoiser (Yao et al., CVPR 2025).
    """
    fitted = _Fitted()
    fitted.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's types
    vae = fitted.vae
    standing_out = [isinstance(of, tuple) and of[1] is not None for of in LABELS]
    thin = torch.tensor(standing_out).float().to(run.device)

    def batch(step: int, rng: Random) -> Batch:
        kinds = (world.random_scene, world.crowded_scene)
        drawn = [world.draw(kinds[i % 2](rng)) for i in range(_BATCH)]
        return {
            "pixels": to_pixels([d.image for d in drawn]),
            "labels": torch.from_numpy(np.stack([d.labels for d in drawn])),
        }

    def loss(given: Batch, generator: torch.Generator) -> Tensor:
        x, labels = given["pixels"], given["labels"].long()
        weight = (1 + 4 * (labels > 0).float() + 4 * thin[labels]).unsqueeze(1)
        posterior = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
        z = posterior.mean
        noise = torch.randn(z.shape, generator=generator, device=z.device)
        far = torch.rand(len(z), 1, 1, 1, generator=generator, device=z.device)
        far = 0.25 * far * z.detach().std()
        y = vae.decode(z + (posterior.var + far**2).sqrt() * noise).sample.float()
        edges = sum(
            (weight.narrow(d, 0, world.SIZE - 1) * (x.diff(dim=d) - y.diff(dim=d)).abs()).mean()
            for d in (2, 3)
        )
        return (
            (weight * ((x - y).abs() + 4 * (x - y) ** 2)).mean() / weight.mean()
            + 0.5 * edges / weight.mean()
            + 0.05 * F.cross_entropy(fitted.reading(z), shares(labels))
            + 1e-4 * posterior.kl().mean() / z[0].numel()
        )

    fit("autoencoder", fitted, batch, loss, steps, 1.2e-3, run)
    with torch.no_grad():
        rng = Random(1)
        pixels = to_pixels([world.render(world.random_scene(rng))[0] for _ in range(256)])
        z = torch.cat([vae.encode(x.to(run.device)).latent_dist.mean for x in pixels.split(32)])
    normalise(vae, z.mean((0, 2, 3)), z.std((0, 2, 3)))
    return vae


@torch.no_grad()
def normalise(vae: Any, mean: Tensor, std: Tensor) -> None:
    """Give latents whose channels have this mean and deviation (channels,) mean 0 and deviation 1:
    a denoiser then sees every channel at one ratio of signal to noise. What is decoded stays.
    """
    into, back = vae.quant_conv, vae.post_quant_conv
    means, logvars = slice(len(mean)), slice(len(mean), None)
    into.weight[means] /= std[:, None, None, None]
    into.bias[means] = (into.bias[means] - mean) / std
    into.bias[logvars] -= 2 * std.log()
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= std[:, None, None]
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
