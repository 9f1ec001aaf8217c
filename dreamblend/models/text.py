"""What a model family says of prompts: encoded, and which tokens are which words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = re.compile(
    r"\w[\w\u0300-\u036f]*(?:['’-]\w[\w\u0300-\u036f]*)*"
)  # mug's and teddy-bear are one; é may be e and an accent
# Of the weights, schedules and adapters that other tools read in a prompt, such as (mug:1.3),
# [a:b:0.5] and <lora:name:0.8>, what is no word
MARKS = re.compile(
    r"<(?:lora|lyco|locon|hypernet):[^>]*>|(?<=[^\d\s(\[]):\s*\d*\.?\d+\s*(?=[)\]])", re.IGNORECASE
)
# Words that carry no content of their own: their maps are neither guided nor measured.
STOPWORDS = frozenset(
    "a an the of on in at and or to with by for from is are its it this that next near photo"
    " picture image front".split()
)


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: token states (batch, tokens, channels) and what else a family needs (pooled
    embeddings, sizes). `mask` among the extras is (batch, tokens): which are no padding.
    """

    states: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return Conditioning(self.states[rows], {k: v[rows] for k, v in self.extras.items()})

    def map(self, f: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(f(self.states), {k: f(v) for k, v in self.extras.items()})

    @staticmethod
    def of_each(states: list[Tensor]) -> Conditioning:
        """One batch of the token states of each prompt, (tokens, channels)."""
        masks = [torch.ones(1, len(one), device=one.device) for one in states]
        return Conditioning.cat(
            [Conditioning(one[None], {"mask": mask}) for one, mask in zip(states, masks)]
        )

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        """One batch of several. Prompts of another number of tokens are padded, which their masks
        say.
        """
        longest = max(p.states.shape[1] for p in parts)
        states = [F.pad(p.states, (0, 0, 0, longest - p.states.shape[1])) for p in parts]
        extras = {name: [p.extras[name] for p in parts] for name in parts[0].extras}
        if "mask" in extras:
            extras["mask"] = [F.pad(mask, (0, longest - mask.shape[1])) for mask in extras["mask"]]
        return Conditioning(torch.cat(states), {k: torch.cat(v) for k, v in extras.items()})


@dataclass(frozen=True)
class Span:
    """One content word of a prompt and the positions of its tokens."""

    word: str
    tokens: tuple[int, ...]


Offsets = list[tuple[int, int]]  # the place of each token in its prompt; (0, 0) for ends


def words_in(prompt: str) -> list[tuple[str, int, int]]:
    """Every word of a prompt with its start and its end."""
    plain = MARKS.sub(lambda mark: " " * len(mark[0]), prompt)
    return [(match[0], match.start(), match.end()) for match in WORD.finditer(plain)]


def words_of(prompt: str, offsets: Offsets) -> list[tuple[str, tuple[int, ...]]]:
    """Every word of a prompt with the positions of its tokens."""
    words = []
    for word, start, end in words_in(prompt):
        inside = tuple(i for i, (a, b) in enumerate(offsets) if a < end and b > start)
        if inside:
            words.append((word, inside))
    return words
