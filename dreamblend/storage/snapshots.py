"""The snapshot folder: written whole or not at all, verified when read, listed by looking.

    RUN/snapshots/step-000250/    trained weights in the layout diffusers reads, and snapshot.json

Checkpoints made elsewhere are read too: a diffusers `checkpoint-N/`, a LoRA file, a peft adapter, a
learned word, a pipeline folder, a pipeline or its denoiser in one file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dreamblend import renamed
from dreamblend.errors import InputError
from dreamblend.storage import trainers
from dreamblend.storage.foreign import PARTS, PEFT, PEFT_CONFIG, method_of

FORMAT = 1
ABOUT = "snapshot.json"
_NAME = re.compile(r"step-(\d{6,})")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_LONGEST = 2**24  # bytes of a snapshot.json, which says a few thousand


@dataclass(frozen=True)
class Weights:
    """Tensors of one safetensors file, and its text metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


# path in the folder -> weights, or the content of a JSON file
Files = dict[str, "Weights | dict[str, Any]"]


@dataclass(frozen=True)
class About:
    """The record of a snapshot: snapshot.json."""

    step: int
    method: str
    base: str
    base_hash: str
    identifier: str
    class_noun: str
    dtype: str
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    # path -> {"sha256": hex, "bytes": int}
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT
    digest: str = ""  # of all the above


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on disk. `about` is None for a checkpoint made elsewhere."""

    path: Path
    method: str
    about: About | None = None

    @property
    def name(self) -> str:
        return str(self.about.step) if self.about else str(self.path)

    @cached_property
    def weights(self) -> str:
        """A hash of the snapshot's files. It differs for the same step of two runs, and when the
        content of a path changes.

        For a checkpoint made elsewhere every byte is read, once.
        """
        if self.about:
            listed = sorted((name, entry["sha256"]) for name, entry in self.about.files.items())
        else:
            listed = [(os.path.relpath(file, self.path), sha256(file)) for file in self._files()]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]

    def _files(self) -> list[Path]:
        """The files of a checkpoint made elsewhere that its method may read, without a trainer's
        optimizer and the like.
        """
        if self.path.is_file():
            config = self.path.with_name(PEFT_CONFIG)
            return [self.path, *([config] if self.path.name == PEFT and config.is_file() else [])]
        folders = [self.path / part for part in PARTS] + (
            [] if self.method == "full" else [self.path]
        )
        return sorted(
            file
            for folder in folders
            for file in folder.glob("*")
            if file.suffix in (".safetensors", ".json") and file.is_file()
        )


def folder(root: Path, step: int) -> Path:
    """Where the snapshot of a step lies."""
    return root / f"step-{step:06d}"


# ------------------------------------------------------------------------------------------ writing
def write(root: Path, about: About, files: Files) -> Path:
    """Write a snapshot to `root/step-NNNNNN`, complete or not at all.

    Everything goes to a hidden sibling, is flushed to disk, and is renamed into place. Raises
    InputError where the folder exists or the disk refuses; earlier snapshots stay as they are.
    """
    final = folder(root, about.step)
    part = root / f".{final.name}.part-{os.getpid()}"
    if final.exists():
        raise InputError(
            f"{final} exists already: choose another output folder, or remove it to make it again"
        )
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, content in files.items():
            path = part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Weights):
                # one entry of metadata, as their order in the file is random
                save_file(
                    {k: v.contiguous() for k, v in content.tensors.items()},
                    path,
                    metadata=content.metadata or {"format": "pt"},
                )
            else:
                path.write_text(json.dumps(content, indent=2, sort_keys=True))
        listed = {
            name: {"sha256": sha256(part / name), "bytes": (part / name).stat().st_size}
            for name in files
        }
        (part / ABOUT).write_text(_text({**asdict(about), "files": listed}))
        for path in [p for p in part.rglob("*")] + [part]:
            _flush(path)
        os.rename(part, final)
        _flush(root)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write the snapshot {final}: {error}; earlier snapshots are intact"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)  # not there any more where all went well
    return final


def sweep(root: Path) -> None:
    """Remove the unfinished snapshots of killed processes."""
    for part in root.glob(".step-*.part-*"):
        shutil.rmtree(part, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------ reading
def read(path: Path) -> Snapshot:
    """Open and verify a snapshot, ours or made elsewhere. Raises InputError that names the file and
    what to do.
    """
    if not path.exists():
        raise InputError(f"there is no snapshot at {path}")
    named = _NAME.fullmatch(path.name)
    if (path / ABOUT).is_file():
        about = _read_about(path)
        if named and int(named[1]) != about.step:
            raise InputError(
                f"{path} holds the snapshot of step {about.step}: name it"
                f" {folder(path.parent, about.step).name} again"
            )
        _verify(path, about.files)
        return Snapshot(path, about.method, about)
    if named:
        raise InputError(
            f"{path / ABOUT} is missing: the snapshot is damaged; remove {path} and use another"
        )
    return Snapshot(path, method_of(path))


def _read_about(path: Path) -> About:
    try:
        if (path / ABOUT).stat().st_size > _LONGEST:
            raise ValueError(f"it has more than {_LONGEST} bytes")
        written = (path / ABOUT).read_bytes()
        record = json.loads(written)
        if record.get("format") != FORMAT:
            raise InputError(
                f"{path / ABOUT} has format {record.get('format')!r}, and this version reads"
                f" {FORMAT}: upgrade dreamblend"
            )
        # the bytes are compared, as JSON has other spellings of the same record
        if written != _text(record).encode():
            raise ValueError("its checksum differs")
        about = About(**{**record, "settings": renamed.settings(record["settings"])})
        wrong = [
            name
            for name, kind in get_type_hints(About).items()
            if not isinstance(getattr(about, name), get_origin(kind) or kind)
        ]
        entries = (
            [
                isinstance(e, dict) and {k: type(v) for k, v in e.items()}
                for e in about.files.values()
            ]
            if not wrong
            else []
        )
        if wrong or any(entry != {"sha256": str, "bytes": int} for entry in entries):
            raise ValueError(f"its {(wrong or ['files'])[0]} have the wrong type")
        return about
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path / ABOUT} is damaged ({error}): remove {path} and use another snapshot"
        ) from error


def _text(record: dict[str, Any]) -> str:
    """snapshot.json with its digest: the same text for a record that was read from it."""
    text = json.dumps({k: v for k, v in record.items() if k != "digest"}, sort_keys=True)
    return json.dumps({**record, "digest": hashlib.sha256(text.encode()).hexdigest()}, indent=2)


def _verify(path: Path, listed: dict[str, dict]) -> None:
    """Raise InputError unless the folder holds the listed files, unchanged, and no others."""
    there = set()
    for entry in sorted(path.rglob("*")):
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            raise InputError(
                f"{entry} is a link or a device, and not a file of the snapshot: remove {path}, or"
                " copy the file itself there"
            )
        if entry.is_file():
            there.add(entry.relative_to(path).as_posix())
    for name in listed:
        if (
            ".." in name.split("/")
            or name == ABOUT
            or str(PurePosixPath(name)) != name
            or name.startswith("/")
        ):
            raise InputError(
                f"{path / ABOUT} lists {name!r}, which is not a file of the snapshot: remove {path}"
            )
        file = path / name
        if name not in there:
            raise InputError(
                f"{file} is missing: the snapshot is damaged; remove {path} and use another"
            )
        if file.stat().st_size != listed[name]["bytes"] or sha256(file) != listed[name]["sha256"]:
            raise InputError(
                f"{file} is damaged (its checksum differs): remove {path} and use another snapshot"
            )
    if others := sorted(there - listed.keys() - {ABOUT}):
        raise InputError(
            f"{path / others[0]} is no file of the snapshot, as {ABOUT} does not list it: move it"
            f" out of {path}"
        )


def find(run: Path) -> list[tuple[int, Path]]:
    """The snapshots of a run by step: the listing of its folder is the index. Of a run of another
    trainer its checkpoints, by epoch where their steps are not known.
    """
    root = run / "snapshots"
    if not root.is_dir():
        if (of := trainers.results_of(run)) is not None:
            return find(of)
        if (other := trainers.recognise(run)) is not None:
            return other.checkpoints
        raise InputError(
            f"{run} is not a run: it has no snapshots/ folder, and no checkpoints that are named as"
            f" {', '.join(trainers.TRAINERS)} name them; name the --out of a train.py run, or the"
            " folder of another trainer's checkpoints"
        )
    snapshots = listing(root)
    if not snapshots:
        raise InputError(f"{root} holds no snapshot yet")
    return snapshots


def listing(root: Path) -> list[tuple[int, Path]]:
    """The snapshots in a folder by step; none where it does not exist."""
    return sorted(
        (int(m[1]), p) for p in root.glob("step-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()
    )


def resolve(run: Path | None, which: str) -> Path:
    """A snapshot by step (`400`, of `run`), or by path."""
    if which.isdecimal():
        if run is None:
            raise InputError(f"snapshot {which} is a step: name its run with --run, or give a path")
        steps = dict(find(run))
        if int(which) not in steps:
            raise InputError(
                f"{run} has no snapshot at step {which}: it has {', '.join(map(str, steps))}"
            )
        return steps[int(which)]
    path = Path(which).expanduser()
    if not path.exists():
        raise InputError(f"snapshot {which!r} is neither a step nor a path that exists")
    return path


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies on the CPU, floating point ones in `dtype`."""
    return {
        k: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype, copy=True).contiguous()
        for k, v in tensors.items()
    }
