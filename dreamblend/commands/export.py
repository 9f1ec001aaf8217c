"""`export`: write snapshots for other tools."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from dreamblend.export.command import export
from dreamblend.options import Parser, arranged


def main() -> None:
    """Run it."""
    auto_cli(
        export,
        args=arranged(sys.argv[2:]),
        as_positional=False,
        prog=f"{Path(sys.argv[0]).name} export",
        parser_class=Parser,
    )
