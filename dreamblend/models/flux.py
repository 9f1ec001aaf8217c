"""FLUX.1 (Black Forest Labs, 2024): T5 and a pooled CLIP, joint attention, a rectified flow whose
guidance scale is an input.
"""

from __future__ import annotations

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
    "FLUX.1",
    ("FluxPipeline",),
    ("transformer", "vae", "text_encoder", "text_encoder_2"),
    ("tokenizer", "tokenizer_2"),
    variants=("FluxImg2ImgPipeline",),
    kinds=("flux-dev", "flux-schnell"),
    within={
        "vae": "vae.",
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.t5xxl.",
    },
    as_saved=True,
)
TRAINED_AT = 3.5  # the guidance scale of training, as in diffusers' script


class Flux(ThroughPipeline):
    """Wraps diffusers' FluxPipeline."""

    multiple = 16
    plain_timesteps = False
    distilled = True  # one prediction, with the scale as an input or without any

    feed_forward = (
        *("ff.net.0.proj", "ff.net.2"),
        *("ff_context.net.0.proj", "ff_context.net.2"),
        "proj_mlp",
    )

    def __init__(self, pipe: Any, base: str):
        super().__init__(pipe, base, "transformer", ("text_encoder",), ("text_encoder_2",))
        side = pipe.default_sample_size
        self.latent_shape = (self.denoiser.config.in_channels // 4, side, side)
        self.size = side * pipe.vae_scale_factor
        self.length = pipe.tokenizer_2.model_max_length
        self.takes_scale = self.denoiser.config.guidance_embeds
        if not self.takes_scale:
            self.untrainable = (
                "FLUX.1 schnell, distilled to a few steps, which training would undo: train"
                " FLUX.1-dev"
            )

    # -- text
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        self.activate()
        states, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, device=self.device, max_sequence_length=self.length
        )
        return self.guided(Conditioning(states, {"pooled": pooled}), TRAINED_AT)

    def offsets(self, prompt: str) -> Offsets:
        """The columns are T5's; CLIP gives no tokens."""
        return padded(offsets_of(self._pipe.tokenizer_2, prompt, self.length), self.length)

    # -- sampling
    def schedule_options(
        self, num_inference_steps: int, latent_size: tuple[int, int]
    ) -> dict[str, Any]:
        return flow.even_options(self.scheduler, num_inference_steps, latent_size)

    def guided(self, conditioning: Conditioning, scale: float) -> Conditioning:
        return flow.told_scale(conditioning, scale) if self.takes_scale else conditioning

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.activate()
        (batch, channels, height, width), dtype = latents.shape, self.denoiser.dtype
        pack, unpack = self._pipe._pack_latents, self._pipe._unpack_latents
        ids = self._pipe._prepare_latent_image_ids(
            batch, height // 2, width // 2, latents.device, dtype
        )
        output = self.denoiser(
            # (batch, channels, h, w) -> (batch, h / 2 w / 2, 4 channels)
            hidden_states=pack(latents.to(dtype), batch, channels, height, width),
            timestep=t.expand(batch).to(dtype) / 1000,
            guidance=conditioning.extras.get("guidance"),
            pooled_projections=conditioning.extras["pooled"].to(dtype),
            encoder_hidden_states=conditioning.states.to(dtype),
            txt_ids=torch.zeros(
                conditioning.states.shape[1], 3, device=latents.device, dtype=dtype
            ),
            img_ids=ids,
        ).sample
        factor = self._pipe.vae_scale_factor
        return unpack(output, height * factor, width * factor, factor)

    def sites(
        self,
        grid: int | None = None,
        latent_size: tuple[int, int] | None = None,
        layers: list[str] | None = None,
    ) -> dict[str, Site]:
        """Text columns come first, in double and in single blocks."""
        height, width = (side // 2 for side in latent_size or self.latent_shape[1:])
        image = height * width
        return block_sites(
            self.denoiser,
            r"(single_)?transformer_blocks\.\d+\.attn",
            (height, width),
            grid,
            layers,
            self.base,
            rows=slice(-image, None),
            columns=slice(0, -image),
        )


def load(
    path: Path,
    config: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
) -> Flux:
    """Load a base as it was saved. Args as `stable_diffusion.load`."""
    return Flux(flow.pipeline(path, LAYOUT, config, prediction, variant), str(path))
