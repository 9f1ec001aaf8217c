"""Sana (Xie et al., ICLR 2025): Gemma as text with an instruction before the prompt, linear
attention within the image, cross-attention to the text, latents 32 times smaller than the image.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamblend.models import flow
from dreamblend.models.backbone import Site
from dreamblend.models.blocks import block_sites
from dreamblend.models.pipelines import Layout
from dreamblend.models.text import Conditioning, Offsets
from dreamblend.models.through_pipeline import ThroughPipeline, offsets_of, padded

LAYOUT = Layout(
    "Sana",
    ("SanaPipeline",),
    ("transformer", "vae", "text_encoder"),
    kinds=("sana",),
    as_saved=True,
)


class Sana(ThroughPipeline):
    """Wraps diffusers' SanaPipeline."""

    multiple = 32
    mask_argument = "prompt_attention_mask"
    lora_targets = ("to_q", "to_k", "to_v")

    feed_forward = ("conv_inverted", "conv_point")

    def __init__(self, pipe: Any, base: str):
        super().__init__(pipe, base, others=("text_encoder",))
        side = self.denoiser.config.sample_size
        self.latent_shape = (self.denoiser.config.in_channels, side, side)
        self.size = side * pipe.vae_scale_factor
        self.length = 300
        usual = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"]
        self.instruction = usual.default

    # -- text
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return self._encode(prompts, self.instruction)

    def encode_negative(self, prompts: list[str]) -> Conditioning:
        return self._encode(prompts, None)

    def _encode(self, prompts: list[str], instruction: list[str] | None) -> Conditioning:
        self.activate()
        states, mask, *_ = self.pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.length,
            complex_human_instruction=instruction,
        )
        return Conditioning(states, {"mask": mask})

    def offsets(self, prompt: str) -> Offsets:
        """The instruction is cut off again: what is left is the first token and the last 299."""
        before, tokenizer = "\n".join(self.instruction), self._pipe.tokenizer
        tokenizer.padding_side = "right"
        total = len(tokenizer.encode(before)) + self.length - 2
        start = len(before) - (len(prompt) - len(prompt.lstrip()))
        place = (start, start + len(prompt))
        places = offsets_of(tokenizer, before + prompt.lower().strip(), total, place)
        places = padded(places, total)
        return places[:1] + places[-self.length + 1 :]

    # -- images
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder gives no distribution."""
        latents = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent
        latents = latents * self.vae.config.scaling_factor
        return latents, torch.zeros_like(latents)

    # -- denoising
    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.activate()
        dtype = self.denoiser.dtype
        return self.denoiser(
            latents.to(dtype),
            encoder_hidden_states=conditioning.states.to(dtype),
            encoder_attention_mask=conditioning.extras["mask"],
            timestep=t.expand(len(latents)) * self.denoiser.config.timestep_scale,
        ).sample[:, : latents.shape[1]]

    def sites(
        self,
        grid: int | None = None,
        latent_size: tuple[int, int] | None = None,
        layers: list[str] | None = None,
    ) -> dict[str, Site]:
        size = latent_size or self.latent_shape[1:]
        pattern = r"transformer_blocks\.\d+\.attn2"
        return block_sites(self.denoiser, pattern, size, grid, layers, self.base)


def load(
    path: Path,
    config: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
) -> Sana:
    """Load a base as it was saved. Args as `stable_diffusion.load`."""
    return Sana(flow.pipeline(path, LAYOUT, config, prediction, variant), str(path))
