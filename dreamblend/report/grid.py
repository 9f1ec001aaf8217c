"""The images of a blend's folder side by side: a row a prompt and seed, a column a kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dreamblend.evaluation.measures import title
from dreamblend.report.pictures import embed, heat_maps, is_small, open_image
from dreamblend.report.text import is_number, number, snapshot
from dreamblend.storage.blend_folder import SINGLE, Folder, Result, Row, maps_path

_EXPLAINED = {
    "base": "no fine-tuning",
    "region": "late where the subject is, early elsewhere",
    "cag": "late, guided by early's attention",
    "switch": "early first, then late",
    "merge": "mixed weights",
    "score": "mixed predictions",
    "personalization": "late, away from a weaker empty prompt",
    "autoguidance": "late, away from early",
    "reward": "the base's class prompt, and what late adds",
    "masked": "late: both prompts where the class is",
    "similarity": "whichever is less like the base",
}


def grid(folder: Folder, max_rows: int) -> dict[str, Any]:
    """What the template says of the images: prompt -> rows of cells, one cell a kind. At most
    `max_rows` rows.
    """
    prompts = folder.prompts()
    shown = spread(prompts, max_rows)
    kinds = folder.kinds
    sections: list[dict[str, Any]] = [
        {
            "prompt": prompt,
            "rows": [
                {"seed": seed, "cells": [_cell(folder, row.get(kind)) for kind in kinds]}
                for seed, row in rows.items()
            ],
        }
        for prompt, rows in shown.items()
    ]

    heads = [
        {
            "kind": kind,
            "note": (
                snapshot(folder.pair()[kind == "late"], folder.collapse.get("snapshots") or [])
                if kind in ("early", "late")
                else _EXPLAINED.get(kind, "")
            ),
        }
        for kind in kinds
    ]

    def count(of_prompts: dict[str, dict[int, Row]]) -> int:
        return sum(map(len, of_prompts.values()))

    mapped = any(
        cell and cell["maps"]
        for section in sections
        for row in section["rows"]
        for cell in row["cells"]
    )
    return {
        "sections": sections,
        "heads": heads,
        "blends": [kind for kind in kinds if kind not in SINGLE],
        "hidden_rows": count(prompts) - count(shown),
        "shown_rows": count(shown),
        "mapped": mapped,
    }


def _cell(folder: Folder, result: Result | None) -> dict[str, Any] | None:
    """One image with its heat maps and numbers; None where this kind was not drawn."""
    if result is None:
        return None
    path = folder.path / result.file
    image = open_image(path)
    maps = maps_path(folder.path, path)
    return {
        "name": f"{result.kind}: {result.prompt}, seed {result.seed}",
        "source": embed(path, image) if image else None,
        "pixelated": image is not None and is_small(image),
        "maps": heat_maps(image, maps) if image else [],
        "scores": _numeric(result.scores.items()),
        "measures": _numeric([("distance", result.distance), *result.collapse.items()]),
        "file": result.file,
        "sha256": result.sha256,
    }


def _numeric(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(title(key), number(value)) for key, value in pairs if is_number(value)]


def spread(prompts: dict[str, dict[int, Row]], most: int) -> dict[str, dict[int, Row]]:
    """At most `most` rows, dealt out in rounds so that no prompt is dropped while another shows two
    seeds.
    """
    ranked = sorted(
        (place, i, prompt, seed)
        for i, (prompt, rows) in enumerate(prompts.items())
        for place, seed in enumerate(rows)
    )
    kept = {(prompt, seed) for _, _, prompt, seed in ranked[:most]}
    chosen = {
        prompt: {seed: row for seed, row in rows.items() if (prompt, seed) in kept}
        for prompt, rows in prompts.items()
    }
    return {prompt: rows for prompt, rows in chosen.items() if rows}
