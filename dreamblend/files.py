"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError

from dreamblend.errors import InputError


def check_writable(folder: Path, setting: str = "--out") -> None:
    """Make `folder`. Raises InputError where nothing can be written into it; `setting` is what names it."""
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}; choose another {setting}") from error


def atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling, then rename it to `path`. Raises InputError where the disk refuses."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with suppress(OSError):  # also where its folder could not be made
            part.unlink(missing_ok=True)


def save_text(text: str, path: Path) -> None:
    """A text file; one that says the same already stays untouched."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def save_png(image: Image.Image, path: Path, chunks: dict[str, str] | None = None) -> None:
    """A PNG with text chunks."""
    info = PngInfo()
    for key, value in (chunks or {}).items():
        info.add_itxt(key, value)
    atomically(path, lambda part: image.save(part, format="PNG", pnginfo=info))
