"""Images and heat maps as data: URIs."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open

from dreamblend.storage.photos import FORMATS

PIXELS = 128  # an image up to this size is embedded as it is and shown pixel by pixel
_LARGEST = 384  # longest side of any other image
_THUMBNAIL = 96  # width of a heat map
# palette of a heat map: a third of the bytes of true colour, and no visible difference at this size
_COLOURS = 96

# Magma at nine even places (van der Walt and Smith, CC0): its lightness rises evenly, so it also
# reads in grey and in print.
MAGMA = (
    "#000004",
    "#1c1044",
    "#4f127b",
    "#812581",
    "#b5367a",
    "#e55064",
    "#fb8761",
    "#fec287",
    "#fcfdbf",
)
_ANCHORS = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in MAGMA], np.float32)


def open_image(path: Path) -> Image.Image | None:
    """The loaded image, or None where the file is absent or damaged."""
    try:
        image = Image.open(path, formats=FORMATS)
        image.load()
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ):  # what PIL raises for damaged files, by format
        return None
    return image


def is_small(image: Image.Image) -> bool:
    """Whether an image is shown pixel by pixel."""
    return max(image.size) <= PIXELS


def embed(path: Path, image: Image.Image) -> str:
    """`image`, read from `path`, as a data: URI of a sane size."""
    if is_small(image) and image.format in ("PNG", "JPEG", "WEBP"):
        return _uri(path.read_bytes(), image.format)
    small = ImageOps.exif_transpose(image).convert("RGB")
    small.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    return _encode(small, "JPEG", quality=88, optimize=True)


def read_maps(path: Path) -> dict[str, np.ndarray]:
    """word -> (h, w) fp32 map; empty where the file is absent or damaged. A word that comes twice
    is numbered.
    """
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="np") as file:
            words = json.loads((file.metadata() or {}).get("words", "[]"))
            maps = np.nan_to_num(file.get_tensor("maps").astype(np.float32))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}
    if maps.ndim != 3 or not maps.size or not isinstance(words, list):
        return {}
    named: dict[str, np.ndarray] = {}
    for i, one in enumerate(maps):
        word = str(words[i]) if i < len(words) else f"word {i + 1}"
        named[f"{word} ({i + 1})" if word in named else word] = one
    return named


def heat_maps(image: Image.Image, path: Path) -> list[dict[str, str]]:
    """The heat maps of an image from its file of maps: each word with its picture as a
    data: URI.
    """
    return [
        {"word": word, "source": heat_map(image, values)}
        for word, values in read_maps(path).items()
    ]


def heat_map(image: Image.Image, values: np.ndarray) -> str:
    """`values` (h, w) in colour over the dimmed grey image, as the data: URI of a small PNG.

    Scaled by the map's own maximum and not to its range: an even map must look even, which is what
    a collapse looks like.
    """
    width = min(_THUMBNAIL, image.width)
    size = (width, max(1, round(width * image.height / image.width)))
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BILINEAR), np.float32)[
        ..., None
    ]
    heat = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)).clip(0)
    heat = heat / max(float(heat.max()), 1e-12)
    alpha = (0.35 + 0.5 * heat)[..., None]
    mixed = alpha * magma(heat) + (1 - alpha) * 0.75 * grey
    picture = Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))
    return _encode(picture.quantize(_COLOURS, dither=Image.Dither.NONE), "PNG", optimize=True)


def magma(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as RGB in [0, 255], in a last axis of 3."""
    places = np.linspace(0, 1, len(_ANCHORS))
    return np.stack([np.interp(values, places, _ANCHORS[:, channel]) for channel in range(3)], -1)


def _encode(image: Image.Image, form: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return _uri(buffer.getvalue(), form)


def _uri(data: bytes, form: str) -> str:
    return f"data:image/{form.lower()};base64,{base64.b64encode(data).decode()}"
