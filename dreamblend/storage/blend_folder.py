"""The output folder of a blend: the one module that writes and reads it. Pages are made elsewhere.

OUT/images/<slug>/<seed>-<kind>.png     each says in a text chunk how it was made
OUT/maps/<slug>/<seed>-<kind>.safetensors
OUT/results.jsonl                       one line an image, made from the images
OUT/{run,summary,collapse}.json
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from dreamblend.errors import InputError
from dreamblend.storage.files import check_writable, save_png, save_text
from dreamblend.storage.result import Result
from dreamblend.storage.snapshots import sha256

CHUNK = "dreamblend"  # the PNG text chunk that holds the provenance
INDEX = "results.jsonl"

# The order of the kinds of images side by side; other blends follow, and late is last.
KINDS = ("base", "early", "region", "cag", "switch", "merge", "score")
SINGLE = ("base", "early", "late")  # kinds that one model drew; any other is a blend


Row = dict[str, Result]  # kind -> image, all of one prompt and seed


@dataclass(frozen=True)
class Folder:
    """The contents of an output folder, with a sentence in `problems` for each unreadable part."""

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
        rows: dict[str, dict[int, Row]] = {}
        for result in self.results:
            rows.setdefault(result.prompt, {}).setdefault(result.seed, {})[result.kind] = result
        return {prompt: dict(sorted(of_seed.items())) for prompt, of_seed in rows.items()}

    def pair(self) -> tuple[str | None, str | None]:
        """The early and the late snapshot as the user named them: in run.json, else in the
        results.
        """

        def named(role: str) -> str | None:
            names = [self.run.get(role), *(getattr(result, role) for result in self.results)]
            return next((str(name) for name in names if name is not None), None)

        return named("early"), named("late")


def in_order(kinds: Iterable[str]) -> list[str]:
    """Distinct kinds, early first, then the blends, late last."""

    def rank(kind: str) -> int:
        return KINDS.index(kind) if kind in KINDS else len(KINDS) + (kind == "late")

    return sorted(dict.fromkeys(kinds), key=rank)


# ------------------------------------------------------------------------------------------- places
def slug(prompt: str) -> str:
    """A folder name for a prompt: readable, safe, and distinct by its hash."""
    readable = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return f"{readable or 'prompt'}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


def image_path(out: Path, prompt: str, seed: int, kind: str) -> Path:
    """The path of an image."""
    return out / "images" / slug(prompt) / f"{seed}-{kind}.png"


def maps_path(out: Path, image: Path) -> Path:
    """The path of an image's maps."""
    return out / "maps" / image.parent.name / f"{image.stem}.safetensors"


def images(out: Path) -> Iterator[Path]:
    """Every PNG that may be an image of the folder."""
    return (out / "images").glob("*/*.png")


# ------------------------------------------------------------------------------------------ writing
def save_image(out: Path, image: Image.Image, result: Result) -> None:
    """OUT/<result.file>: a PNG that says how it was made."""
    save_png(image, out / result.file, {CHUNK: json.dumps(result.provenance())})


def save_index(out: Path, results: list[Result]) -> None:
    """OUT/results.jsonl, whole or not at all."""
    save_text("".join(json.dumps(result.line()) + "\n" for result in results), out / INDEX)


def save_json(out: Path, name: str, value: dict[str, Any]) -> None:
    """OUT/run.json, summary.json or collapse.json, by its name without the ending."""
    save_text(json.dumps(value, indent=2), out / f"{name}.json")


# ------------------------------------------------------------------------------------------ reading
def read_folder(out: Path) -> Folder:
    """Read the output folder of a blend. Only the folder itself must exist; a damaged file is left
    out, with a sentence in `problems`.
    """
    if not out.is_dir():
        raise InputError(f"{out} is not a folder: give the output folder of a blend")
    problems: list[str] = []
    results = read_results(out, problems)
    run, summary, collapse = (
        read_json(out, name, problems) for name in ("run", "summary", "collapse")
    )
    return Folder(out, results, run, summary, collapse, problems)


def read_results(out: Path, problems: list[str]) -> list[Result]:
    """The images of results.jsonl. Lines that are not a complete JSON object (an interrupted write)
    are skipped, and their number is added to `problems`.
    """
    path = out / INDEX
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


def read_json(out: Path, name: str, problems: list[str]) -> dict[str, Any]:
    """What `save_json` wrote; empty where the file is absent or damaged. A damaged file is added to
    `problems`.
    """
    path = out / f"{name}.json"
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


def read_image(out: Path, image: Path) -> Result | None:
    """The result in a PNG's text chunk; None where the file is damaged or not ours."""
    try:
        with Image.open(image, formats=["PNG"]) as opened:
            if not isinstance(opened, PngImageFile):
                return None
            opened.load()
            provenance = json.loads(opened.text[CHUNK])
        kinds = {"settings": dict, "prompt": str, "seed": int, "kind": str}
        if not all(isinstance(provenance[key], kind) for key, kind in kinds.items()):
            return None
        return Result.of({**provenance, "file": str(image.relative_to(out))})
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        SyntaxError,
        OverflowError,
        RecursionError,
        Image.DecompressionBombError,
    ):  # most are Pillow's
        return None


def read_index(out: Path) -> list[Result]:
    """Every image, from the images themselves, ordered by prompt, seed and kind.

    Scores and other additions in results.jsonl are kept for images that have not changed.
    """
    before = {(result.file, result.sha256): result for result in read_results(out, [])}
    results = []
    for image in images(out):
        if (result := read_image(out, image)) is not None:
            result = replace(result, sha256=sha256(image))
            if known := before.get((result.file, result.sha256)):
                more = {**known.more, **result.more}
                result = replace(result, scores=result.scores or known.scores, more=more)
            results.append(result)
    return sorted(results, key=lambda result: (result.prompt, result.seed, result.kind))


# ----------------------------------------------------------------------------------- still to draw
def missing(
    out: Path, pairs: list[tuple[str, int]], kinds: list[str], settings: dict[str, Any]
) -> list[tuple[str, int]]:
    """The (prompt, seed) pairs that lack an image, or have a damaged one.

    Raises InputError where `out` cannot be written, or holds images that were made with other
    settings or weights.
    """
    check_writable(out / "images")
    there = set()
    for image in images(out):
        if (result := read_image(out, image)) is None:
            continue
        if differs := differences(result.settings, settings):
            raise InputError(
                f"{out} holds images made with other settings ({'; '.join(differs)}): choose"
                " another --out"
            )
        there.add(image)
    return [
        (prompt, seed)
        for prompt, seed in pairs
        if not there.issuperset(image_path(out, prompt, seed, kind) for kind in kinds)
    ]


def undrawn(out: Path, pairs: list[tuple[str, int]], kinds: list[str]) -> list[tuple[str, int]]:
    """The pairs, of those just drawn, that lack an image, as it was not finite."""
    return [
        (prompt, seed)
        for prompt, seed in pairs
        if not all(image_path(out, prompt, seed, kind).exists() for kind in kinds)
    ]


def differences(settings: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The settings that differ, old and new. Other names of the same weights do not count: a path
    has many spellings.
    """
    same = {
        name
        for name in ("early", "late", "base")
        if settings.get(f"{name}_weights") == wanted[f"{name}_weights"]
    }
    return [
        f"{k} {settings.get(k, 'unknown')}, now {v}"
        for k, v in wanted.items()
        if k not in same and (k not in settings or settings[k] != v)
    ] + [
        f"{k} {v}, now the default"  # some are written only where they are set
        for k, v in settings.items()
        if k not in wanted and k not in same
    ]
