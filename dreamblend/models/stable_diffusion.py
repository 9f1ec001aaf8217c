"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention, epsilon or v prediction."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from dreamblend.errors import InputError
from dreamblend.models.backbone import STOPWORDS, WORD, Backbone, Conditioning, Span

PIPELINE = "StableDiffusionPipeline"


class StableDiffusion(Backbone):
    """Wraps the modules of diffusers' StableDiffusionPipeline."""

    def __init__(self, pipe, base: str):
        super().__init__()
        self.base, self.scheduler = base, pipe.scheduler
        self.denoiser, self.vae, self.text_encoders, self.tokenizer = pipe.unet, pipe.vae, [pipe.text_encoder], pipe.tokenizer
        for module in self.modules():
            module.requires_grad_(False).eval()
        side = self.denoiser.config.sample_size
        self.latent_shape = (self.denoiser.config.in_channels, side, side)
        self.size = side * 2 ** (len(self.vae.config.block_out_channels) - 1)

    # -- text
    @property
    def length(self) -> int:
        return min(self.tokenizer.model_max_length, self.text_encoders[0].config.max_position_embeddings)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        self.activate()
        tokens = self.tokenizer(prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt").to(self.device)
        mask = tokens.attention_mask if getattr(self.text_encoders[0].config, "use_attention_mask", False) else None
        return Conditioning(self.text_encoders[0](tokens.input_ids, attention_mask=mask).last_hidden_state)

    def _words(self, prompt: str) -> list[tuple[str, tuple[int, ...]]]:
        """Every word with the positions its tokens would have in a prompt of any length."""
        offsets = self.tokenizer(prompt, return_offsets_mapping=True, truncation=False).offset_mapping
        words = []
        for match in WORD.finditer(prompt):
            inside = tuple(i for i, (a, b) in enumerate(offsets) if a < match.end() and b > match.start())
            if inside:
                words.append((match[0], inside))
        return words

    def spans(self, prompt: str) -> list[Span]:
        return [
            Span(word, tokens) for word, tokens in self._words(prompt) if word.lower() not in STOPWORDS and tokens[-1] < self.length - 1
        ]

    def dropped_words(self, prompt: str) -> list[str]:
        return [word for word, tokens in self._words(prompt) if tokens[-1] >= self.length - 1]

    # -- images
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        return posterior.mean * self.vae.config.scaling_factor, posterior.std * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample

    # -- denoising
    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.activate()
        dtype = self.denoiser.dtype
        return self.denoiser(latents.to(dtype), t, conditioning.states.to(dtype)).sample

    def sites(self, grid: int | None = None) -> dict[str, int]:
        side, levels = self.latent_shape[1], len(self.denoiser.config.block_out_channels)
        found = {}
        for name, _ in self.denoiser.named_modules():
            if not name.endswith(".attn2"):
                continue
            part, number = name.split(".")[0], name.split(".")[1]
            level = {"down_blocks": lambda: int(number), "mid_block": lambda: levels - 1, "up_blocks": lambda: levels - 1 - int(number)}[part]()
            found[name] = side // 2**level
        order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
        found = dict(sorted(found.items(), key=lambda item: order[item[0].split(".")[0]]))
        chosen = {name: g for name, g in found.items() if grid is None or g == grid}
        if not chosen:
            raise InputError(f"no attention site of grid {grid} in {self.base}: it has {sorted(set(found.values()))}; set `grid` to one of them")
        return chosen

    # -- weights
    def enable_gradient_checkpointing(self) -> None:
        self.denoiser.enable_gradient_checkpointing()
        for encoder in self.text_encoders:
            encoder.gradient_checkpointing_enable()

    def replaced(self, **modules: nn.Module) -> StableDiffusion:
        other = copy.copy(self)
        other._active = {"adapters": None}
        other.denoiser = modules.get("denoiser", self.denoiser)
        other.text_encoders = [modules.get("text_encoder", self.text_encoders[0])]
        for module in (other.denoiser, *other.text_encoders):
            module.requires_grad_(False).eval().to(self.device, self.denoiser.dtype)
        return other


def load(base: str, config: str | None = None) -> StableDiffusion:
    """Load a base in fp32 through diffusers' own loaders.

    Args:
        base: a hub id, a pipeline folder, or a single .safetensors file.
        config: for a single file, the hub id or folder of its configuration where diffusers cannot tell it.
    """
    import diffusers
    import transformers
    from diffusers import StableDiffusionPipeline

    options = dict(safety_checker=None, dtype=torch.float32)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    try:
        if Path(base).is_file():
            pipe = StableDiffusionPipeline.from_single_file(base, config=config, **options)
        else:
            pipe = StableDiffusionPipeline.from_pretrained(base, requires_safety_checker=False, feature_extractor=None, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot load the base {base!r}: {str(error).splitlines()[0]}") from error
    return StableDiffusion(pipe, base)
