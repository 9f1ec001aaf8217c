"""Qwen-Image (Qwen, 2025): a multimodal language model as text, joint attention, a rectified
flow.
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
from dreamblend.models.through_pipeline import ThroughPipeline, offsets_of, place_in

LAYOUT = Layout(
    "Qwen-Image",
    ("QwenImagePipeline",),
    ("transformer", "vae", "text_encoder"),
    variants=("QwenImageImg2ImgPipeline",),
    kinds=("qwen-image",),
    as_saved=True,
)


class QwenImage(ThroughPipeline):
    """Wraps diffusers' QwenImagePipeline."""

    multiple = 16
    plain_timesteps = False
    mask_argument = "prompt_embeds_mask"
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )

    feed_forward = (
        *("img_mlp.net.0.proj", "img_mlp.net.2"),
        *("txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )

    def __init__(self, pipe: Any, base: str):
        super().__init__(pipe, base, others=("text_encoder",))
        side = pipe.default_sample_size
        self.latent_shape = (self.denoiser.config.in_channels // 4, side, side)
        self.size = side * pipe.vae_scale_factor
        self.length = 512  # as the pipeline calls

    def idle(self) -> dict[str, list[str]]:
        """The last block's text is dropped."""
        last = f"transformer_blocks.{len(self.denoiser.transformer_blocks) - 1}"
        return {self.denoiser_name: [f"{last}.attn.to_add_out", f"{last}.txt_mlp"]}

    # -- text
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        self.activate()
        states, mask = self.pipe.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.length
        )
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        return Conditioning(states, {"mask": mask})

    def offsets(self, prompt: str) -> Offsets:
        """The template's first tokens are cut off again."""
        cut = self._pipe.prompt_template_encode_start_idx
        text, place = place_in(self._pipe.prompt_template_encode.format, prompt)
        limit = self._pipe.tokenizer_max_length + cut
        return offsets_of(self._pipe.tokenizer, text, limit, place)[cut : cut + self.length]

    # -- images: of one frame, each channel with statistics of its own
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        frames = pixels.to(self.device, self.vae.dtype).unsqueeze(2)
        posterior = self.vae.encode(frames).latent_dist
        mean, deviation = self._statistics()
        return (
            (posterior.mean.squeeze(2) - mean) / deviation,
            posterior.std.squeeze(2) / deviation,
        )

    def decode(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics()
        with torch.autocast(latents.device.type, enabled=False):
            frames = (latents.to(self.vae.dtype) * deviation + mean).unsqueeze(2)
            return self.vae.decode(frames).sample.squeeze(2)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        config, like = self.vae.config, next(self.vae.parameters())
        mean, deviation = (
            like.new_tensor(x, device=self.device)
            for x in (config.latents_mean, config.latents_std)
        )
        return mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)

    # -- sampling
    def schedule_options(
        self, num_inference_steps: int, latent_size: tuple[int, int]
    ) -> dict[str, Any]:
        return flow.even_options(self.scheduler, num_inference_steps, latent_size)

    def combine(self, unguided: Tensor, guided: Tensor, guidance_scale: float) -> Tensor:
        """Each token's prediction is as long as without guidance."""
        combined = super().combine(unguided, guided, guidance_scale)
        long, short = (self._norms(x) for x in (combined, guided))
        return combined * (short / long)

    def _norms(self, x: Tensor) -> Tensor:
        """The norm of each token, a patch of 2 x 2: (batch, 1, height, width)."""
        squares = (x**2).sum(1, keepdim=True)
        patches = torch.nn.functional.avg_pool2d(squares, 2, divisor_override=1).sqrt()
        return patches.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.activate()
        (batch, channels, height, width), dtype = latents.shape, self.denoiser.dtype
        mask = conditioning.extras["mask"]
        output = self.denoiser(
            # (batch, channels, h, w) -> (batch, h / 2 w / 2, 4 channels)
            hidden_states=self._pipe._pack_latents(
                latents.to(dtype), batch, channels, height, width
            ),
            timestep=t.expand(batch).to(dtype) / 1000,
            guidance=None,
            encoder_hidden_states=conditioning.states.to(dtype),
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
        ).sample
        factor = self._pipe.vae_scale_factor
        return self._pipe._unpack_latents(output, height * factor, width * factor, factor).squeeze(
            2
        )

    def sites(
        self,
        grid: int | None = None,
        latent_size: tuple[int, int] | None = None,
        layers: list[str] | None = None,
    ) -> dict[str, Site]:
        """Text columns come first."""
        height, width = (side // 2 for side in latent_size or self.latent_shape[1:])
        image = height * width
        return block_sites(
            self.denoiser,
            r"transformer_blocks\.\d+\.attn",
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
) -> QwenImage:
    """Load a base as it was saved. Args as `stable_diffusion.load`."""
    return QwenImage(flow.pipeline(path, LAYOUT, config, prediction, variant), str(path))
