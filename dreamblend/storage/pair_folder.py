"""A base and two snapshots of it in one folder, from which a pipeline is opened again.

FOLDER/dreamblend.json      the names below, and the subject's
FOLDER/base/                a pipeline folder as diffusers reads it, or a single file in it
FOLDER/early/, late/        the snapshots' files as they were
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dreamblend.errors import InputError
from dreamblend.models import pipelines
from dreamblend.models.trust import check_index
from dreamblend.storage.files import whole
from dreamblend.storage.snapshots import Snapshot

RECORD = "dreamblend.json"
PATHS = ("base", "early", "late")  # of a record, relative to the folder
OTHERS = (".bin", ".ckpt", ".pt", ".msgpack", ".h5", ".onnx", ".pb", ".safetensors")


def save(
    folder: Path,
    record: dict[str, Any],
    base: Callable[[Path], Path],
    early: Snapshot,
    late: Snapshot,
) -> None:
    """Write a folder, complete or not at all. `base` writes the base into a folder and gives the
    path to open. Raises InputError where the folder exists or the disk refuses.
    """
    with whole(folder, "another folder") as part:
        paths = {"base": base(part / "base")}
        for name, snapshot in (("early", early), ("late", late)):
            paths[name] = _copy_snapshot(snapshot, part / name)
        named = {name: path.relative_to(part).as_posix() for name, path in paths.items()}
        (part / RECORD).write_text(json.dumps({**record, **named}, indent=2), encoding="utf-8")


def read(folder: Path) -> dict[str, Any] | None:
    """What a folder's record says, its paths as they are to be opened; None where it has none."""
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        paths = {name: Path(record[name]) for name in PATHS}
        if any(path.is_absolute() or ".." in path.parts for path in paths.values()):
            raise ValueError("it names files outside its folder")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error}): save the pair again") from error
    return {**record, **{name: str(folder / path) for name, path in paths.items()}}


def copy_base(source: Path, folder: Path, variant: str | None = None) -> Path:
    """The files that a base is read from: a single file, or those of a pipeline folder whose
    model_index.json names them, with the weights of a variant where it is named and there.
    """
    folder.mkdir(parents=True)
    if source.is_file():
        return Path(shutil.copy(source, folder))
    index = check_index(source / "model_index.json")
    for name, kind in index.items():
        if not isinstance(kind, list) or kind[0] is None:
            continue
        part = source / name
        if not part.is_dir():  # such as a safety checker that was left out
            index[name] = [None, None]
            continue
        weights, _ = pipelines.weight_files(part, variant)
        (folder / name).mkdir()
        for file in part.iterdir():
            if file in weights or file.is_file() and file.suffix not in OTHERS:
                shutil.copy(file, folder / name)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def _copy_snapshot(snapshot: Snapshot, folder: Path) -> Path:
    """The files that a snapshot is read from; the path to read it by."""
    if snapshot.about is not None:
        return Path(shutil.copytree(snapshot.path, folder))
    inside = snapshot.path.parent if snapshot.path.is_file() else snapshot.path
    for file in snapshot._files():
        there = folder / file.relative_to(inside)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, there)
    return folder / snapshot.path.name if snapshot.path.is_file() else folder
