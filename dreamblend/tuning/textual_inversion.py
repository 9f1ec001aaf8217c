"""Textual Inversion (Gal et al., 2022): a new word's embedding vectors alone."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dreamblend.errors import InputError
from dreamblend.models import Backbone
from dreamblend.storage.foreign import WORD
from dreamblend.storage.snapshots import Files
from dreamblend.tuning import words
from dreamblend.tuning.method import Method


class TextualInversion(Method):
    """Train vectors that stand for the identifier. They begin as the class noun's vector (the mean
    of its tokens').

    Args:
        vectors: how many; the identifier takes as many tokens of a prompt.
    """

    name = "textual-inversion"
    apart = True
    rates = {"sandbox": 5e-3, "sandbox-dit": 5e-3, "usual": 5e-4}
    text_encoder = True  # so prompts are encoded at every step; its weights are frozen

    def __init__(self, vectors: int = 1):
        if vectors < 1:
            raise InputError(f"model.tuning.vectors is {vectors}: it must be at least 1")
        self.vectors = vectors

    def attach(self, backbone: Backbone, identifier: str = "", class_noun: str = "") -> None:
        words.learn(backbone, identifier, class_noun, self.vectors)

    def trained(self, backbone: Backbone) -> dict[str, nn.Module]:
        return {"concept": words.learned(backbone)}

    def export(self, backbone: Backbone) -> Files:
        return {WORD: words.weights(words.learned(backbone))}

    @staticmethod
    def restore(
        path: Path, backbone: Backbone, name: str, identifier: str | None = None
    ) -> Backbone:
        return backbone.sharing(
            concept=words.read(path / WORD if path.is_dir() else path, backbone, identifier)
        )
