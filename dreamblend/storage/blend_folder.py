"""The output folder of a blend: the one place that writes and reads it. Nothing about how it looks.

OUT/images/<slug>/<seed>-<kind>.png     each says in a text chunk how it was made
OUT/maps/<slug>/<seed>-<kind>.safetensors
OUT/results.jsonl                       one line an image, made from the images
OUT/{run,summary,collapse}.json
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dreamblend.errors import InputError
from dreamblend.storage.files import save_png, save_text
from dreamblend.storage.snapshots import sha256

CHUNK = "dreamblend"  # the PNG text chunk that holds the provenance

KINDS = (
    "base",
    "early",
    "region",
    "cag",
    "switch",
    "merge",
    "score",
)  # the order of the columns; other blends follow, late is last


@dataclass(frozen=True)
class Result:
    """One image: a line of results.jsonl."""

    prompt: str
    seed: int
    kind: str
    file: str  # relative to the output folder
    sha256: str = ""
    early: str | None = None
    late: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    collapse: dict[str, Any] = field(default_factory=dict)
    distance: float | None = None
    scores: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, line: dict[str, Any]) -> Result:
        """Raises KeyError, TypeError, ValueError or OverflowError where the line does not describe
        an image of the folder.
        """
        if Path(str(line["file"])).is_absolute() or ".." in Path(str(line["file"])).parts:
            raise ValueError(f"{line['file']} is not in the folder")

        def text(key):
            return None if line.get(key) is None else str(line[key])

        def table(key):
            return line[key] if isinstance(line.get(key), dict) else {}

        return cls(
            str(line["prompt"]),
            int(line["seed"]),
            str(line["kind"]),
            str(line["file"]),
            text("sha256") or "",
            text("early"),
            text("late"),
            table("settings"),
            table("collapse"),
            line.get("distance"),
            table("scores"),
        )


Row = dict[str, Result]  # kind -> image, all of one prompt and seed


@dataclass(frozen=True)
class Folder:
    """All that an output folder says, with a sentence in `problems` for each thing that could not
    be read.
    """

    path: Path
    results: list[Result]
    run: dict[str, Any]
    summary: dict[str, Any]
    collapse: dict[str, Any]
    problems: list[str]

    @property
    def kinds(self) -> list[str]:
        return in_order(result.kind for result in self.results)

    def prompts(self) -> dict[str, dict[int, Row]]:
        """prompt -> seed -> row; prompts as they first appear, seeds ascending. A later line
        replaces an earlier one.
        """
        found: dict[str, dict[int, Row]] = {}
        for result in self.results:
            found.setdefault(result.prompt, {}).setdefault(result.seed, {})[result.kind] = result
        return {prompt: dict(sorted(rows.items())) for prompt, rows in found.items()}

    def pair(self) -> tuple[str | None, str | None]:
        """The early and the late snapshot as the user named them: in run.json, else in the
        results.
        """

        def named(role):
            return next(
                (
                    str(v)
                    for v in [self.run.get(role), *(getattr(r, role) for r in self.results)]
                    if v is not None
                ),
                None,
            )

        return named("early"), named("late")


def read_folder(out: Path) -> Folder:
    """Read the output folder of a blend. Only the folder itself must exist; a damaged file is left
    out and told.
    """
    if not out.is_dir():
        raise InputError(f"{out} is not a folder: give the output folder of a blend")
    problems: list[str] = []
    results = _read_lines(out / "results.jsonl", problems)
    run, summary, collapse = (
        _read_object(out / f"{name}.json", problems) for name in ("run", "summary", "collapse")
    )
    return Folder(out, results, run, summary, collapse, problems)


def in_order(kinds: Iterable[str]) -> list[str]:
    """Distinct kinds, early first, then the blends, late last."""

    def rank(kind):
        return KINDS.index(kind) if kind in KINDS else len(KINDS) + (kind == "late")

    return sorted(dict.fromkeys(kinds), key=rank)


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


def step_of(snapshot: str | None, known: Iterable[dict[str, Any]] = ()) -> int | None:
    """The optimizer step of a snapshot given by step, by folder, or by its name in `known`; None
    where it cannot be told.
    """
    if snapshot is None:
        return None
    named = next((s.get("step") for s in known if str(s.get("name")) == snapshot), None)
    if named is not None:
        return int(named)
    found = re.search(r"^(\d+)$|(?:step|checkpoint)-(\d+)/*$", snapshot)
    return int(found[1] or found[2]) if found else None


def _read_lines(path: Path, problems: list[str]) -> list[Result]:
    """The images of results.jsonl; lines that are no complete JSON object (an interrupted write)
    are counted and skipped.
    """
    if not path.is_file():
        return []
    results, skipped = [], 0
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            if line.strip():
                results.append(Result.of(json.loads(line)))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            skipped += 1
    if skipped:
        problems.append(
            f"{skipped} line{'s' * (skipped > 1)} of {path.name} could not be read (an interrupted"
            f" write) and {'are' if skipped > 1 else 'is'} left out."
        )
    return results


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is absent or damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    problems.append(f"{path.name} is not a JSON object and is left out.")
    return {}


def slug(prompt: str) -> str:
    """A folder name for a prompt: readable, safe, and distinct by its hash."""
    readable = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return f"{readable or 'prompt'}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def image_path(out: Path, prompt: str, seed: int, kind: str) -> Path:
    """Where an image is."""
    return out / "images" / slug(prompt) / f"{seed}-{kind}.png"


def maps_path(out: Path, image: Path) -> Path:
    """Where the maps of an image are."""
    return out / "maps" / image.parent.name / f"{image.stem}.safetensors"


def save_image(image: Image.Image, path: Path, provenance: dict) -> None:
    """A PNG that says how it was made."""
    save_png(image, path, {CHUNK: json.dumps(provenance)})


def save_json(out: Path, name: str, value: dict) -> None:
    """OUT/run.json, summary.json or collapse.json, by its name without the ending."""
    save_text(json.dumps(value, indent=2), out / f"{name}.json")


def differences(said: dict, wanted: dict) -> list[str]:
    """The settings that differ, old and new. Names of what has the same weights do not count: a
    path has many spellings.
    """
    same = {
        name
        for name in ("early", "late", "base")
        if said.get(f"{name}_weights") == wanted[f"{name}_weights"]
    }
    return [
        f"{k} {said.get(k, 'unknown')}, now {v}"
        for k, v in wanted.items()
        if k not in same and (k not in said or said[k] != v)
    ]


def read_provenance(image: Path) -> dict | None:
    """What a PNG of ours says of itself; None where it is not ours."""
    try:
        with Image.open(image, formats=["PNG"]) as opened:
            opened.load()
            said = json.loads(opened.text[CHUNK])
            kinds = {"settings": dict, "prompt": str, "seed": int, "kind": str}
            return said if all(isinstance(said[key], kind) for key, kind in kinds.items()) else None
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        SyntaxError,
        RecursionError,
        Image.DecompressionBombError,
    ):  # most are Pillow's
        return None


def read_index(out: Path) -> list[dict]:
    """One row an image, from the images themselves, ordered by prompt, seed and kind.

    What results.jsonl says beyond that of the same images (their scores) is kept.
    """
    before = {
        (row.get("file"), row.get("sha256")): row for row in _read_rows(out / "results.jsonl")
    }
    rows = []
    for image in (out / "images").glob("*/*.png"):
        if (said := read_provenance(image)) is not None:
            row = {**said, "file": str(image.relative_to(out)), "sha256": sha256(image)}
            rows.append(
                {
                    **row,
                    **{
                        k: v
                        for k, v in before.get((row["file"], row["sha256"]), {}).items()
                        if k not in row
                    },
                }
            )
    return sorted(rows, key=lambda row: (row["prompt"], row["seed"], row["kind"]))


def _read_rows(index: Path) -> list[dict]:
    """The lines of an index that can be read."""
    rows = []
    for line in (
        index.read_text(encoding="utf-8", errors="replace").splitlines() if index.is_file() else ()
    ):
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [
        row
        for row in rows
        if isinstance(row, dict)
        and isinstance(row.get("file"), str)
        and isinstance(row.get("sha256"), str)
    ]


def save_index(out: Path, rows: list[dict]) -> None:
    """OUT/results.jsonl, whole or not at all."""
    save_text("".join(json.dumps(row) + "\n" for row in rows), out / "results.jsonl")
