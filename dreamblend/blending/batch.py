"""What a blend is asked for: a batch of (prompt, seed) pairs, the models to draw them with, and
where the words' tokens are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from dreamblend.attention.recording import Maps
from dreamblend.attention.words import subject_words, token_table
from dreamblend.models import Backbone, Conditioning
from dreamblend.sampling import Predictor, calls, classifier_free, initial_noise


@dataclass
class Task:
    """A batch of (prompt, seed) pairs as the blends see it."""

    early: Backbone
    late: Backbone
    merged: Callable[[float], Backbone]  # weight of the late snapshot -> interpolated weights
    prompts: list[str]
    noise: Tensor  # (batch, channels, height, width)
    tokens: Tensor  # (batch, n) positions of the content words' tokens, padded with 0
    words: Tensor  # (batch, words, n) which tokens make up which word
    subject: Tensor  # (batch, words) which words speak of the subject
    steps: int
    scale: float  # of classifier-free guidance
    grid: int  # side of the sites whose maps are read
    seeds: list[int] | None = None  # of the noise, for schedulers that add more of it
    guided: range = range(0)  # the steps whose reference maps the blend wants
    reference: dict[int, Maps] = field(default_factory=dict)  # step -> the early snapshot's maps

    @classmethod
    def of(
        cls,
        early: Backbone,
        late: Backbone,
        merged: Callable[[float], Backbone],
        pairs: list[tuple[str, int]],
        identifier: str,
        class_noun: str,
        steps: int,
        scale: float,
        grid: int,
    ) -> Task:
        """The task of drawing (prompt, seed) pairs of a subject: noise from the seeds, on the
        models' device.
        """
        prompts, seeds = [p for p, _ in pairs], [s for _, s in pairs]
        tokens, words = token_table(
            late, prompts
        )  # a learned word may take other tokens than in the base
        subject = subject_words(late, prompts, identifier, class_noun, words.shape[1])
        noise = initial_noise(late.latent_shape, seeds)
        return cls(
            early,
            late,
            merged,
            prompts,
            *(x.to(late.device) for x in (noise, tokens, words, subject)),
            steps,
            scale,
            grid,
            seeds,
        )

    @property
    def mask(self) -> Tensor:
        """(batch, words): which are words, and not padding."""
        return self.words.amax(2).bool()

    @property
    def weights(self) -> Tensor:
        """(batch, n): 1 for the token of a content word, 0 for padding."""
        return self.words.amax(1)

    @property
    def calls(self) -> int:
        """How often the models are asked, which is more than `steps` with some schedulers. Blends
        count steps in these.
        """
        return calls(self.late.scheduler, self.steps)

    def encode(self, model: Backbone) -> tuple[Conditioning, Conditioning]:
        """The prompts, and as many empty ones."""
        return model.guided(model.encode_prompts(self.prompts), self.scale), model.encode_prompts(
            [""] * len(self.prompts)
        )

    def predictor(self, model: Backbone) -> Predictor:
        return classifier_free(model, *self.encode(model), self.scale)
