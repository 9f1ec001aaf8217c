"""Numbers, settings and snapshots as short text."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def is_number(value: Any) -> bool:
    """A finite number; JSON's null, NaN, texts, booleans and integers that no float holds
    are not.
    """
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


def number(value: Any) -> str:
    """Three decimals, or two digits below 0.01; an en dash for what is no number."""
    if not is_number(value):
        return "–"
    if isinstance(value, int) or value == 0:
        return str(int(value))
    if abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def interval(estimate: dict[str, Any]) -> str:
    """The ends of an estimate's interval; an en dash where it has none."""
    ends = estimate.get("interval")
    return f"{number(ends[0])} to {number(ends[1])}" if ends else "–"


def setting(value: Any) -> str:
    """A setting as a user would write it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(setting, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def step_of(snapshot: str | None, known: Iterable[dict[str, Any]] = ()) -> int | None:
    """The optimizer step of a snapshot given by step, by folder, or by its name in `known`; None
    where it is not known.
    """
    if snapshot is None:
        return None
    named = next((s.get("step") for s in known if str(s.get("name")) == snapshot), None)
    if named is not None:
        return int(named)
    match = re.search(r"^(\d+)$|(?:step|checkpoint)-(\d+)/*$", snapshot)
    return int(match[1] or match[2]) if match else None


def called(rows: list[dict[str, Any]]) -> list[str]:
    """What a table calls the snapshots of these rows: by their step, or number in their run; or by
    their path below the folder that all have in common.
    """
    names = [str(row.get("name") or row.get("step")) for row in rows]
    paths = [
        Path(n) for n, row in zip(names, rows) if row.get("step") is None and Path(n).name != n
    ]
    common = os.path.commonpath([path.absolute().parent for path in paths]) if paths else ""
    return [
        str(row["step"])
        if row.get("step")
        else os.path.relpath(name, common)
        if Path(name) in paths
        else name
        for name, row in zip(names, rows)
    ]


def snapshot(name: str | None, known: Iterable[dict[str, Any]] = ()) -> str:
    """A snapshot in words: its step, or else the end of its path."""
    step = step_of(name, known)
    return f"step {step}" if step is not None else Path(name).name if name else ""
