"""What the families have in common that ask diffusers' own pipeline object: its prompts encoded,
its autoencoder, its words found in what it tokenises.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dreamblend.models.backbone import Backbone
from dreamblend.models.text import STOPWORDS, Offsets, Span, words_in

PLACE = "\u2603"  # stands for a prompt in a template; no template has it


class ThroughPipeline(Backbone):
    """A family behind a pipeline of diffusers.

    Args:
        pipe: the pipeline, all parts loaded.
        base: as the user named it.
        denoiser: what the pipeline calls it.
        trainable: text encoders that can be trained: those that its LoRA loader takes.
        others: text encoders that cannot.
    """

    def __init__(
        self,
        pipe: Any,
        base: str,
        denoiser: str = "transformer",
        trainable: Iterable[str] = (),
        others: Iterable[str] = (),
    ):
        super().__init__(
            {name: getattr(pipe, name) for name in (denoiser, *trainable)},
            pipe.vae,
            {name: part for name in others if (part := getattr(pipe, name)) is not None},
        )
        self._pipe, self.base, self.scheduler = pipe, base, pipe.scheduler

    @property
    def pipe(self) -> Any:
        """The pipeline over this view's modules."""
        pipe = copy.copy(self._pipe)
        pipe.__dict__.update(self._parts, vae=self.vae)
        return pipe

    # -- text
    def offsets(self, prompt: str) -> Offsets:
        """The place in the prompt of each text column that the denoiser sees; (0, 0) for ends,
        padding and what a template adds.
        """
        raise NotImplementedError

    def spans(self, prompt: str) -> list[Span]:
        return [
            Span(word, columns)
            for word, columns in self._words(prompt)
            if columns and word.lower() not in STOPWORDS
        ]

    def dropped_words(self, prompt: str) -> list[str]:
        return [word for word, columns in self._words(prompt) if not columns]

    def _words(self, prompt: str) -> list[tuple[str, tuple[int, ...]]]:
        """Every word with its columns; none for a word that is not seen to its end."""
        offsets, words = self.offsets(prompt), []
        for word, start, end in words_in(prompt):
            inside = tuple(i for i, (a, b) in enumerate(offsets) if a < end and b > start)
            whole = any(offsets[i][1] >= end for i in inside)
            words.append((word, inside if whole else ()))
        return words

    # -- images
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        scale, shift = self._scaling()
        return (posterior.mean - shift) * scale, posterior.std * scale

    def decode(self, latents: Tensor) -> Tensor:
        scale, shift = self._scaling()
        # the autoencoder's own dtype is the one it is safe in
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.to(self.vae.dtype) / scale + shift).sample

    def _scaling(self) -> tuple[float, float]:
        """Scale and shift of the latents; many autoencoders have no shift."""
        config = self.vae.config
        return config.scaling_factor, config.get("shift_factor") or 0.0


def offsets_of(
    tokenizer: Any, text: str, length: int, prompt: tuple[int, int] | None = None, **options: Any
) -> Offsets:
    """The places of the tokens of a text that is cut to `length` of them, ends included. Where the
    prompt is only a part of the text, its start and end: the places are those in the prompt.
    """
    options = {"truncation": True, "max_length": length, **options}
    places = tokenizer(text, return_offsets_mapping=True, **options).offset_mapping
    start, end = prompt or (0, len(text))
    inside = [a < end and b > start for a, b in places]
    return [
        (max(a, start) - start, min(b, end) - start) if here else (0, 0)
        for (a, b), here in zip(places, inside)
    ]


def place_in(template: Callable[[str], str], prompt: str) -> tuple[str, tuple[int, int]]:
    """A prompt in its template, and where it begins and ends there."""
    before = template(PLACE).index(PLACE)
    return template(prompt), (before, before + len(prompt))


def padded(offsets: Offsets, length: int) -> Offsets:
    """The places with as many more columns as are padded to `length`."""
    return offsets + [(0, 0)] * (length - len(offsets))
