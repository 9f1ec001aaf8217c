"""What a blend has to draw: a batch of (prompt, seed) pairs, the models to draw them with, and the
positions of the words' tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from dreamblend.attention.words import subject_words, token_table
from dreamblend.blending.models import Models
from dreamblend.blending.prompts import without_identifier
from dreamblend.models import Backbone, Conditioning, Site
from dreamblend.sampling import (
    Halves,
    Predictor,
    Random,
    combined,
    initial_noise,
    sample,
)


@dataclass
class Batch:
    """A batch of (prompt, seed) pairs as the blends see it."""

    models: Models
    prompts: list[str]
    noise: Tensor  # (batch, channels, height, width)
    tokens: Tensor  # (batch, n) positions of the content words' tokens, padded with 0
    words: Tensor  # (batch, words, n) which tokens make up which word
    subject: Tensor  # (batch, words) which words name the subject
    num_inference_steps: int
    guidance_scale: float
    grid: int  # rows of the sites whose maps are read
    layers: list[str] | None = None  # that are read (`Backbone.sites`)
    seeds: list[int] | None = None  # of the noise, for schedulers that add more of it
    generator: Random | None = None  # instead of seeds (`sample`)
    # (latents, timestep, call number) -> latents, after each call of the model
    after: Callable[[Tensor, Tensor, int], Tensor] | None = None
    interrupted: Callable[[], bool] | None = None  # whether to end (`sample`)
    # what guidance leads away from, for all prompts or each; an empty prompt where None
    negative_prompt: str | list[str] | None = None
    guidance_rescale: float = 0.0  # (`classifier_free`)
    embeds: Conditioning | None = None  # the prompts encoded, for both models
    negative_embeds: Conditioning | None = None  # likewise what guidance leads away from
    # pixels (1, 3, height, width) in [-1, 1] that guide instead of what the early snapshot draws
    reference: Tensor | None = None
    identifier: str = ""
    class_noun: str = ""

    @classmethod
    def of(
        cls,
        models: Models,
        pairs: list[tuple[str, int]],
        identifier: str,
        class_noun: str,
        num_inference_steps: int,
        guidance_scale: float,
        grid: int | None = None,
        size: tuple[int, int] | None = None,
        layers: list[str] | None = None,
        noise: Tensor | None = None,
        generator: Random | None = None,
        negative_prompt: str | list[str] | None = None,
        guidance_rescale: float = 0.0,
        embeds: Conditioning | None = None,
        reference: Tensor | None = None,
        negative_embeds: Conditioning | None = None,
    ) -> Batch:
        """The batch that draws (prompt, seed) pairs of a subject: noise from the seeds, on the
        models' device. The grid, the size (height and width in pixels) and the layers that are read
        are the model's own where None.

        Where `noise` (batch, channels, height, width) is given, the seeds and the size do not
        count, and `generator` is what made it, if anything.
        """
        prompts, seeds = [p for p, _ in pairs], [s for _, s in pairs]
        late = models.late  # a learned word may take other tokens than in the base
        tokens, words = token_table(late, prompts)
        subject = subject_words(late, prompts, identifier, class_noun, words.shape[1])
        own_seeds = seeds if noise is None else None
        if noise is None:
            channels, *sides = late.latent_shape
            noise = initial_noise((channels, *(late.latent_size(*size) if size else sides)), seeds)
        return cls(
            models=models,
            prompts=prompts,
            noise=noise.to(late.device),
            tokens=tokens.to(late.device),
            words=words.to(late.device),
            subject=subject.to(late.device),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            grid=grid or late.default_grid((noise.shape[2], noise.shape[3]), layers),
            layers=layers,
            seeds=own_seeds,
            generator=generator,
            negative_prompt=negative_prompt,
            guidance_rescale=guidance_rescale,
            embeds=embeds,
            reference=reference,
            identifier=identifier,
            class_noun=class_noun,
            negative_embeds=negative_embeds,
        )

    @property
    def early(self) -> Backbone:
        return self.models.early

    @property
    def late(self) -> Backbone:
        return self.models.late

    @property
    def mask(self) -> Tensor:
        """(batch, words): which are words, and not padding."""
        return self.words.amax(2).bool()

    @property
    def weights(self) -> Tensor:
        """(batch, n): 1 for the token of a content word, 0 for padding."""
        return self.words.amax(1)

    @cached_property
    def calls(self) -> int:
        """How often the models are called, which is more than the inference steps with some
        schedulers. Blends count steps in calls.
        """
        return len(self.schedule().timesteps)

    @property
    def latent_size(self) -> tuple[int, int]:
        """(height, width) of the latents."""
        return self.noise.shape[2], self.noise.shape[3]

    def schedule(self) -> Any:
        """The scheduler, its timesteps set for this batch."""
        return self.late.schedule(self.num_inference_steps, self.latent_size)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The attention layers whose maps are read. Found once: every step asks for them."""
        return self.late.sites(self.grid, self.latent_size, self.layers)

    @property
    def map_shape(self) -> tuple[int, int]:
        """(height, width) of a word's map."""
        site = next(iter(self.sites.values()))
        return site.height, site.width

    def encode(self, model: Backbone) -> tuple[Conditioning, Conditioning]:
        """The prompts, and as many negative or empty ones."""
        encoded = self.embeds or model.encode_prompts(self.prompts)
        prompts = model.guided(encoded, self.guidance_scale)
        if self.negative_embeds is not None:
            return model.matched(prompts, self.negative_embeds)
        negative, count = self.negative_prompt, len(self.prompts)
        if negative is None:
            return model.matched(prompts, model.without_prompt(count))
        negative = [negative] * count if isinstance(negative, str) else negative
        return model.matched(prompts, model.encode_negative(negative))

    def predictor(self, model: Backbone) -> Predictor:
        both = self.halves(model, *self.encode(model))
        return lambda z, t, step: self.combined(model, *both(z, t))

    def halves(self, model: Backbone, prompts: Conditioning, negative: Conditioning) -> Halves:
        """What guidance combines of a model, for prompts that are encoded."""
        return Halves(model, prompts, negative, self.guidance_scale)

    def combined(self, model: Backbone, unguided: Tensor | None, guided: Tensor) -> Tensor:
        """A model's guided prediction of both halves (`sampling.combined`)."""
        return combined(model, unguided, guided, self.guidance_scale, self.guidance_rescale)

    # -- the same pairs, drawn otherwise
    @property
    def unguided(self) -> Batch:
        """Drawn without guidance: each prediction is the prompt's own. A distilled model has its
        guidance inside, and keeps it.
        """
        if self.late.distilled:
            return self
        return replace(
            self,
            guidance_scale=0.0,
            negative_prompt=None,
            negative_embeds=None,
            guidance_rescale=0.0,
        )

    @cached_property
    def of_class(self) -> Batch:
        """With the class prompts: "a sks mug on a beach" is "a mug on a beach"."""
        prompts = [without_identifier(prompt, self.identifier) for prompt in self.prompts]
        tokens, words = token_table(self.late, prompts)
        subject = subject_words(self.late, prompts, "", self.class_noun, words.shape[1])
        device = self.late.device
        return replace(
            self,
            prompts=prompts,
            tokens=tokens.to(device),
            words=words.to(device),
            subject=subject.to(device),
            embeds=None,
        )

    def sample(
        self,
        predict: Predictor,
        adjust: Callable[[Tensor, Tensor, int, object], Tensor] | None = None,
        calls: int | None = None,
    ) -> Tensor:
        """Denoise the batch's noise to latents (batch, channels, height, width), with so many calls
        of the model; with all of them where None.
        """
        return sample(
            predict,
            self.noise,
            self.schedule(),
            adjust,
            self.seeds,
            generator=self.generator,
            after=self.after,
            calls=calls,
            interrupted=self.interrupted,
        )
