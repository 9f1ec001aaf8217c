"""A learned word: vectors that stand for it in a prompt, beside a text encoder's vocabulary and not
in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LearnedToken(nn.Module):
    """The embedding vectors of one word.

    The encoder's own table is never touched: ids from the end of its vocabulary on mean these
    vectors, which take their places in the table's answer while a prompt is encoded. So no other
    row can move, and views of one encoder differ in their words.

    Args:
        word: as prompts write it, with or without the brackets of diffusers' placeholders (`sks`,
            `<sks>`), in any case.
        vectors: (n, channels); the word takes n tokens of a prompt.
    """

    def __init__(self, word: str, vectors: Tensor):
        super().__init__()
        self.word = word.removeprefix("<").removesuffix(">")
        self.vectors = nn.Parameter(vectors.clone())

    @property
    def placeholder(self) -> str:
        """Its name in files, in diffusers' convention; never a word of a vocabulary, which
        diffusers would refuse.
        """
        return f"<{self.word}>"

    def is_called(self, word: str) -> bool:
        """Whether prompts that write `word` mean this one."""
        return list(self.split(word)) == [
            (0, 0, False),
            (0, len(word), True),
            (len(word), len(word), False),
        ]

    def split(self, prompt: str) -> Iterator[tuple[int, int, bool]]:
        """The prompt in parts (start, end, whether it is this word)."""
        start = 0
        for match in re.finditer(
            rf"(?<!\w)<?{re.escape(self.word)}>?(?!\w)", prompt, re.IGNORECASE
        ):
            yield start, match.start(), False
            yield match.start(), match.end(), True
            start = match.end()
        yield start, len(prompt), False

    @contextmanager
    def inside(self, table: nn.Embedding, ids: Tensor) -> Iterator[Tensor]:
        """Within the block `table` answers for the vectors' ids too. Yields the ids (batch, tokens)
        to ask it for.
        """
        mine = ids >= table.num_embeddings

        def substitute(_: nn.Module, __: tuple, rows: Tensor) -> Tensor:
            return torch.where(
                mine[..., None],
                self.vectors[(ids - table.num_embeddings).clamp(min=0)].to(rows.dtype),
                rows,
            )

        handle = table.register_forward_hook(substitute)
        try:
            yield ids.masked_fill(mine, 0)
        finally:
            handle.remove()
