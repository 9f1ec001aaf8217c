"""Files that appear complete or not at all."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError

from dreamblend.errors import InputError


def check_writable(folder: Path, setting: str = "--out") -> None:
    """Make `folder`. Raises InputError where nothing can be written into it; `setting` is what
    names it.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another machine may have a process of this number
    except OSError as error:
        raise InputError(
            f"cannot write into {folder}: {error.strerror}; choose another {setting}"
        ) from error


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary sibling, then rename it to `path`; a file that says the same
    already stays untouched.

    Raises InputError where the disk refuses.
    """
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        if not (path.is_file() and filecmp.cmp(part, path, shallow=False)):
            os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    finally:
        with suppress(OSError):  # also where its folder could not be made
            part.unlink(missing_ok=True)


@contextmanager
def whole(path: Path, other: str = "another --out") -> Iterator[Path]:
    """Where to make a file or folder that appears at `path` once the block is done, or not at all.
    `other` is what an error tells a user to name where something is there.

    Raises InputError where something is there already, or the disk refuses.
    """
    if path.exists():
        raise InputError(f"{path} exists already: name {other}, or remove it")
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.rename(part, path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def save_text(text: str, path: Path) -> None:
    """A text file."""
    atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def save_png(image: Image.Image, path: Path, chunks: dict[str, str] | None = None) -> None:
    """A PNG with text chunks."""
    info = PngInfo()
    for key, value in (chunks or {}).items():
        info.add_itxt(key, value)
    atomically(path, lambda part: image.save(part, format="PNG", pnginfo=info))


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`; no other process can hold it at the same time. Yields whether it
    is held: with `wait` always, without it only if no other process holds it.

    Where there can be no lock (a folder that cannot be written, a file system without locks) every
    process gets it at once. The guarded work is then done more than once, and must allow for that.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError):
        pass
    try:
        yield True
    finally:
        lock.release()


def hold(folder: Path, share: int = 0, shares: int = 1) -> ExitStack:
    """Hold a folder that one process writes, or one's share of it, until the stack is closed or the
    process ends.

    Raises InputError where another process holds it, or others divide it into another number of
    shares. Two that begin at the same moment with different numbers may both be refused.
    """

    def name(i: int, n: int) -> str:
        return ".lock" if n == 1 else f".lock-{i}-of-{n}"

    mine, held = folder / name(share, shares), ExitStack()
    taken = not held.enter_context(locked(mine, wait=False))
    for other in () if taken else folder.glob(".lock*"):
        if other.name != name(share, shares) and not (
            shares > 1 and other.name.endswith(f"-of-{shares}")
        ):
            with locked(other, wait=False) as free:
                taken = taken or not free
    if taken:
        held.close()
        raise InputError(
            f"another process is writing into {folder}: wait for it, or choose another --out"
        )
    return held
