"""The table of what each family can do is that of the tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from families import FAMILIES, table


def test_every_family_has_its_row():
    assert set(FAMILIES) | {"stable_diffusion"} == set(table.ROWS)


def test_the_page_shows_the_marks_of_todays_tests():
    assert table.PAGE.read_text(encoding="utf-8") == table.current(), "run make families-table"


def item(test: str, *marks, **parameters) -> SimpleNamespace:
    """What pytest collects, as far as the table asks."""
    return SimpleNamespace(
        nodeid=f"{test}[x]",
        callspec=SimpleNamespace(params=parameters),
        iter_markers=lambda: (mark.mark for mark in marks),
    )


def test_a_cell_without_a_test_says_no_and_a_refusal_says_so():
    holds, refuses = pytest.mark.holds("maps", "region"), pytest.mark.refuses("train LoRA")
    items = [item("a", holds, name="sana"), item("b", refuses, name="klein", size=64)]
    found = table.cells(items)
    assert found == {
        ("sana", "maps"): {"a": False},
        ("sana", "region"): {"a": False},
        ("klein", "train LoRA"): {"b": True},
    }
    written = table.table(found)
    rows = {line.split(" | ")[0]: line for line in written.splitlines()}
    assert (
        rows["| Sana"].count("| 2") == 2 and rows["| Sana"].count("| no") == len(table.COLUMNS) - 2
    )
    assert "| refused: 1 |" in rows["| FLUX.2 klein"]
    assert written.endswith("1. `b`\n2. `a`")


@pytest.mark.parametrize(
    "mark, parameters",
    [
        (pytest.mark.holds("mpas"), {"name": "sana"}),
        (pytest.mark.holds("maps"), {"name": "nobody"}),
        (pytest.mark.holds("maps", of="nobody"), {}),
        (pytest.mark.holds("maps"), {"early": "sana", "late": "klein"}),
    ],
)
def test_a_mark_of_no_cell_is_an_error(mark, parameters):
    with pytest.raises(ValueError, match="of no cell"):
        table.cells([item("a", mark, **parameters)])
