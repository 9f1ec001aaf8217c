"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreamblend.errors import InputError


def atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling, then rename it to `path`. Raises InputError where the disk refuses."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def save_text(text: str, path: Path) -> None:
    atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def save_png(image: Image.Image, path: Path, chunks: dict[str, str] | None = None) -> None:
    """A PNG with text chunks."""
    info = PngInfo()
    for key, value in (chunks or {}).items():
        info.add_itxt(key, value)
    atomically(path, lambda part: image.save(part, format="PNG", pnginfo=info))
