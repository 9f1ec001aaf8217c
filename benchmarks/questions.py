"""The answers to a plan's questions, from the results of its run, as rows for the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dreamblend.evaluation.measures import title
from dreamblend.evaluation.outcome import above_sweep, said
from dreamblend.evaluation.statistics import difference, estimate

Answer = tuple[str, dict[str, Any]]  # of what, and the estimate

UNKNOWN = {"value": None, "interval": None}


def answers(questions: tuple[dict[str, Any], ...], results: dict, out: Path) -> list[dict]:
    """Rows of question, of (what), value and interval, one a question at least; the value is None
    where what a question needs was not measured.
    """
    rows = []
    for question in questions:
        found = list(KINDS[question["by"]](question, results, out)) or [("nothing", UNKNOWN)]
        rows += [{"question": question["ask"], "of": of, **estimate} for of, estimate in found]
    return rows


def change(question: dict[str, Any], results: dict, out: Path) -> Iterator[Answer]:
    """Of measures, from the base to the last snapshot of a method."""
    for family in results["front"]:
        if family["kind"] != "single" or family["name"] not in question.get(
            "methods", [family["name"]]
        ):
            continue
        points = [p for p in results["points"] if p["name"] in family["points"]]
        base, last = (sorted(points, key=lambda p: p["dial"])[i] for i in (0, -1))
        for measure in question["of"]:
            ends = [[of.get(measure) for of in p["means"].values()] for p in (last, base)]
            known = not any(value is None for end in ends for value in end)
            yield (
                f"{family['name']}, {title(measure)}, step {last['dial']} less the base",
                said(difference(*ends)) if known else UNKNOWN,
            )


def sweep(question: dict[str, Any], results: dict, out: Path) -> Iterator[Answer]:
    """Of blends, over the snapshots of their own run."""
    kinds = {family["name"]: family["kind"] for family in results["front"]}
    for row in results["sweep"]:
        if kinds[row["a"]] in question["of"]:
            for measure, estimate in row["measured"].items():
                yield f"{row['a']} over {row['b']}, {measure}", estimate


def settings(question: dict[str, Any], results: dict, out: Path) -> Iterator[Answer]:
    """Of each setting of a blend, the intervals together as sure as one alone."""
    points = [p for p in results["points"] if p["kind"] in question["of"]]
    for point in points:
        curve = [
            p for p in results["points"] if p["kind"] == "single" and p["method"] == point["method"]
        ]
        found = above_sweep(
            point, curve, results["subjects"], level=1 - 0.05 / len(points), resamples=20_000
        )
        yield point["shown"], said(found)


def regret(question: dict[str, Any], results: dict, out: Path) -> Iterator[Answer]:
    """Of the picked pair, on the same subjects."""
    path = out / "selection.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    regrets = [row["regret"] for row in rows if row["kind"] in results["subjects"]]
    whole = len(regrets) == len(results["subjects"])
    yield "share of what the best pair is worth", said(estimate(regrets)) if whole else UNKNOWN
    if whole:
        yield "the same at worst, without an interval", {**UNKNOWN, "value": float(np.max(regrets))}


KINDS: dict[str, Callable[[dict[str, Any], dict, Path], Iterator[Answer]]] = {
    "change": change,
    "sweep": sweep,
    "settings": settings,
    "regret": regret,
}
