"""What a model family says of prompts: encoded, and which tokens are which words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
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
    embeddings, sizes).
    """

    states: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return Conditioning(self.states[rows], {k: v[rows] for k, v in self.extras.items()})

    def map(self, f: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(f(self.states), {k: f(v) for k, v in self.extras.items()})

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        extras = {k: torch.cat([p.extras[k] for p in parts]) for k in parts[0].extras}
        return Conditioning(torch.cat([p.states for p in parts]), extras)


@dataclass(frozen=True)
class Span:
    """One content word of a prompt and the positions of its tokens."""

    word: str
    tokens: tuple[int, ...]


Offsets = list[tuple[int, int]]  # the place of each token in its prompt; (0, 0) for ends


def words_of(prompt: str, offsets: Offsets) -> list[tuple[str, tuple[int, ...]]]:
    """Every word of a prompt with the positions of its tokens."""
    found = []
    for match in WORD.finditer(MARKS.sub(lambda mark: " " * len(mark[0]), prompt)):
        inside = tuple(
            i for i, (a, b) in enumerate(offsets) if a < match.end() and b > match.start()
        )
        if inside:
            found.append((match[0], inside))
    return found
