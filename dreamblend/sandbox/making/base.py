"""The sandbox's base: a denoiser trained together with its text encoder, in Stable Diffusion's
layout.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from dreamblend.attention.recording import record
from dreamblend.attention.words import by_grid
from dreamblend.sandbox.drawing import LABELS
from dreamblend.sandbox.making.data import Scenes, make_text_encoder, picked
from dreamblend.sandbox.making.fitting import Batch, Run, fit

BATCH = 32


class _Base(nn.Module):
    """Denoiser and text encoder, trained together; `reading` tells from the denoiser's features
    what each latent shows.
    """

    unet: Any  # type checkers see the stand-in that diffusers has where torch is missing

    def __init__(self, tokenizer: CLIPTokenizer, channels: int):
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(64, 128),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=128,
            attention_head_dim=(2, 4),
            norm_num_groups=16,
        )
        self.text = make_text_encoder(tokenizer, 128)
        self.reading = nn.Conv2d(128, len(LABELS), 1)
        self.unet.up_blocks[0].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.features = output

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The predicted noise (batch, channels, 16, 16), and logits (batch, LABELS, 16, 16) of what
        each latent shows.
        """
        noise = self.unet(noisy, t, self.text(ids).last_hidden_state).sample
        return noise.float(), self.reading(self.features).float()


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise schedule."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def grounding(maps: Tensor, owners: Tensor, region: Tensor, weight: Tensor) -> Tensor:
    """How far the words' maps lie outside what they name: (1 - mass inside)^2, as the token loss of
    TokenCompose (Wang et al., CVPR 2024). maps (batch, 64, tokens), owners (batch, tokens), region
    (batch, 3, 8, 8), weight (batch,).
    """
    inside = (
        region.flatten(2)
        .gather(1, owners.clamp(min=0).unsqueeze(-1).expand(-1, -1, 64))
        .transpose(1, 2)
    )
    mass = (maps * inside).sum(1) / maps.sum(1)
    each = weight[:, None] * (owners >= 0)
    return (each * (1 - mass) ** 2).sum() / each.sum().clamp(min=1)


def reading_loss(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy of what each latent shows, things counting as much as the place; logits (batch,
    LABELS, 16, 16), labels (batch, 16, 16), weight (batch,).
    """
    errors = F.cross_entropy(logits, labels, reduction="none")
    each = weight[:, None, None] * torch.where(labels > 0, 3.0, 1.0)
    return (each * errors).sum() / each.sum().clamp(min=1)


def fit_base(
    steps: int,
    data: Scenes,
    vae: Any,
    tokenizer: CLIPTokenizer,
    out: Path,
    run: Run,
) -> None:
    """Train denoiser and text encoder together on the noise-prediction loss.

    Small errors at large noise are weighted up (1 / alpha_bar, the velocity's; Salimans and Ho,
    ICLR 2022): there a scene's layout is settled. Two light losses beside it use what the renderer
    knows. The words' maps are grounded in the masks, and the denoiser's features must tell which
    class and part each latent shows, which speeds the learning of shapes as aligned features do
    (Yu et al., ICLR 2025).
    """
    base = _Base(tokenizer, vae.config.latent_channels)
    base.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's types
    scheduler: Any = make_scheduler()
    velocity = (1 / scheduler.alphas_cumprod).clamp(max=5).to(run.device)
    sites = [
        n
        for n, m in base.unet.named_modules()
        if n.endswith("attn2") and not n.startswith(("down_blocks.0", "up_blocks.1"))
    ]

    def batch(step: int, rng: Random) -> Batch:
        return picked(rng, BATCH, len(data.ids))

    def loss(given: Batch, generator: torch.Generator) -> Tensor:
        pick, dropped = given["pick"], given["dropped"]
        t = (1000 * given["times"]).long().clamp(0, 999)
        z = data.latents[pick].float()
        ids = torch.where(dropped[:, None], data.empty, data.ids[pick])
        noise = torch.randn(z.shape, generator=generator, device=z.device)
        with record(base.unet, sites) as maps:
            guess, read = base(scheduler.add_noise(z, noise, t), t, ids)
        clear = ((t < 800) & ~dropped).float()
        errors = (guess - noise).square().mean((1, 2, 3))
        regions = data.regions[pick].float()
        return (
            (velocity[t] / velocity.mean() * errors).mean()
            + 0.03 * grounding(by_grid(maps), data.owners[pick], regions, clear)
            + 0.03 * reading_loss(read, data.labels[pick].long(), clear)
        )

    fit("base", base, batch, loss, steps, 8e-4, run)
    pipe: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=base.text,
        tokenizer=tokenizer,
        unet=base.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16).save_pretrained(out)
