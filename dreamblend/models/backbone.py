"""What the project asks of a model family. Nothing outside `models/` mentions a UNet, a CLIP
tokenizer or a scaling factor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from dreamblend.errors import InputError
from dreamblend.models.parts import Parts
from dreamblend.models.text import Conditioning, Span


@dataclass(frozen=True)
class Site:
    """An attention layer whose image-to-text map is read: the grid of its image rows, and where
    these and the text's columns lie in its queries and keys.

    In cross-attention the rows are all of the image and the columns all of the text; in joint
    attention each is a part of one sequence.
    """

    height: int
    width: int
    rows: slice = field(default_factory=partial(slice, None))
    columns: slice = field(default_factory=partial(slice, None))


class Backbone(Parts, ABC):
    """A text-to-image diffusion model, as the project sees it: its modules, and what its family
    answers.
    """

    scheduler: Any  # of diffusers; `denoise` predicts what its prediction_type says
    base: str  # as the user named it
    size: int  # pixels of a side of its images
    length: int  # tokens of the longest prompt, its ends included
    latent_shape: tuple[int, int, int]  # channels, height, width
    # the guidance scale is an input of the denoiser, which predicts once what two predictions made
    # (LCM)
    distilled: bool = False
    base_config: str | None = None  # for a single file, whose configuration it was loaded with

    # -- text
    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Token states of `prompts`. Differentiable in the text encoders' weights."""

    @abstractmethod
    def spans(self, prompt: str) -> list[Span]:
        """The content words of a prompt that fit its length, with their token positions in
        `Conditioning.states`.
        """

    @abstractmethod
    def dropped_words(self, prompt: str) -> list[str]:
        """The words that fall off the end of a prompt longer than the text encoder takes."""

    def embedding(self, words: str) -> Tensor:
        """(channels,): the mean of the words' own token embeddings, from which a learned word
        begins.
        """
        raise InputError(
            f"{self.base} is of a family that cannot learn a word yet: use another tuning method,"
            " such as LoRA"
        )

    # -- images
    @abstractmethod
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (batch, 3, size, size) in [-1, 1] to the mean and standard deviation of latents
        (batch, *latent_shape).
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels in [-1, 1]."""

    # -- denoising
    def guided(self, conditioning: Conditioning, scale: float) -> Conditioning:
        """The prompts with the guidance scale that a distilled denoiser takes as an input; as they
        are for any other.
        """
        return conditioning

    @abstractmethod
    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction (batch, *latent_shape) for noisy latents at timestep(s) t."""

    # -- attention
    @abstractmethod
    def sites(self, grid: int | None = None) -> dict[str, Site]:
        """The attention layers from image to text, in the order they run. Only those of a grid of
        `grid` rows, if given; raises InputError where there are none.
        """

    def default_grid(self) -> int:
        """Rows of the grid whose maps are read where none is named: the nearest to a quarter of the
        latents' with more than one layer.

        A quarter is 16 x 16 in Stable Diffusion at 512 pixels, which the literature reads (Hertz et
        al., 2022; Chefer et al., 2023): coarser maps are of one layer, finer ones hardly tell the
        words apart.
        """
        layers = Counter(site.height for site in self.sites().values())
        several = [grid for grid, count in layers.items() if count > 1] or list(layers)
        return min(
            several, key=lambda grid: (abs(math.log2(4 * grid / self.latent_shape[1])), grid)
        )
