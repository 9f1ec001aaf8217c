"""Stable Diffusion 3 and 3.5 (Esser et al., 2024): two CLIP encoders and T5, joint attention of
image and text, a rectified flow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dreamblend.models import flow
from dreamblend.models.backbone import Site
from dreamblend.models.blocks import block_sites
from dreamblend.models.noise import TrainingNoise, noise_of
from dreamblend.models.pipelines import Layout
from dreamblend.models.text import Conditioning, Offsets
from dreamblend.models.through_pipeline import ThroughPipeline, offsets_of, padded

LAYOUT = Layout(
    "Stable Diffusion 3",
    ("StableDiffusion3Pipeline",),
    ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    ("tokenizer", "tokenizer_2", "tokenizer_3"),
    optional=("text_encoder_3",),
    variants=("StableDiffusion3Img2ImgPipeline",),
    kinds=("sd3", "sd35_large", "sd35_medium"),
    within={
        "vae": "first_stage_model.",
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.clip_g.",
        "text_encoder_3": "text_encoders.t5xxl.",
    },
    as_saved=True,
)
T5 = 256  # columns of T5, as the pipeline has them; fewer where its tokenizer knows fewer


class SD3(ThroughPipeline):
    """Wraps diffusers' StableDiffusion3Pipeline."""

    multiple = 16
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )

    feed_forward = (
        *("ff.net.0.proj", "ff.net.2"),
        *("ff_context.net.0.proj", "ff_context.net.2"),
    )

    def __init__(self, pipe: Any, base: str):
        super().__init__(
            pipe, base, "transformer", ("text_encoder", "text_encoder_2"), ("text_encoder_3",)
        )
        side = self.denoiser.config.sample_size
        self.latent_shape = (self.denoiser.config.in_channels, side, side)
        self.size = side * pipe.vae_scale_factor
        self.clip = pipe.tokenizer_max_length  # columns of CLIP, which come first
        tokenizer = pipe.tokenizer_3
        self.t5 = T5 if tokenizer is None else min(T5, tokenizer.model_max_length)
        self.length = self.clip + self.t5

    # -- text
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        self.activate()
        states, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.t5,
        )
        return Conditioning(states, {"pooled": pooled})

    def offsets(self, prompt: str) -> Offsets:
        """A word has columns of CLIP and of T5; without T5 its columns are zeros."""
        first = padded(offsets_of(self._pipe.tokenizer, prompt, self.clip), self.clip)
        if self._pipe.text_encoder_3 is None:
            return padded(first, self.length)
        return first + padded(offsets_of(self._pipe.tokenizer_3, prompt, self.t5), self.t5)

    # -- sampling
    def schedule_options(
        self, num_inference_steps: int, latent_size: tuple[int, int]
    ) -> dict[str, Any]:
        return flow.shift_options(self.scheduler, latent_size[0] * latent_size[1] // 4)

    def training_noise(self) -> TrainingNoise:
        """The loss is of the clean image, which the flow's error times sigma is (diffusers'
        `precondition_outputs`); the timesteps are logit-normal.
        """
        return flow.logit_normal(noise_of(self.scheduler))

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.activate()
        dtype = self.denoiser.dtype
        return self.denoiser(
            hidden_states=latents.to(dtype),
            timestep=t.expand(len(latents)),
            encoder_hidden_states=conditioning.states.to(dtype),
            pooled_projections=conditioning.extras["pooled"].to(dtype),
        ).sample

    def sites(
        self,
        grid: int | None = None,
        latent_size: tuple[int, int] | None = None,
        layers: list[str] | None = None,
    ) -> dict[str, Site]:
        """Image rows come first. A second attention of the image alone (`attn2`) is none."""
        height, width = (side // 2 for side in latent_size or self.latent_shape[1:])
        image = height * width
        return block_sites(
            self.denoiser,
            r"transformer_blocks\.\d+\.attn",
            (height, width),
            grid,
            layers,
            self.base,
            rows=slice(0, image),
            columns=slice(image, None),
        )


def load(
    path: Path,
    config: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
) -> SD3:
    """Load a base as it was saved. Args as `stable_diffusion.load`."""
    return SD3(flow.pipeline(path, LAYOUT, config, prediction, variant), str(path))
