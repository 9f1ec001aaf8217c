"""From tokens to words: where the tokens of a prompt's content words are, and the words' maps."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from dreamblend.attention.recording import Maps
from dreamblend.models import Backbone
from dreamblend.models.text import WORD

MOST_TOKENS = 128


def token_table(backbone: Backbone, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Where the content words' tokens are.

    Returns tokens (batch, n), positions padded with 0, and words (batch, words, n), 1 where a token
    is of a word; padding weighs nothing. Both sizes are those of the longest prompt that the text
    encoder takes, so that no prompt's sums are rounded in another way beside a longer one; but
    MOST_TOKENS at most, and words whose tokens come later have no map.
    """
    spans = [backbone.spans(p) for p in prompts]
    weighted = backbone.prompt_weighting is not None  # prompts of any length
    n = MOST_TOKENS if weighted else min(backbone.length, MOST_TOKENS)
    tokens, words = torch.zeros(len(prompts), n, dtype=torch.long), torch.zeros(len(prompts), n, n)
    for i, row in enumerate(spans):
        column = 0
        for j, span in enumerate(row):
            if column + len(span.tokens) > n:
                break
            for position in span.tokens:
                tokens[i, column], words[i, j, column] = position, 1
                column += 1
    return tokens, words


def subject_words(
    backbone: Backbone, prompts: list[str], identifier: str, class_noun: str, width: int
) -> Tensor:
    """(batch, width): which content words speak of the subject."""
    names = set(WORD.findall(f"{identifier} {class_noun}".lower()))
    rows = [
        [re.sub("['’]s$", "", span.word.lower()) in names for span in backbone.spans(p)]
        for p in prompts
    ]
    return torch.tensor([row + [False] * (width - len(row)) for row in rows])


def by_grid(maps: Maps) -> Tensor:
    """Mean over heads and sites: (batch, queries, tokens). The sites must share one grid."""
    sizes = {m.shape[2] for m in maps.values()}
    if len(sizes) != 1:
        raise ValueError(f"maps of different grids cannot be averaged: {sorted(sizes)} queries")
    return torch.stack([m.mean(1) for m in maps.values()]).mean(0)


def word_maps(maps: Maps, words: Tensor) -> Tensor:
    """Token maps (batch, heads, queries, tokens) of sites of one grid to the words' share of
    attention (batch, words, queries).
    """
    return words @ by_grid(maps).transpose(1, 2)
