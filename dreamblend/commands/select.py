"""`select`: pick the early and the late snapshot of a run."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from dreamblend.options import Parser, arranged
from dreamblend.selection.command import select


def main() -> None:
    """Run it."""
    auto_cli(
        select,
        args=arranged(sys.argv[2:]),
        as_positional=False,
        prog=f"{Path(sys.argv[0]).name} select",
        parser_class=Parser,
    )
