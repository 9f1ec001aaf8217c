"""FLUX.2 and FLUX.2 klein (Black Forest Labs, 2025): a language model's inner layers as text, joint
attention, latents in patches of 2 x 2.
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
    "FLUX.2 and FLUX.2 klein",
    ("Flux2KleinPipeline", "Flux2Pipeline"),
    ("transformer", "vae", "text_encoder"),
    kinds=("flux-2-dev",),
    as_saved=True,
)
TRAINED_AT = 3.5  # the guidance scale of training, as in diffusers' script


class Flux2(ThroughPipeline):
    """Wraps diffusers' Flux2KleinPipeline and Flux2Pipeline."""

    multiple = 16
    plain_timesteps = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")

    feed_forward = ("linear_in", "linear_out")  # those of single blocks are in their attention's

    def __init__(self, pipe: Any, base: str):
        super().__init__(pipe, base, others=("text_encoder",))
        side = pipe.default_sample_size // 2
        self.latent_shape = (self.denoiser.config.in_channels, side, side)
        self.size = 2 * side * pipe.vae_scale_factor
        self.length = pipe.tokenizer_max_length
        self.klein = type(pipe).__name__ == "Flux2KleinPipeline"
        self.takes_scale = self.denoiser.config.guidance_embeds
        self.distilled = self.takes_scale or bool(pipe.config.get("is_distilled"))
        if self.distilled and not self.takes_scale:
            self.untrainable = (
                "a klein distilled to a few steps, which training would undo: train its base"
            )

    # -- text
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        self.activate()
        states, ids = self.pipe.encode_prompt(
            list(prompts), device=self.device, max_sequence_length=self.length
        )
        return self.guided(Conditioning(states, {"text_ids": ids.to(states.device)}), TRAINED_AT)

    def offsets(self, prompt: str) -> Offsets:
        tokenizer = self._pipe.tokenizer
        text, place = place_in(self._templated, prompt)
        # a multimodal processor holds its tokenizer
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        options = {} if self.klein else {"add_special_tokens": False}
        return offsets_of(tokenizer, text, self.length, place, padding="max_length", **options)

    def _templated(self, prompt: str) -> str:
        """As the pipelines write it into their chats."""
        if self.klein:
            chat, options = [{"role": "user", "content": prompt}], {"enable_thinking": False}
        else:
            from diffusers.pipelines.flux2.pipeline_flux2 import format_input

            (chat,), options = format_input([prompt], self._pipe.system_message), {}
        return self._pipe.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=self.klein, **options
        )

    # -- images: latents are patches, normalised by the statistics of a batch norm
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        mean, deviation = self._statistics()
        patches = [self._pipe._patchify_latents(x) for x in (posterior.mean, posterior.std)]
        return (patches[0] - mean) / deviation, patches[1] / deviation

    def decode(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics()
        with torch.autocast(latents.device.type, enabled=False):
            patches = latents.to(self.vae.dtype) * deviation + mean
            return self.vae.decode(self._pipe._unpatchify_latents(patches)).sample

    def _statistics(self) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        deviation = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        mean, deviation = (x.to(self.device) for x in (norm.running_mean, deviation))
        return mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)

    # -- sampling
    def schedule_options(
        self, num_inference_steps: int, latent_size: tuple[int, int]
    ) -> dict[str, Any]:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return {
            "sigmas": flow.even_sigmas(num_inference_steps),
            "mu": compute_empirical_mu(latent_size[0] * latent_size[1], num_inference_steps),
        }

    def guided(self, conditioning: Conditioning, scale: float) -> Conditioning:
        return flow.told_scale(conditioning, scale) if self.takes_scale else conditioning

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.activate()
        dtype, guidance = self.denoiser.dtype, conditioning.extras.get("guidance")
        output = self.denoiser(
            # (batch, channels, h, w) -> (batch, h w, channels)
            hidden_states=latents.to(dtype).flatten(2).transpose(1, 2),
            timestep=t.expand(len(latents)).to(dtype) / 1000,
            guidance=guidance,
            encoder_hidden_states=conditioning.states.to(dtype),
            txt_ids=conditioning.extras["text_ids"],
            img_ids=self._pipe._prepare_latent_ids(latents).to(latents.device),
        ).sample
        return output[:, : latents[0, 0].numel()].transpose(1, 2).reshape(latents.shape)

    def sites(
        self,
        grid: int | None = None,
        latent_size: tuple[int, int] | None = None,
        layers: list[str] | None = None,
    ) -> dict[str, Site]:
        """Text columns come first, in double and in single blocks."""
        height, width = latent_size or self.latent_shape[1:]
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
) -> Flux2:
    """Load a base as it was saved. Args as `stable_diffusion.load`."""
    return Flux2(flow.pipeline(path, LAYOUT, config, prediction, variant), str(path))
