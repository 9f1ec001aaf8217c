"""Prompts that are encoded once and taken by their text."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dreamblend.models import Backbone, Conditioning

BATCH = 16  # prompts that are encoded together


class EncodedPrompts:
    """What a backbone makes of prompts. The empty text stands for a prompt left out: it is what
    guidance leads away from, and so need not be an encoded "".

    Differentiable in the text encoders' weights.
    """

    def __init__(self, backbone: Backbone, prompts: Iterable[str]):
        texts = list(dict.fromkeys(prompts))
        said, dropped = [text for text in texts if text], [text for text in texts if not text]
        parts = [
            backbone.encode_prompts(said[start : start + BATCH])
            for start in range(0, len(said), BATCH)
        ]
        parts += [backbone.without_prompt(1) for _ in dropped]
        self._rows = {text: row for row, text in enumerate([*said, *dropped])}
        self._conditioning = parts[0] if len(parts) == 1 else Conditioning.cat(parts)

    def __getitem__(self, prompts: list[str]) -> Conditioning:
        """One row a prompt."""
        rows = [self._rows[prompt] for prompt in prompts]
        return self._conditioning[torch.tensor(rows, device=self._conditioning.states.device)]
