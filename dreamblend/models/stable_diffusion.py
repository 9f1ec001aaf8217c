"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention, epsilon or v
prediction.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamblend.errors import InputError
from dreamblend.models import pipelines, weighted_prompts
from dreamblend.models.backbone import Backbone, Site
from dreamblend.models.marks import Marks, check_prediction, predicting
from dreamblend.models.pipelines import Layout
from dreamblend.models.text import STOPWORDS, Conditioning, Offsets, Span, words_of
from dreamblend.models.unet import native_size, unet_sites
from dreamblend.models.weighted_prompts import Reader

LAYOUT = Layout(
    "Stable Diffusion 1.x and 2.x",
    ("StableDiffusionPipeline",),
    ("unet", "vae", "text_encoder"),
    variants=("StableDiffusionImg2ImgPipeline",),
    kinds=("v1", "v2"),
    within={"vae": "first_stage_model.", "text_encoder": "cond_stage_model."},
    options=dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False),
)


class StableDiffusion(Backbone):
    """Wraps the modules of diffusers' StableDiffusionPipeline."""

    def __init__(self, pipe, base: str):
        super().__init__({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, pipe.vae)
        self.base, self.scheduler, self.tokenizer = base, pipe.scheduler, pipe.tokenizer
        self.latent_shape, self.size = native_size(self.denoiser, self.vae, base)
        self.length = min(
            self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings
        )
        self.clip_layers = self.text_encoder.config.num_hidden_layers
        self.distilled = self.denoiser.config.time_cond_proj_dim is not None
        if self.distilled:
            self.untrainable = (
                "a distilled model, whose denoiser takes the guidance scale: this loss would undo"
                " that; train the model it was made from"
            )

    @property
    def pipe(self) -> Any:
        """The pipeline over this view's modules."""
        from diffusers import StableDiffusionPipeline

        parts = {**self._parts, "vae": self.vae, "tokenizer": self.tokenizer}
        return StableDiffusionPipeline(**parts, scheduler=self.scheduler, **LAYOUT.options)

    # -- text
    @property
    def text_encoder(self) -> Any:
        return self._parts["text_encoder"]

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return self._encode(prompts, self.clip_skip)

    def encode_negative(self, prompts: list[str]) -> Conditioning:
        """Of all layers, as in diffusers."""
        return self._encode(prompts, None)

    def _encode(self, prompts: list[str], clip_skip: int | None) -> Conditioning:
        self.activate()
        if self.prompt_weighting is not None:
            states = weighted_prompts.encode(self.readers(clip_skip), prompts)
            return self.guided(Conditioning(states), 1.0)
        encoder, rows = self.text_encoder, [self._tokens(p)[0] for p in prompts]
        rows = [
            row if len(row) <= self.length else [*row[: self.length - 1], row[-1]] for row in rows
        ]
        tokens = self.tokenizer.pad(
            {"input_ids": rows}, padding="max_length", max_length=self.length, return_tensors="pt"
        ).to(self.device)
        mask = tokens.attention_mask if self._hides_padding else None
        learned = (
            nullcontext(tokens.input_ids)
            if self.concept is None
            else self.concept.inside(encoder.get_input_embeddings(), tokens.input_ids)
        )
        with learned as ids:
            return self.guided(Conditioning(self._states(ids, mask, clip_skip)), 1.0)

    def _states(self, ids: Tensor, mask: Tensor | None, clip_skip: int | None) -> Tensor:
        encoder = self.text_encoder
        if clip_skip is None:
            return encoder(ids, attention_mask=mask).last_hidden_state
        layers = encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        inner = getattr(encoder, "text_model", encoder)
        return inner.final_layer_norm(layers[-(clip_skip + 1)])

    @property
    def _hides_padding(self) -> bool:
        return bool(getattr(self.text_encoder.config, "use_attention_mask", False))

    def readers(self, clip_skip: int | None = None) -> list[Reader]:
        states = partial(self._states, clip_skip=clip_skip)
        dtype = self.text_encoder.dtype
        return [
            Reader(self.tokenizer, states, self.length, self.device, dtype, not self._hides_padding)
        ]

    def embedding(self, words: str) -> Tensor:
        table = self.text_encoder.get_input_embeddings()
        ids = self.tokenizer(words, add_special_tokens=False).input_ids
        return table.weight[ids].detach().mean(0)

    def _tokens(self, prompt: str) -> tuple[list[int], Offsets]:
        """Token ids of a prompt of any length, and their places in it. A learned word's ids follow
        the vocabulary.
        """
        if self.concept is None:
            encoded = self.tokenizer(prompt, return_offsets_mapping=True, truncation=False)
            return encoded.input_ids, encoded.offset_mapping
        first = self.text_encoder.get_input_embeddings().num_embeddings
        ids, offsets = [self.tokenizer.bos_token_id], [(0, 0)]
        for start, end, learned in self.concept.split(prompt):
            if learned:
                ids += range(first, first + len(self.concept.vectors))
                offsets += [(start, end)] * len(self.concept.vectors)
                continue
            encoded = self.tokenizer(
                prompt[start:end],
                add_special_tokens=False,
                return_offsets_mapping=True,
                truncation=False,
            )
            ids += encoded.input_ids
            offsets += [(start + a, start + b) for a, b in encoded.offset_mapping]
        return [*ids, self.tokenizer.eos_token_id], [*offsets, (0, 0)]

    def _words(self, prompt: str) -> list[tuple[str, tuple[int, ...]]]:
        """Every word with the positions of its tokens; none for one that falls off the end."""
        if self.prompt_weighting is not None:
            return weighted_prompts.words(self.readers()[0], prompt)[0]
        return [
            (word, tokens if tokens[-1] < self.length - 1 else ())
            for word, tokens in words_of(prompt, self._tokens(prompt)[1])
        ]

    def spans(self, prompt: str) -> list[Span]:
        return [
            Span(word, tokens)
            for word, tokens in self._words(prompt)
            if tokens and word.lower() not in STOPWORDS
        ]

    def dropped_words(self, prompt: str) -> list[str]:
        return [word for word, tokens in self._words(prompt) if not tokens]

    # -- images
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        return (
            posterior.mean * self.vae.config.scaling_factor,
            posterior.std * self.vae.config.scaling_factor,
        )

    def decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(
            latents.device.type, enabled=False
        ):  # the autoencoder's own dtype is the one it is safe in
            return self.vae.decode(
                latents.to(self.vae.dtype) / self.vae.config.scaling_factor
            ).sample

    # -- denoising
    def guided(self, conditioning: Conditioning, scale: float) -> Conditioning:
        if not self.distilled:
            return conditioning
        from diffusers import StableDiffusionPipeline

        scales = torch.full(
            (len(conditioning.states),), scale - 1.0
        )  # no guidance is zero (Meng et al., CVPR 2023)
        embedding = StableDiffusionPipeline.get_guidance_scale_embedding(
            None, scales, self.denoiser.config.time_cond_proj_dim
        )
        return Conditioning(
            conditioning.states,
            {**conditioning.extras, "timestep_cond": embedding.to(conditioning.states.device)},
        )

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.activate()
        dtype = self.denoiser.dtype
        extras = {name: value.to(dtype) for name, value in conditioning.extras.items()}
        return self.denoiser(latents.to(dtype), t, conditioning.states.to(dtype), **extras).sample

    def sites(
        self,
        grid: int | None = None,
        latent_size: tuple[int, int] | None = None,
        layers: list[str] | None = None,
    ) -> dict[str, Site]:
        return unet_sites(
            self.denoiser, latent_size or self.latent_shape[1:], grid, layers, self.base
        )


# ------------------------------------------------------------------------------------------ loading
def load(
    path: Path,
    config: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
) -> StableDiffusion:
    """Load a base in fp32 through diffusers' own loaders.

    Args:
        path: a pipeline folder, or a single .safetensors file.
        config: for a single file, the hub id or folder of its configuration where diffusers cannot
            tell it.
        prediction: epsilon or v_prediction, instead of what the base says of itself.
        variant: of a folder's weights (`pipelines.weight_files`).
    """
    check_prediction(prediction)
    pipe = (
        _from_file(path, config, prediction)
        if path.is_file()
        else _from_folder(path, prediction, variant)
    )
    taken, made = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if taken != made:
        raise InputError(
            f"the base {path} takes {taken} channels and its latents have {made}: inpainting and"
            " depth models cannot be loaded"
        )
    return StableDiffusion(pipe, str(path))


def _from_folder(path: Path, prediction: str | None, variant: str | None) -> Any:
    scheduler = pipelines.scheduler_of(path)
    pipe = pipelines.load_folder(path, LAYOUT, variant, scheduler=scheduler)
    if prediction:
        predicted = pipe.scheduler.config.prediction_type
        if predicted != prediction:
            warnings.warn(
                f"{path} is taken as a model that predicts {prediction}, as model.base_prediction"
                f" says, and its own scheduler says {predicted}",
                stacklevel=2,
            )
        pipe.scheduler = predicting(pipe.scheduler, prediction)
    return pipe


def _from_file(path: Path, config: str | None, prediction: str | None) -> Any:
    folder = pipelines.config_folder(path, LAYOUT, config)
    marks = Marks.read(path)
    second = pipelines.kind_of(pipelines.shapes_of(path)) == "v2"
    predicted = marks.prediction(path, prediction)
    pipe = pipelines.load_file(path, LAYOUT, folder, scheduler=pipelines.scheduler_of(folder))
    usual = pipe.scheduler.config.prediction_type
    if predicted is None and second and config is None:
        warnings.warn(
            f"{path} does not say which Stable Diffusion 2 it is: it is taken as one of 768 pixels"
            " that predicts v; if it is of 512 pixels, set model.base_prediction to epsilon",
            stacklevel=2,
        )
    if predicted not in (None, usual) and config and not prediction:
        warnings.warn(
            f"{path} predicts {predicted} by its own marks ({', '.join(marks.predictions)}) and"
            f" {usual} by its configuration {config}: its marks count; set model.base_prediction if"
            " they are wrong",
            stacklevel=2,
        )
    if marks.zero_snr and (predicted or usual) == "epsilon" and not prediction:
        raise InputError(
            f"{path} was trained to zero terminal SNR (ztsnr), where epsilon cannot be predicted:"
            " set model.base_prediction to v_prediction"
        )
    pipe.scheduler = predicting(
        pipe.scheduler, predicted or usual, marks.zero_snr and prediction != "epsilon"
    )
    if config is None and (
        size := marks.size or (512 if second and predicted == "epsilon" else None)
    ):  # the base models of Stable Diffusion 2
        pipe.unet.register_to_config(
            sample_size=size // 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        )
    return pipe
