"""Stable Diffusion XL (Podell et al., 2023): two CLIP text encoders side by side, a UNet with
cross-attention that is told its pooled prompt and its size.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamblend.models import pipelines, weighted_prompts
from dreamblend.models.backbone import Site
from dreamblend.models.marks import Marks, check_prediction, predicting
from dreamblend.models.pipelines import Layout
from dreamblend.models.text import Conditioning, Offsets
from dreamblend.models.through_pipeline import ThroughPipeline, offsets_of, padded
from dreamblend.models.unet import native_size, unet_sites
from dreamblend.models.weighted_prompts import Reader

LAYOUT = Layout(
    "Stable Diffusion XL",
    ("StableDiffusionXLPipeline",),
    ("unet", "vae", "text_encoder", "text_encoder_2"),
    ("tokenizer", "tokenizer_2"),
    variants=("StableDiffusionXLImg2ImgPipeline",),
    kinds=("xl_base",),
    within={
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    },
    options={"add_watermarker": False},
)


class SDXL(ThroughPipeline):
    """Wraps diffusers' StableDiffusionXLPipeline."""

    def __init__(self, pipe: Any, base: str):
        super().__init__(pipe, base, "unet", ("text_encoder", "text_encoder_2"))
        self.latent_shape, self.size = native_size(self.denoiser, self.vae, base)
        self.length = pipe.tokenizer.model_max_length
        # the last of them speaks in none
        self.clip_layers = min(e.config.num_hidden_layers for e in self.text_encoders.values()) - 1

    def idle(self) -> dict[str, list[str]]:
        """The denoiser sees the first encoder's last but one layer, and not its pooled end."""
        encoder = self.text_encoders["text_encoder"]
        last = encoder.config.num_hidden_layers - 1
        ends = (f"encoder.layers.{last}", "final_layer_norm")
        return {"text_encoder": [n for n, _ in encoder.named_modules() if n.endswith(ends)]}

    # -- text
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return self._encode(prompts, self.clip_skip)

    def encode_negative(self, prompts: list[str]) -> Conditioning:
        """Of all layers, as in diffusers."""
        return self._encode(prompts, None)

    def _encode(self, prompts: list[str], clip_skip: int | None) -> Conditioning:
        self.activate()
        weighted = self.prompt_weighting is not None
        states, _, pooled, _ = self.pipe.encode_prompt(
            [weighted_prompts.plain(p) for p in prompts] if weighted else list(prompts),
            device=self.device,
            do_classifier_free_guidance=False,
            clip_skip=clip_skip,
        )
        if weighted:  # the pooled prompt has no weights, and its first chunk
            states = weighted_prompts.encode(self.readers(clip_skip), prompts)
        return Conditioning(states, {"pooled": pooled})

    def readers(self, clip_skip: int | None = None) -> list[Reader]:
        pipe = self.pipe
        pairs = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
        return [
            Reader(
                tokenizer,
                partial(_layer, encoder, -2 - (clip_skip or 0)),
                self.length,
                self.device,
                encoder.dtype,
            )
            for tokenizer, encoder in pairs
        ]

    def without_prompt(self, count: int) -> Conditioning:
        empty = super().without_prompt(count)
        return (
            empty.map(torch.zeros_like) if self._pipe.config.force_zeros_for_empty_prompt else empty
        )

    def offsets(self, prompt: str) -> Offsets:
        """Both tokenizers give the same tokens; the encoders' channels lie side by side."""
        return padded(offsets_of(self._pipe.tokenizer, prompt, self.length), self.length)

    def _words(self, prompt: str) -> list[tuple[str, tuple[int, ...]]]:
        if self.prompt_weighting is None:
            return super()._words(prompt)
        return weighted_prompts.words(self.readers()[0], prompt)[0]

    # -- denoising
    def framed(self, conditioning: Conditioning, frames: Tensor) -> Conditioning:
        """As diffusers' train_dreambooth_lora_sdxl.py: the size of the original, its corner in a
        crop, the size asked for.
        """
        return Conditioning(conditioning.states, {**conditioning.extras, "time_ids": frames})

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.activate()
        dtype = self.denoiser.dtype
        if (frames := conditioning.extras.get("time_ids")) is None:
            height, width = (side * self.pixels_a_latent for side in latents.shape[2:])
            # of an original of this size, cut nowhere
            size = torch.tensor([height, width, 0, 0, height, width], device=latents.device)
            frames = size.expand(len(latents), -1)
        conditions = {
            "text_embeds": conditioning.extras["pooled"].to(dtype),
            "time_ids": frames.to(dtype),
        }
        return self.denoiser(
            latents.to(dtype), t, conditioning.states.to(dtype), added_cond_kwargs=conditions
        ).sample

    def sites(
        self,
        grid: int | None = None,
        latent_size: tuple[int, int] | None = None,
        layers: list[str] | None = None,
    ) -> dict[str, Site]:
        return unet_sites(
            self.denoiser, latent_size or self.latent_shape[1:], grid, layers, self.base
        )


def _layer(encoder: Any, layer: int, ids: Tensor, mask: Tensor | None) -> Tensor:
    return encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer]


def load(
    path: Path,
    config: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
) -> SDXL:
    """Load a base in fp32. Args as `stable_diffusion.load`."""
    check_prediction(prediction)
    if path.is_file():
        folder = pipelines.config_folder(path, LAYOUT, config)
        marks = Marks.read(path)
        pipe = pipelines.load_file(path, LAYOUT, folder, scheduler=pipelines.scheduler_of(folder))
        predicted = marks.prediction(path, prediction) or pipe.scheduler.config.prediction_type
        zero_snr = marks.zero_snr and prediction != "epsilon"
        pipe.scheduler = predicting(pipe.scheduler, predicted, zero_snr)
    else:
        scheduler = pipelines.scheduler_of(path)
        pipe = pipelines.load_folder(path, LAYOUT, variant, scheduler=scheduler)
        if prediction:
            pipe.scheduler = predicting(pipe.scheduler, prediction)
    return SDXL(pipe, str(path))
