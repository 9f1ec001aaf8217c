"""A learned word of a backbone, and its file: what Textual Inversion and Custom Diffusion have in common."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from dreamblend.errors import InputError
from dreamblend.models import Backbone
from dreamblend.models.concept import Concept
from dreamblend.snapshots import Weights


def learn(backbone: Backbone, identifier: str, like: str, vectors: int = 1) -> None:
    """Give a backbone the identifier as a word of its own, to be trained; each of its vectors begins as `like`."""
    name = identifier.removeprefix("<").removesuffix(">")
    if not name or name.split() != [name] or set(name) & set("<>/\\"):
        raise InputError(f"data.identifier is {identifier!r}: a word to be learned is one word without spaces, brackets and slashes, such as sks")
    start = backbone.embedding(like)
    if not start.isfinite().all():  # no token at all
        raise InputError(f"the text encoder of {backbone.base} knows nothing of {like!r}, from which the learned word would begin: name another")
    backbone.concept = Concept(name, start.repeat(vectors, 1)).requires_grad_(True)


def weights(concept: Concept) -> Weights:
    """{"<sks>": vectors (n, channels)}, which diffusers' `load_textual_inversion` reads."""
    return Weights({concept.placeholder: concept.vectors})


def read(path: Path, backbone: Backbone) -> Concept:
    """The word in a file of diffusers' layout: one tensor, (channels,) or (n, channels), under the word's name."""
    try:
        ((word, vectors),) = load_file(path).items()
    except (OSError, SafetensorError, ValueError) as error:
        reason = "it holds more than one tensor" if isinstance(error, ValueError) else str(error)
        raise InputError(f"cannot read the learned word {path}: {reason}; use a file that diffusers' load_textual_inversion reads") from error
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    channels = backbone.embedding("a").shape[0]
    if vectors.ndim != 2 or vectors.shape[1] != channels:
        shape = tuple(vectors.shape)
        raise InputError(f"the word {word} in {path} has vectors {shape}, and {backbone.base} takes {channels} channels: name its own base")
    return Concept(word, vectors.to(backbone.device, backbone.denoiser.dtype))
