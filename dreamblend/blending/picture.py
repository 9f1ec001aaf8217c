"""What a blend drew for one prompt and seed, decoded: the image, each word's map, and what was
measured of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dreamblend.attention import collapse
from dreamblend.blending.batch import Task
from dreamblend.blending.blends import Drawn
from dreamblend.storage.files import atomically
from dreamblend.storage.photos import to_images
from dreamblend.storage.snapshots import DTYPES


@dataclass
class Picture:
    """One image, and what was read while it was drawn."""

    prompt: str
    seed: int
    kind: str  # early, late, or the blend's name
    image: Image.Image
    words: list[str]
    maps: Tensor  # (words, grid, grid), each word's share of attention
    collapse: dict[str, float]
    distance: float | None  # of the maps to the reference's, where the blend is guided
    dtype: str  # in which it was drawn

    def save_maps(self, path: Path) -> None:
        """Write the maps to a safetensors file that names their words, for heat maps."""
        words = {"words": json.dumps(self.words)}
        atomically(
            path, lambda part: save_file({"maps": self.maps.contiguous()}, part, metadata=words)
        )


def pictures(pairs: list[tuple[str, int]], task: Task, kind: str, drawn: Drawn) -> list[Picture]:
    """Decode what was drawn for the (prompt, seed) pairs that a task begins with, and measure the
    collapse of each image's own maps.

    What is not finite (NaN, or out of the range of half precision) has no picture.
    """
    pixels = task.late.decode(drawn.latents).float()
    read = [pixels, drawn.maps] + ([] if drawn.distance is None else [drawn.distance])
    finite = (
        torch.stack([torch.isfinite(x).reshape(len(x), -1).all(1) for x in read]).all(0).tolist()
    )
    images, maps = to_images(pixels.nan_to_num().cpu()), drawn.maps.nan_to_num()
    measures = {
        name: value.tolist()
        for name, value in collapse.measure(maps, task.mask, task.subject).items()
    }
    maps, distances = (
        maps.cpu().unflatten(2, (task.grid, -1)),
        ([None] * len(images) if drawn.distance is None else drawn.distance.tolist()),
    )
    dtype = next(
        name
        for name, value in DTYPES.items()
        if value == next(task.late.denoiser.parameters()).dtype
    )
    found = []
    for i, (prompt, seed) in enumerate(pairs):
        if finite[i]:
            words = [span.word for span in task.late.spans(prompt)]
            measured = {name: values[i] for name, values in measures.items()}
            found.append(
                Picture(
                    prompt,
                    seed,
                    kind,
                    images[i],
                    words,
                    maps[i, : len(words)],
                    measured,
                    distances[i],
                    dtype,
                )
            )
    return found
