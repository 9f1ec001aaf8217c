"""`write_report`: the output folder of a blend -> one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dreamblend.evaluation import measures
from dreamblend.report.curves import curve
from dreamblend.report.grid import grid
from dreamblend.report.pictures import MAGMA, embed, is_small, open_image
from dreamblend.report.template import STYLE, TEMPLATE
from dreamblend.report.text import called, is_number, number, setting, snapshot, step_of
from dreamblend.storage.blend_folder import SINGLE, Folder, in_order, read_folder
from dreamblend.storage.files import save_text

_MOST_PHOTOS = 12


def write_report(out: Path, max_rows: int = 60) -> Path:
    """Write `out/report.html` from the output folder of a blend, and return its path.

    Only the folder must exist: a missing file has no section, and a damaged one is named at the top
    of the page. At most `max_rows` rows of images (a prompt with a seed) are shown, spread over the
    prompts.
    """
    out = Path(out)
    folder = read_folder(out)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=number, setting=setting, heading=measures.title)
    page = environment.from_string(TEMPLATE).render(
        style=Markup(STYLE),
        magma=", ".join(MAGMA),
        problems=folder.problems,
        single=SINGLE,
        **_heading(folder),
        **_summary(folder),
        **grid(folder, max_rows),
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
        {"source": embed(path, image), "pixelated": is_small(image)} for path, image in opened
    ]
    early, late = (snapshot(name, folder.collapse.get("snapshots") or []) for name in folder.pair())
    subject = subject or folder.path.resolve().name
    return {
        "subject": subject,
        "photos": photos,
        "more_photos": len(listed) - len(photos),
        "early": early,
        "late": late,
    }


def _summary(folder: Folder) -> dict[str, Any]:
    """The rows of summary.json in the order of the columns below, with the best value of each
    measure marked.
    """
    rows = [row for row in folder.summary.get("rows") or [] if row.get("kind")]
    order = in_order(str(row["kind"]) for row in rows)
    rows.sort(key=lambda row: order.index(str(row["kind"])))
    keys = [
        key for key in dict.fromkeys(key for row in rows for key in row) if key not in ("kind", "n")
    ]
    keys = [key for key in keys if any(is_number(row.get(key)) for row in rows)]
    higher = {key: measure.higher_is_better for key in keys if (measure := measures.find(key))}
    best = {}
    for key in keys:
        values = [row[key] for row in rows if is_number(row.get(key))]
        if len(values) > 1 and higher.get(key) is not None:
            best[key] = number(
                max(values) if higher[key] else min(values)
            )  # as shown: what reads the same is marked the same
    return {
        "summary": rows,
        "measures": keys,
        "best": best,
        "lower": [key for key in keys if higher.get(key) is False],
        "counted": any(is_number(row.get("n")) for row in rows),
        "judges": folder.summary.get("judges"),
        "summary_note": folder.summary.get("note"),
    }


def _curves(folder: Folder) -> dict[str, Any]:
    """One curve a measure, and all values as a table: a phone and a print have no tooltips."""
    snapshots = folder.collapse.get("snapshots") or []
    named = folder.collapse.get("measures") or [
        key
        for key in dict.fromkeys(key for s in snapshots for key in s)
        if key not in ("name", "step")
    ]
    shown = [m for m in named if any(is_number(s.get(m)) for s in snapshots)]
    steps = [s["step"] for s in snapshots if is_number(s.get("step"))]
    pair = {
        role: step_of(of, snapshots)
        for role, of in zip(("early", "late"), folder.pair(), strict=True)
    }
    marks = {role: step for role, step in pair.items() if step is not None}
    curves = []
    for name in shown:
        points = [
            (s["step"], s[name])
            for s in snapshots
            if is_number(s.get("step")) and is_number(s.get(name))
        ]
        if points:
            curves.append(
                {
                    "measure": name,
                    "meaning": measure.meaning if (measure := measures.find(name)) else "",
                    "drawing": curve(name, points, steps, marks),
                }
            )
    return {
        "curves": curves,
        "marked": bool(marks),
        "snapshots": [{**s, "name": name} for s, name in zip(snapshots, called(snapshots))],
        "collapse_measures": shown,
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
