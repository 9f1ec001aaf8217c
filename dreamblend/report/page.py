"""`write_report`: the output folder of a blend -> one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from dreamblend.report.curves import MEANING, curve
from dreamblend.report.pictures import MAGMA, PIXELS, embed, heat_maps, open_image
from dreamblend.report.template import STYLE, TEMPLATE
from dreamblend.report.text import is_number, number, setting
from dreamblend.storage.blend_folder import (
    Folder,
    Result,
    in_order,
    maps_path,
    read_folder,
    spread,
    step_of,
)
from dreamblend.storage.files import save_text

_HIGHER = (
    "subject",
    "subject_clip",
    "prompt",
    "diversity",
    "diversity_dino",
    "effective_rank",
    "context_mass",
    "prompt_sensitivity",
)  # better when higher
_LOWER = ("collapse", "overlap", "distance", "copies")
_MOST_PHOTOS = 12
_EXPLAINED = {
    "base": "no fine-tuning",
    "region": "late where the subject is, early elsewhere",
    "cag": "late, guided by early's attention",
    "switch": "early first, then late",
    "merge": "mixed weights",
    "score": "mixed predictions",
}


def write_report(out: Path, max_rows: int = 60) -> Path:
    """Write `out/report.html` from what the output folder of a blend holds, and return its path.

    Only the folder must exist: what is absent has no section, what is damaged is named at the top
    of the page. At most `max_rows` rows of images (a prompt with a seed) are shown, spread over the
    prompts.
    """
    out = Path(out)
    folder = read_folder(out)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=number, setting=setting)
    page = environment.from_string(TEMPLATE).render(
        style=Markup(STYLE),
        magma=", ".join(MAGMA),
        problems=folder.problems,
        **_heading(folder),
        **_summary(folder),
        **_images(folder, max_rows),
        **_curves(folder),
        **_provenance(folder),
    )
    target = out / "report.html"
    save_text(page, target)
    return target


def _heading(folder: Folder) -> dict[str, Any]:
    """The subject, what the columns are, and the photos it was learned from."""
    subject = " ".join(
        str(folder.run[key]) for key in ("identifier", "class_noun") if folder.run.get(key)
    )
    listed = folder.run.get("photos") or []
    opened = [
        (path, image)
        for path in (folder.path / str(p) for p in listed[:_MOST_PHOTOS])
        if (image := open_image(path))
    ]
    photos = [
        {"source": embed(path, image), "pixelated": _is_small(image)} for path, image in opened
    ]
    early, late = (_snapshot(name, folder) for name in folder.pair())
    subject = subject or folder.path.resolve().name
    return {
        "subject": subject,
        "photos": photos,
        "more_photos": len(listed) - len(photos),
        "early": early,
        "late": late,
    }


def _snapshot(name: str | None, folder: Folder) -> str:
    """A snapshot in words: its step, or else the end of its path."""
    step = step_of(name, folder.collapse.get("snapshots") or [])
    return f"step {step}" if step is not None else Path(name).name if name else ""


def _summary(folder: Folder) -> dict[str, Any]:
    """The rows of summary.json in the order of the columns below, with the best value of each
    measure marked.
    """
    rows = [row for row in folder.summary.get("rows") or [] if row.get("kind")]
    order = in_order(str(row["kind"]) for row in rows)
    rows.sort(key=lambda row: order.index(str(row["kind"])))
    measures = [
        key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("kind", "n")
    ]
    measures = [key for key in measures if any(is_number(row.get(key)) for row in rows)]
    best = {}
    for key in measures:
        values = [row[key] for row in rows if is_number(row.get(key))]
        if len(values) > 1 and key in _HIGHER + _LOWER:
            best[key] = number(
                max(values) if key in _HIGHER else min(values)
            )  # as shown: what reads the same is marked the same
    return {
        "summary": rows,
        "measures": measures,
        "best": best,
        "lower": _LOWER,
        "counted": any(is_number(row.get("n")) for row in rows),
        "judges": folder.summary.get("judges"),
        "summary_note": folder.summary.get("note"),
    }


def _images(folder: Folder, max_rows: int) -> dict[str, Any]:
    """prompt -> rows of cells, one cell a kind."""
    prompts = folder.prompts()
    shown = spread(prompts, max_rows)
    kinds = folder.kinds
    sections = [
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
                _snapshot(folder.pair()[kind == "late"], folder)
                if kind in ("early", "late")
                else _EXPLAINED.get(kind, "")
            ),
        }
        for kind in kinds
    ]

    def count(found):
        return sum(map(len, found.values()))

    mapped = any(
        cell and cell["maps"]
        for section in sections
        for row in section["rows"]
        for cell in row["cells"]
    )
    return {
        "sections": sections,
        "heads": heads,
        "blends": [kind for kind in kinds if kind not in ("base", "early", "late")],
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
        "pixelated": image is not None and _is_small(image),
        "maps": heat_maps(image, maps) if image else [],
        "scores": _numeric(result.scores.items()),
        "measures": _numeric([("map distance", result.distance), *result.collapse.items()]),
        "file": result.file,
        "sha256": result.sha256,
    }


def _curves(folder: Folder) -> dict[str, Any]:
    """One curve a measure, and all values as a table: a phone and a print have no tooltips."""
    snapshots = folder.collapse.get("snapshots") or []
    named = folder.collapse.get("measures") or [
        key
        for key in dict.fromkeys(key for s in snapshots for key in s)
        if key not in ("name", "step")
    ]
    measures = [m for m in named if any(is_number(s.get(m)) for s in snapshots)]
    steps = [s["step"] for s in snapshots if is_number(s.get("step"))]
    pair = {
        role: step_of(name, snapshots)
        for role, name in zip(("early", "late"), folder.pair(), strict=True)
    }
    marks = {role: step for role, step in pair.items() if step is not None}
    curves = []
    for measure in measures:
        points = [
            (s["step"], s[measure])
            for s in snapshots
            if is_number(s.get("step")) and is_number(s.get(measure))
        ]
        if points:
            curves.append(
                {
                    "measure": measure,
                    "meaning": MEANING.get(measure, ""),
                    "drawing": curve(measure, points, steps, marks),
                }
            )
    return {
        "curves": curves,
        "marked": bool(marks),
        "snapshots": snapshots,
        "collapse_measures": measures,
        "collapse_note": folder.collapse.get("note"),
    }


def _provenance(folder: Folder) -> dict[str, Any]:
    """What was run with what: run.json, and per kind the settings that its images were
    drawn with.
    """
    tables = []
    run = {
        key: value
        for key, value in folder.run.items()
        if key not in ("settings", "photos") and value is not None
    }
    if run:
        tables.append(("run", [(key, setting(value)) for key, value in run.items()]))
    if folder.run.get("settings"):
        tables.append(
            (
                "settings of the run",
                [(key, setting(value)) for key, value in folder.run["settings"].items()],
            )
        )
    for kind in folder.kinds:
        used: dict[
            str, dict[str, None]
        ] = {}  # setting -> its distinct values in the order they came
        for result in folder.results:
            for key, value in result.settings.items() if result.kind == kind else ():
                used.setdefault(key, {})[setting(value)] = None
        if used:
            tables.append(
                (f"images: {kind}", [(key, _listed(values)) for key, values in used.items()])
            )
    return {
        "tables": tables,
        "image_count": sum(len(row) for rows in folder.prompts().values() for row in rows.values()),
    }


def _listed(values: Iterable[str], most: int = 4) -> str:
    values = list(values)
    return " | ".join(values[:most]) + (
        f" | {len(values) - most} more" if len(values) > most else ""
    )


def _numeric(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), number(value)) for key, value in pairs if is_number(value)]


def _is_small(image: Image.Image) -> bool:
    return max(image.size) <= PIXELS
