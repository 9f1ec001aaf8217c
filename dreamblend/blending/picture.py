"""The decoded drawing of one prompt and seed: the image, each word's map, and their measures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dreamblend.attention import collapse
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import Drawing
from dreamblend.storage.files import atomically
from dreamblend.storage.photos import to_images
from dreamblend.storage.snapshots import DTYPES


@dataclass
class Reading:
    """What the attention of one image says."""

    words: list[str]
    maps: Tensor  # (words, height, width), each word's share of attention
    collapse: dict[str, float]
    distance: float | None  # of the maps to the reference's, where the blend is guided


@dataclass
class Picture:
    """One image, and its maps and measures (as `Reading`)."""

    prompt: str
    seed: int
    kind: str  # early, late, or the blend's name
    image: Image.Image
    words: list[str]
    maps: Tensor
    collapse: dict[str, float]
    distance: float | None
    dtype: str  # of the model that drew it
    flagged: bool = False  # by the base's safety checker

    def save_maps(self, path: Path) -> None:
        """Write the maps to a safetensors file that names their words, for heat maps."""
        words = {"words": json.dumps(self.words)}
        atomically(
            path, lambda part: save_file({"maps": self.maps.contiguous()}, part, metadata=words)
        )


def pictures(
    pairs: list[tuple[str, int]], batch: Batch, kind: str, drawing: Drawing
) -> list[Picture]:
    """Decode the drawings of the (prompt, seed) pairs that a batch begins with, and measure the
    collapse of each image's maps.

    A drawing that is not finite (NaN, or out of the range of half precision) gets no picture.
    """
    pixels = decoded(batch, drawing)
    finite = are_finite(pixels, drawing)
    images, read = to_images(pixels.nan_to_num().cpu()), readings(batch, drawing)
    flagged = flags(batch, images) or [False] * len(images)
    dtype = next(name for name, value in DTYPES.items() if value == batch.late.denoiser.dtype)
    return [
        Picture(prompt, seed, kind, images[i], **vars(read[i]), dtype=dtype, flagged=flagged[i])
        for i, (prompt, seed) in enumerate(pairs)
        if finite[i]
    ]


def decoded(batch: Batch, drawing: Drawing) -> Tensor:
    """The pixels (batch, 3, height, width) of a drawing, in fp32, about in [-1, 1]."""
    return batch.late.decode(drawing.latents).float()


def flags(batch: Batch, images: list[Image.Image]) -> list[bool] | None:
    """Which images the base's safety checker takes for unsafe; None where there is none."""
    return None if batch.late.safety is None else batch.late.safety.flags(images)


def are_finite(pixels: Tensor, drawing: Drawing) -> list[bool]:
    """Which images of a drawing are finite, and their maps and distances."""
    read = [pixels, drawing.maps] + ([] if drawing.distance is None else [drawing.distance])
    return torch.stack([torch.isfinite(x).reshape(len(x), -1).all(1) for x in read]).all(0).tolist()


def readings(batch: Batch, drawing: Drawing) -> list[Reading]:
    """The maps of each image of a drawing, and their collapse."""
    maps = drawing.maps.nan_to_num()
    measures = {
        name: value.tolist()
        for name, value in collapse.measure(maps, batch.mask, batch.subject).items()
    }
    of_word = maps.cpu().unflatten(2, batch.map_shape)
    distances = [None] * len(maps) if drawing.distance is None else drawing.distance.tolist()
    made = []
    for i, prompt in enumerate(batch.prompts):
        words = [span.word for span in batch.late.spans(prompt)]
        measured = {name: values[i] for name, values in measures.items()}
        made.append(Reading(words, of_word[i, : len(words)], measured, distances[i]))
    return made
