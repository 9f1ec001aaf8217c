"""What the project asks of a model family. Nothing outside `models/` mentions a UNet, a CLIP
tokenizer or a scaling factor.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dreamblend.errors import InputError
from dreamblend.models import weighted_prompts
from dreamblend.models.noise import TrainingNoise, noise_of
from dreamblend.models.parts import Parts
from dreamblend.models.schedulers import understood
from dreamblend.models.text import Conditioning, Span
from dreamblend.models.weighted_prompts import Reader


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


def named(layers: list[str], patterns: list[str], base: str) -> list[str]:
    """Those of the layers that the patterns name, each by its own name or by that of a block that
    holds it; `*` stands for any text. Raises InputError for a pattern that names none.
    """
    found = {
        pattern: [
            layer
            for layer in layers
            if fnmatchcase(layer, pattern) or fnmatchcase(layer, f"{pattern}.*")
        ]
        for pattern in patterns
    }
    for pattern, of_pattern in found.items():
        if not of_pattern:
            raise InputError(
                f"{base} has no attention layer {pattern!r}: set `attention_layers` to some of"
                f" {', '.join(layers)}"
            )
    return [layer for layer in layers if any(layer in of_one for of_one in found.values())]


class Backbone(Parts, ABC):
    """A text-to-image diffusion model, as the project sees it: its modules, and what its family
    answers.
    """

    scheduler: Any  # of diffusers, as it was loaded
    base: str  # as the user named it
    size: int  # pixels of a side of its images
    length: int  # most columns of text that the denoiser sees; of a chunk, of weighted prompts
    latent_shape: tuple[int, int, int]  # channels, height, width
    multiple: int = 8  # of which the sides of images are
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # of the denoiser
    feed_forward: tuple[str, ...] = ("ff.net.0.proj", "ff.net.2")  # its other layers in blocks
    plain_timesteps: bool = True  # the denoiser is told its scheduler's timesteps as they are
    # the denoiser predicts once what two predictions made; a guidance scale may be its input
    distilled: bool = False
    prompt_first = False  # in a batch of its own pipeline, before the negative prompt
    mask_argument: str | None = None  # what its pipeline calls the mask of encoded prompts
    clip_layers: int | None = None  # of those encoders, where a prompt may leave some out
    clip_skip: int | None = None  # how many of the last it leaves out
    prompt_weighting: str | None = None  # how prompts are weighted and longer than the length
    untrainable: str | None = None  # why this base cannot be trained
    base_config: str | None = None  # for a single file, whose configuration it was loaded with
    source: Path | None = None  # the folder or file that it was read from
    variant: str | None = None  # of that folder's weights, as it was named

    @property
    def pipe(self) -> Any:
        """A pipeline of diffusers over this view's modules."""
        raise NotImplementedError

    def idle(self) -> dict[str, list[str]]:
        """Part -> its modules that change no prediction, as what they say is not asked for: no
        gradient reaches them, and they are not trained.
        """
        return {}

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

    def without_prompt(self, count: int) -> Conditioning:
        """What guidance leads away from: as many empty prompts."""
        return self.encode_negative([""] * count)

    def encode_negative(self, prompts: list[str]) -> Conditioning:
        """What guidance leads away from instead, where it is named: negative prompts."""
        return self.encode_prompts(prompts)

    def readers(self, clip_skip: int | None = None) -> list[Reader]:
        """The text encoders that weighted prompts go through; none where the family has no such
        prompts.
        """
        return []

    def columns(self, prompt: str) -> int:
        """How many columns of text a prompt has, alone in its batch."""
        if self.prompt_weighting is None:
            return self.length
        return weighted_prompts.words(self.readers()[0], prompt)[1]

    def matched(
        self, prompts: Conditioning, negative: Conditioning
    ) -> tuple[Conditioning, Conditioning]:
        """Prompts and negative ones with as many columns each, where they are weighted; as they are
        otherwise.
        """
        if self.prompt_weighting is None:
            return prompts, negative
        self.activate()
        columns = max(prompts.states.shape[1], negative.states.shape[1])
        return (
            weighted_prompts.padded(prompts, columns, self.readers(self.clip_skip)),
            weighted_prompts.padded(negative, columns, self.readers()),
        )

    # -- images
    @property
    def pixels_a_latent(self) -> int:
        """Pixels of a side that one latent stands for."""
        return self.size // self.latent_shape[1]

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """The height and width of the latents of an image of so many pixels. Raises InputError
        where they do not come out even.
        """
        if height % self.multiple or width % self.multiple:
            raise InputError(
                f"an image of {height} x {width} pixels cannot be drawn: both must be multiples of"
                f" {self.multiple}"
            )
        return height // self.pixels_a_latent, width // self.pixels_a_latent

    @abstractmethod
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (batch, 3, size, size) in [-1, 1] to the mean and standard deviation of latents
        (batch, *latent_shape).
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels in [-1, 1]."""

    # -- sampling
    def schedule(self, num_inference_steps: int, latent_size: tuple[int, int] | None = None) -> Any:
        """A copy of the scheduler, its timesteps set for latents of this height and width (the
        base's own where None). Raises InputError where they are too few for it.
        """
        scheduler = copy.deepcopy(self.scheduler)
        options = self.schedule_options(num_inference_steps, latent_size or self.latent_shape[1:])
        options = understood(scheduler, options)
        with np.errstate(invalid="ignore"):  # one step cannot be stretched to a last level
            scheduler.set_timesteps(num_inference_steps, device=self.device, **options)
        if not scheduler.timesteps.isfinite().all():
            raise InputError(
                f"num_inference_steps is {num_inference_steps}, and the {type(scheduler).__name__}"
                f" of {self.base} needs at least {num_inference_steps + 1}"
            )
        return scheduler

    def schedule_options(
        self, num_inference_steps: int, latent_size: tuple[int, int]
    ) -> dict[str, Any]:
        """What `set_timesteps` is told beside the number of steps."""
        return {}

    def predicts_twice(self, guidance_scale: float) -> bool:
        """Whether guidance takes two predictions. At a scale of 1 or below it takes the prompt's
        own, as in diffusers; a distilled model makes one.
        """
        return guidance_scale > 1 and not self.distilled

    def combine(self, unguided: Tensor, guided: Tensor, guidance_scale: float) -> Tensor:
        """The guided prediction of two: classifier-free guidance (Ho and Salimans, 2022)."""
        return unguided + guidance_scale * (guided - unguided)

    def training_noise(self) -> TrainingNoise:
        """What the denoiser is trained on."""
        return noise_of(self.scheduler)

    # -- denoising
    def guided(self, conditioning: Conditioning, scale: float) -> Conditioning:
        """The prompts with the guidance scale that a distilled denoiser takes as an input; as they
        are for any other.
        """
        return conditioning

    def framed(self, conditioning: Conditioning, frames: Tensor) -> Conditioning:
        """The prompts with what a denoiser is told of the images it is trained on; as they are for
        one that is told nothing.

        `frames` (batch, 6), in pixels: height and width of the photo, top and left of the part of
        it that the image shows, once it is scaled to cover the image, and the image's height and
        width.
        """
        return conditioning

    @abstractmethod
    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction (batch, *latent_shape) for noisy latents at timestep(s) t."""

    # -- attention
    @abstractmethod
    def sites(
        self,
        grid: int | None = None,
        latent_size: tuple[int, int] | None = None,
        layers: list[str] | None = None,
    ) -> dict[str, Site]:
        """The attention layers from image to text that are read, in the order they run, for latents
        of this height and width (the base's own where None). Only those of a grid of `grid` rows,
        if given; raises InputError where there are none.

        `layers` names which are read (`named`). Where None, it is all of a UNet and some in the
        middle of a transformer.
        """

    def default_grid(
        self, latent_size: tuple[int, int] | None = None, layers: list[str] | None = None
    ) -> int:
        """Rows of the grid whose maps are read where none is named: the nearest to a quarter of the
        latents' (the base's own where None) with more than one layer.

        A quarter is 16 x 16 in Stable Diffusion at 512 pixels, which the literature reads (Hertz et
        al., 2022; Chefer et al., 2023): coarser maps are of one layer, finer ones hardly tell the
        words apart.
        """
        latent_size = latent_size or self.latent_shape[1:]
        sites_of = Counter(site.height for site in self.sites(None, latent_size, layers).values())
        several = [grid for grid, count in sites_of.items() if count > 1] or list(sites_of)
        return min(several, key=lambda grid: (abs(math.log2(4 * grid / latent_size[0])), grid))
