"""A learned word of a backbone, and its file: what Textual Inversion and Custom Diffusion have in
common.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from dreamblend.errors import InputError
from dreamblend.models import Backbone
from dreamblend.models.learned_token import LearnedToken
from dreamblend.storage.snapshots import Weights

NAMELESS = ("emb_params", "clip_l")  # what files call the vectors of any word


def learn(backbone: Backbone, identifier: str, like: str, vectors: int = 1) -> None:
    """Give a backbone the identifier as a new word, to be trained; each of its vectors begins as
    the embedding of `like`.
    """
    name = identifier.removeprefix("<").removesuffix(">")
    if not name or name.split() != [name] or set(name) & set("<>/\\"):
        raise InputError(
            f"data.identifier is {identifier!r}: a word to be learned is one word without spaces,"
            " brackets and slashes, such as sks"
        )
    start = backbone.embedding(like)
    if not start.isfinite().all():  # no token at all
        raise InputError(
            f"the text encoder of {backbone.base} knows nothing of {like!r}, with which the learned"
            " word would begin: name another word"
        )
    backbone.concept = LearnedToken(name, start.repeat(vectors, 1)).requires_grad_(True)


def learned(backbone: Backbone) -> LearnedToken:
    """The word that `learn` gave to a backbone."""
    assert backbone.concept is not None  # a method that learns a word attaches it first
    return backbone.concept


def weights(concept: LearnedToken) -> Weights:
    """{"<sks>": vectors (n, channels)}, which diffusers' `load_textual_inversion` reads."""
    return Weights({concept.placeholder: concept.vectors})


def read(path: Path, backbone: Backbone, identifier: str | None = None) -> LearnedToken:
    """The word in a file: vectors, (channels,) or (n, channels), under the word's name, as
    diffusers' textual_inversion.py writes it.

    Files of other tools call every word `emb_params` (AUTOMATIC1111, kohya) or `clip_l`: they hold
    the identifier, or without one the word that the file is named after. Raises InputError where
    the file names another word than the identifier, as no prompt would use it.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the learned word {path}: {error}") from error
    if "clip_g" in tensors:
        raise InputError(
            f"{path} is a word of SDXL, with vectors for two text encoders (clip_l and clip_g), and"
            f" {backbone.base} has one: learn the word on this base"
        )
    if len(tensors) != 1:
        raise InputError(
            f"cannot read the learned word {path}: it holds {len(tensors)} tensors"
            f" ({', '.join(sorted(tensors)[:3])}...) and not one"
        )
    ((key, vectors),) = tensors.items()
    word = (identifier or path.stem) if key in NAMELESS else key
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    channels = backbone.embedding("a").shape[0]
    if vectors.ndim != 2 or vectors.shape[1] != channels:
        shape = tuple(vectors.shape)
        raise InputError(
            f"the word {word} in {path} has vectors {shape}, and {backbone.base} takes {channels}"
            " channels: name its own base"
        )
    dtype = next(backbone.denoiser.parameters()).dtype
    concept = LearnedToken(word, vectors.to(backbone.device, dtype))
    if identifier and not concept.is_called(identifier):
        raise InputError(
            f"the word in {path} is {concept.word!r}, and prompts would say {identifier!r}: name it"
            f" with --model.identifier {concept.word}"
        )
    return concept
