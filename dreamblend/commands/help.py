"""The help of a command, kept in a cache: it lists Lightning's options, and Lightning takes seconds
to import.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from importlib.metadata import version
from io import StringIO
from pathlib import Path

from dreamblend.errors import InputError
from dreamblend.storage.files import save_text

PACKAGE = Path(__file__).resolve().parents[1]


def show(command: str, run: Callable[[], None]) -> None:
    """Print the help of `command`: what `run` prints, or the cached text if neither the sources nor
    the libraries have changed since.
    """
    state = _state()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = cache / "dreamblend" / f"{command}-help.txt"
    try:
        known, text = kept.read_text(encoding="utf-8").split("\n", 1)
    except (OSError, ValueError):
        known = None
    if known != state:
        output = StringIO()
        with redirect_stdout(output), suppress(SystemExit):  # argparse exits after the help
            run()
        text = output.getvalue()
        with suppress(InputError):  # the home folder may be read-only
            save_text(f"{state}\n{text}", kept)
    print(text, end="")


def _state() -> str:
    """What the text depends on: sources, libraries, the program's name, the terminal's width."""
    sources = sorted(PACKAGE.rglob("*.py"))
    parts = [f"{path} {path.stat().st_mtime_ns}" for path in sources]
    parts += [version(name) for name in ("torch", "lightning", "jsonargparse", "docstring-parser")]
    parts += [sys.version, sys.argv[0], str(shutil.get_terminal_size().columns)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
