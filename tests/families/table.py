"""What each family can do, by the tests that hold it: `python -m tests.families.table` writes the
table into docs/families.md.

A test says so by its marker, `@pytest.mark.holds("maps", "region")`, or `refuses` where it shows
that the family refuses. Which family, a parameter of the test says that is its name in FAMILIES; a
test of one family alone names it: `holds("select", of="stable_diffusion")`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "families.md"
MARKS = ("<!-- table of tests -->", "<!-- end of the table of tests -->")

ROWS = {
    "stable_diffusion": "Stable Diffusion 1.x, 2.x",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3, 3.5",
    "flux_dev": "FLUX.1-dev",
    "flux_schnell": "FLUX.1-schnell",
    "flux2": "FLUX.2",
    "klein_base": "FLUX.2 klein base",
    "klein": "FLUX.2 klein",
    "qwen_image": "Qwen-Image",
    "z_image": "Z-Image",
    "z_image_turbo": "Z-Image Turbo",
    "sana": "Sana",
    "pixart_sigma": "PixArt-Sigma",
}
COLUMNS = (
    *("load", "single file", "train LoRA", "train full", "snapshot in diffusers"),
    *("LoRA files", "equals pipeline", "maps", "region", "CAG", "select", "device, bf16"),
)
Cells = dict[tuple[str, str], dict[str, bool]]  # family, column -> tests, and which of them refuse


class _Collector:
    """Keeps what pytest has collected."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def collect(files: Iterable[Path]) -> list[pytest.Item]:
    """The tests in `files`, heavy ones too. None is run."""
    collector = _Collector()
    options = ["--collect-only", "-m", "", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    with redirect_stdout(StringIO()) as said:
        code = pytest.main([*options, *map(str, files)], plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"the tests cannot be collected:\n{said.getvalue()}")
    return collector.items


def cells(items: Iterable[pytest.Item]) -> Cells:
    """Which tests hold which cell, in the order they were collected."""
    found: Cells = {}
    for item in items:
        parameters = getattr(item, "callspec", None)
        values = list(parameters.params.values()) if parameters else []
        for mark in item.iter_markers():
            if mark.name not in ("holds", "refuses"):
                continue
            of = mark.kwargs.get("of")
            families = [of] if of else [v for v in values if isinstance(v, str) and v in ROWS]
            if len(families) != 1 or families[0] not in ROWS or not {*mark.args} <= {*COLUMNS}:
                raise ValueError(f"{item.nodeid}: its mark {mark.name}{mark.args} is of no cell")
            test = item.nodeid.split("[")[0]
            for column in mark.args:
                tests = found.setdefault((families[0], column), {})
                tests[test] = mark.name == "refuses"
    return found


def table(found: Cells) -> str:
    """The table in Markdown, and under it the tests that its numbers are of."""
    numbers: dict[str, int] = {}
    lines = [
        f"| | {' | '.join(COLUMNS)} |",
        f"| --- |{' --- |' * len(COLUMNS)}",
    ]
    for family, title in ROWS.items():
        row = []
        for column in COLUMNS:
            tests = found.get((family, column), {})
            held = [numbers.setdefault(test, len(numbers) + 1) for test in tests]
            text = ", ".join(map(str, held)) or "no"
            row.append(f"refused: {text}" if any(tests.values()) else text)
        lines.append(f"| {title} | {' | '.join(row)} |")
    lines += ["", *(f"{number}. `{test}`" for test, number in numbers.items())]
    return "\n".join(lines)


def current() -> str:
    """The page with the table of today's tests."""
    marked = re.compile(r"mark\.(holds|refuses)\(")
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    held = table(cells(collect(p for p in tests if marked.search(p.read_text(encoding="utf-8")))))
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    return f"{before}{MARKS[0]}\n{held}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


if __name__ == "__main__":
    PAGE.write_text(current(), encoding="utf-8")
