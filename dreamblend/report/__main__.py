"""`python -m dreamblend.report OUT`: the report of a blend's folder or of a benchmark's, made again
from what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dreamblend.cli import entry
from dreamblend.errors import InputError
from dreamblend.report import write_comparison, write_report


@entry
def main() -> None:
    """Write a report again from what a folder holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the --out of blend.py, or of a benchmark")
    out = parser.parse_args().out
    if (out / "results.json").is_file():
        print(write_comparison(out).resolve())
    elif (out / "results.jsonl").is_file():
        print(write_report(out).resolve())
    else:
        raise InputError(
            f"{out} holds neither results.jsonl of a blend nor results.json of a benchmark: name"
            " the --out of one"
        )


if __name__ == "__main__":
    main()
