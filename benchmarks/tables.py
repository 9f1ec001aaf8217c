"""Tables in Markdown, in the terminal as in docs: of any rows, and all that a study's results
say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

from dreamblend.evaluation.measures import COMPARED
from dreamblend.report import beside
from dreamblend.report.figures import mean
from dreamblend.report.text import interval, number


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys, at least one, with columns of one width; `kind`, what a row is of, has
    no title. Numbers are as in the reports, and what is not known is an en dash.
    """
    names = list(rows[0])
    lines = [["" if name == "kind" else name for name in names]]
    lines += [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |"
        for line in lines
    )


def estimated(said: dict[str, Any] | None) -> str | None:
    """An estimate with its interval, as one cell."""
    return said and f"{number(said['value'])} ({interval(said)})"


def of_results(results: dict[str, Any]) -> str:
    """The answers to a study's questions, its fronts, how blends differ from the snapshots of
    their own run, every point, and the published numbers, in Markdown.
    """
    fronts = sorted(results["front"], key=lambda row: -row["measured"]["hypervolume"]["value"])
    tables = {
        "What was asked": _answers(results.get("questions", ())),
        "Fronts": [{"kind": row["name"], **_measured(row)} for row in fronts],
        "Blends over the snapshots of their own run": [
            {"kind": f"{row['a']} over {row['b']}", **_measured(row)} for row in results["sweep"]
        ],
        "Every snapshot and blend": [_point(point) for point in results["points"]],
        "Published": [
            {"kind": row["name"], **row["values"], "source": row["source"]}
            for row in beside(results)
        ],
    }
    return "\n\n".join(f"## {title}\n\n{markdown(rows)}" for title, rows in tables.items() if rows)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else number(value)


def _measured(row: dict[str, Any]) -> dict[str, str | None]:
    return {name: estimated(said) for name, said in row["measured"].items()}


def _answers(questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A question is named in the first of its rows."""
    asked = [row["question"] for row in questions]
    return [
        {
            "question": "" if row["question"] == before else row["question"],
            "of": row["of"],
            "value": row["value"],
            "95 %": interval(row),
        }
        for row, before in zip(questions, ["", *asked])
    ]


def _point(point: dict[str, Any]) -> dict[str, Any]:
    known = {m: None if isnan(value := mean(point, m)) else value for m in COMPARED}
    return {"kind": point["shown"], **known, "above the snapshots": estimated(point.get("above"))}
