"""The runs of other trainers: which files of a folder are checkpoints, in which order, and what the
files say of the base and the subject.

    diffusers' scripts, SimpleTuner   checkpoint-500/, and the folder itself at the end
    kohya sd-scripts, musubi-tuner    mug-000004 (epoch), mug-step00001500, mug at the end
    ai-toolkit                        mug_000001500, mug at the end; config.yaml
    OneTrainer                        save/2026-01-31_10-00-00-save-1500-4-0: step, epoch, its step
    diffusion-pipe                    epoch4/ or step1500/, in a folder named by the time; in it the
                                      file of diffusers, of peft, lora (SDXL) or model (all weights)

Only names, headers and settings are read here, and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from dreamblend.errors import InputError
from dreamblend.storage import foreign

DIFFUSERS = "diffusers' scripts"
KOHYA = "kohya sd-scripts or musubi-tuner"
AI_TOOLKIT = "ai-toolkit"
ONE_TRAINER = "OneTrainer"
SIMPLE_TUNER = "SimpleTuner"
DIFFUSION_PIPE = "diffusion-pipe"
TRAINERS = (DIFFUSERS, SIMPLE_TUNER, KOHYA, AI_TOOLKIT, ONE_TRAINER, DIFFUSION_PIPE)

# names of files without their ending, or of folders -> whose they are
_NAMES = {
    r"(?P<name>.*?)(?P<time>\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)-save-(?P<step>\d+)-\d+-\d+": (
        ONE_TRAINER
    ),
    r"(?P<name>.+)-step(?P<step>\d{8,})": KOHYA,
    r"(?P<name>.+)-(?P<epoch>\d{6})": KOHYA,
    r"(?P<name>.+)_(?P<step>\d{9})": AI_TOOLKIT,
}
_FOLDERS = {
    r"(?P<name>)checkpoint-(?P<step>\d+)": DIFFUSERS,
    r"(?P<name>)epoch(?P<epoch>\d+)": DIFFUSION_PIPE,
    r"(?P<name>)step(?P<step>\d+)": DIFFUSION_PIPE,
}
# files that diffusion-pipe writes into such a folder under names of its own
_ITS_FILES = ("lora.safetensors", "model.safetensors")
_LONGEST = 2**24  # bytes of a file of settings


@dataclass(frozen=True)
class Facts:
    """What a run's files say of it; None, or nothing, where they do not."""

    base: str | None = None  # a hub id, or a path that exists
    identifier: str | None = None
    class_noun: str | None = None
    photos: Path | None = None  # that exist
    max_steps: int | None = None
    hints: tuple[str, ...] = ()  # of what cannot be used as it stands


@dataclass(frozen=True)
class TrainerRun:
    """A run of another trainer.

    Args:
        path: the folder of its checkpoints.
        name: what their names begin with; empty where they all have the same.
        trainer: who wrote them.
        unit: what their numbers count: step or epoch.
        checkpoints: number and path, in order.
        facts: what the files say of base and subject.
        notes: what was left out or is not sure, a sentence each.
    """

    path: Path
    name: str
    trainer: str
    unit: str
    checkpoints: list[tuple[int, Path]]
    facts: Facts
    notes: tuple[str, ...] = ()
    alone: bool = True  # in its folder

    @property
    def results(self) -> Path:
        """Where what was measured of the run is kept."""
        return self.path if self.alone else self.path / f"{self.name}.pair"

    def __str__(self) -> str:
        first, last = self.checkpoints[0][0], self.checkpoints[-1][0]
        count = len(self.checkpoints)
        span = f"{self.unit} {first}" if count == 1 else f"{self.unit}s {first} to {last}"
        return f"a run of {self.trainer}, {count} checkpoint{'s' * (count != 1)}, {span}"


@dataclass
class _Found:
    """A checkpoint by its name."""

    path: Path
    trainer: str
    name: str
    unit: str  # step, epoch, or nothing of the last one
    number: int
    time: str = ""  # of its saving
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """The optimizer step, by its metadata or its name."""
        said = self.metadata.get("ss_steps") or _said(self.metadata, "training_info", "step")
        if str(said).isdecimal():
            return int(str(said))
        return self.number if self.unit == "step" else None


# ------------------------------------------------------------------------------------- the folder
def recognise(run: Path) -> TrainerRun | None:
    """The run of another trainer in a folder; None where there is none.

    Where a folder holds several runs, FOLDER/NAME is the one whose files begin with NAME. A folder
    that holds a run's results (`select --out`) stands for the run.

    Raises InputError where it holds several and none is named, or nothing of it can be read.
    """
    if (of := results_of(run)) is not None:
        return recognise(of)
    if run.is_dir():
        found = _found(run)
        if not found:
            inside = [(p, some) for p in _folders(run) if (some := _found(p))]
            if len(inside) > 1:
                names = ", ".join(p.name for p, _ in inside)
                raise InputError(f"{run} holds several runs ({names}): name one of them as --run")
            run, found = inside[0] if inside else (run, [])
        if found:
            return _run(run, found, None)
    return _run(run.parent, _found(run.parent), run.name) if run.parent.is_dir() else None


def results_of(folder: Path) -> Path | None:
    """The run whose results a folder holds that is not the run's own, by its pair.json."""
    said = _json(folder / "pair.json").get("run")
    of = Path(said) if isinstance(said, str) else None
    return of if of and of.resolve() != folder.resolve() and of.exists() else None


def _folders(run: Path) -> list[Path]:
    try:
        return sorted(p for p in run.iterdir() if p.is_dir())
    except OSError:
        return []


def _found(folder: Path) -> list[_Found]:
    """What of a folder has the name of a checkpoint."""
    found, plain = [], []
    try:
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return []
    for path in entries:
        of_folder = path.is_dir()
        weights = path.suffix == ".safetensors" or path.suffix in foreign.PICKLES
        if not (of_folder or weights) or (path / "snapshot.json").is_file():  # one of ours
            continue
        stem = path.name if of_folder else path.stem
        match, trainer = _match(stem, _NAMES | _FOLDERS if of_folder else _NAMES)
        if match is not None:
            groups = match.groupdict()
            unit = "step" if groups.get("step") else "epoch"
            number, time = int(groups[unit]), groups.get("time") or ""
            its_file = next((path / name for name in _ITS_FILES if (path / name).is_file()), path)
            found.append(_Found(its_file, trainer, groups["name"], unit, number, time))
        elif path.suffix == ".safetensors" or (path / "model_index.json").is_file():
            plain.append(path)
    names = {(f.trainer, f.name) for f in found}
    for path in plain:
        for trainer, name in sorted(names):
            if name and name == (path.name if path.is_dir() else path.stem):
                found.append(_Found(path, trainer, name, "", 0))
    if any(f.trainer == DIFFUSERS for f in found):
        if (folder / foreign.LORA).is_file():  # not the folder: results will be written into it
            found.append(_Found(folder / foreign.LORA, DIFFUSERS, "", "", 0))
        elif (folder / "model_index.json").is_file():
            found.append(_Found(folder, DIFFUSERS, "", "", 0))
    return found


def _match(stem: str, names: dict[str, str]) -> tuple[re.Match[str] | None, str]:
    for pattern, trainer in names.items():
        if match := re.fullmatch(pattern, stem):
            return match, trainer
    return None, ""


# ------------------------------------------------------------------------------------ the run
def _run(folder: Path, found: list[_Found], name: str | None) -> TrainerRun | None:
    """The run of the checkpoints that were found in a folder; of those of a name, if given."""
    groups: dict[tuple[str, str], list[_Found]] = {}
    for one in found:
        groups.setdefault((one.trainer, one.name), []).append(one)
    alone = len(groups) == 1
    if name is not None:
        stem = name.removesuffix(".safetensors")
        groups = {key: some for key, some in groups.items() if key[1] and key[1] == stem}
    if not groups:
        return None
    if len(groups) > 1:
        named = [f"{folder / n}" if n else f"those of {t}" for t, n in groups]
        raise InputError(
            f"{folder} holds checkpoints of several runs: name one of them as --run"
            f" {' or '.join(named)}, or move the others to a folder of their own"
        )
    ((trainer, named_by), own) = next(iter(groups.items()))
    notes = []
    usable = []
    for one in own:
        if why := _unreadable(one.path):
            notes.append(f"{one.path} is left out: {why}")
        else:
            one.metadata = _metadata(one.path)
            usable.append(one)
    if not usable:
        raise InputError(f"no checkpoint of {folder} can be read ({notes[0]})")
    trainer = SIMPLE_TUNER if _is_simple_tuner(trainer, own) else trainer
    facts = _facts(trainer, folder, usable)
    unit, checkpoints, more = _ordered(folder, usable, facts)
    said = (*notes, *more)
    return TrainerRun(folder, named_by, trainer, unit, checkpoints, facts, said, alone)


def _unreadable(path: Path) -> str:
    """Why a checkpoint cannot be read, by its layout alone; nothing where it can."""
    try:
        foreign.method_of(path)
        return ""
    except InputError as error:
        return str(error)


def _ordered(
    folder: Path, found: list[_Found], facts: Facts
) -> tuple[str, list[tuple[int, Path]], list[str]]:
    """What the checkpoints' numbers count, the checkpoints by them, and what is to be said.

    Steps are known from names or metadata. Epochs are counted only where some steps are not known.
    """
    notes = []
    numbered = [f for f in found if f.unit]
    if all(f.step is not None for f in numbered):
        unit, numbers = "step", {f.path: f.step or 0 for f in numbered}
    else:
        of_steps = [f for f in numbered if f.unit == "step"]
        unit = "step" if 2 * len(of_steps) > len(numbered) else "epoch"
        numbers = {f.path: f.number for f in numbered if f.unit == unit}
        notes += [
            f"{f.path} is left out: its name says its {f.unit}, and those of the others their"
            f" {unit}"
            for f in numbered
            if f.unit != unit
        ]
    times = [(f.time, f.number) for f in sorted(numbered, key=lambda f: f.time) if f.time]
    if any(b <= a for (_, a), (_, b) in zip(times, times[1:])):
        raise InputError(
            f"{folder} holds checkpoints of several runs, as steps begin anew after"
            f" {max(n for _, n in times)}: move those of the others to a folder of their own"
        )
    by_number: dict[int, Path] = {}
    for path, number in numbers.items():
        if number in by_number:
            notes.append(
                f"{path} is left out: {by_number[number].name} is of the same {unit} {number}"
            )
        else:
            by_number[number] = path
    for last in (f for f in found if not f.unit):
        highest = max(by_number, default=0)
        said = last.step if unit == "step" else None
        if said is None and by_number and _same(last.path, by_number[highest]):
            continue  # the last one was saved with its number too
        if said is None and unit == "step" and (facts.max_steps or 0) > highest:
            said = facts.max_steps
        if said is None:
            before = max((n for n in by_number if n < highest), default=0)
            said = highest + max(1, highest - before)
            notes.append(
                f"{last.path} does not say its {unit}: as the last one it is called {unit} {said}"
            )
        by_number.setdefault(said, last.path)
    return unit, sorted(by_number.items()), notes


def _same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same weights: those of a file, or of a denoiser."""
    from dreamblend.storage.snapshots import sha256

    files = [_weights(path) for path in (one, other)]
    if None in files:
        return False
    a, b = (file for file in files if file is not None)
    return a.stat().st_size == b.stat().st_size and sha256(a) == sha256(b)


def _weights(path: Path) -> Path | None:
    """The file of a checkpoint that says most: a LoRA, or the denoiser."""
    if path.is_file():
        return path
    for name in (foreign.LORA, foreign.PEFT):
        if (path / name).is_file():
            return path / name
    for denoiser in foreign.DENOISERS:
        for file in sorted((path / denoiser).glob("*.safetensors")):
            return file
    return None


def _is_simple_tuner(trainer: str, found: list[_Found]) -> bool:
    marks = ("training_state.json", "simpletuner_config.json")
    return trainer == DIFFUSERS and any((f.path / m).is_file() for f in found for m in marks)


# ------------------------------------------------------------------------------ what the files say
def _facts(trainer: str, folder: Path, found: list[_Found]) -> Facts:
    """What the last two checkpoints, and the settings beside the checkpoints, say. The very last
    one may be a file without the settings that the others have beside them.
    """
    last = sorted(found, key=lambda f: (f.unit != "", -f.number))[:2]
    clues = [clue for f in last for clue in _CLUES[trainer](folder, f.path, f.metadata)]
    clues += [clue for f in last for clue in _of_any(f.path, f.metadata)]
    bases = [str(value) for key, value in clues if key == "base" and value]
    denoisers = [value for key, value in clues if key == "denoiser" and value]
    subjects = [_subject(str(value)) for key, value in clues if key == "subject" and value]
    photos = [Path(str(value)).expanduser() for key, value in clues if key == "photos" and value]
    steps = [int(value) for key, value in clues if key == "steps" and str(value).isdecimal()]
    texts = dict.fromkeys(str(value) for key, value in clues if key == "subject" and value)
    known = [subject for subject in subjects if subject[0]]
    one = known[0] if len(set(known)) == 1 or trainer != KOHYA and known else (None, None)
    usable = [base for base in bases if _is_base(base)]
    hints = []
    if bases and not usable:
        hints.append(f"its base was called {bases[0]}")
    elif denoisers and not bases:
        hints.append(f"it was trained on the denoiser {denoisers[0]}")
    if texts and None in one:
        hints.append(f"it was trained on {', '.join(map(repr, list(texts)[:3]))}")
    return Facts(
        base=usable[0] if usable else None,
        identifier=one[0],
        class_noun=one[1],
        photos=next((path for path in photos if path.is_dir()), None),
        max_steps=steps[0] if steps else None,
        hints=tuple(hints),
    )


def _is_base(name: str) -> bool:
    """Whether a name can be loaded: a path that exists, or a hub id."""
    if os.path.exists(os.path.expanduser(name)):
        return True
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.startswith(".")


def _subject(text: str) -> tuple[str | None, str | None]:
    """Identifier and class noun in `a photo of sks dog`, `sks dog` or `sks`; (None, None) where
    that is not clear.
    """
    words = re.sub(r".*\bof\b", "", text.strip().rstrip("."), flags=re.IGNORECASE).split()
    if words and words[0].lower() in ("a", "an", "the"):
        words = words[1:]
    if not 1 <= len(words) <= 3:
        return None, None
    return words[0], " ".join(words[1:]) or None


Clues = Iterator[tuple[str, Any]]  # base, denoiser, subject, photos or steps -> what is said of it


def _of_any(path: Path, metadata: dict[str, str]) -> Clues:
    """What peft, diffusers and the model's own card say."""
    weights = _weights(path)
    if weights is not None and weights.name == foreign.PEFT:
        yield "base", _json(weights.with_name(foreign.PEFT_CONFIG)).get("base_model_name_or_path")
    yield "base", _first(_loads(metadata.get("lora_adapter_metadata")), "base_model_name_or_path")
    for denoiser in foreign.DENOISERS:
        yield "base", _json(path / denoiser / "config.json").get("_name_or_path")
    yield "base", _json(path / "model_index.json").get("_name_or_path")
    yield "subject", metadata.get("modelspec.trigger_phrase")


def _of_card(folder: Path) -> Clues:
    card = _text(folder / "README.md").split("---")
    said = _yaml(card[1]) if len(card) > 2 else {}
    yield "base", _first(said, "base_model")
    yield "subject", _first(said, "instance_prompt")


def _of_diffusers(folder: Path, path: Path, metadata: dict[str, str]) -> Clues:
    """The settings that accelerate logs with TensorBoard, and the card."""
    for file in sorted(folder.glob("logs/**/hparams.yml")):
        said = _yaml(_text(file))
        yield "base", _first(said, "pretrained_model_name_or_path")
        yield "subject", _first(said, "instance_prompt")
        yield "photos", _first(said, "instance_data_dir")
        yield "steps", _first(said, "max_train_steps")
    yield from _of_card(folder)


def _of_simple_tuner(folder: Path, path: Path, metadata: dict[str, str]) -> Clues:
    for place in (path, folder):
        said = {k.lstrip("-"): v for k, v in _json(place / "simpletuner_config.json").items()}
        yield "base", said.get("pretrained_model_name_or_path")
        yield "subject", said.get("instance_prompt")
        yield "steps", said.get("max_train_steps")
        data = _loads(_text(Path(str(said.get("data_backend_config") or "/nowhere"))))
        for backend in data if isinstance(data, list) else []:
            if isinstance(backend, dict) and backend.get("dataset_type", "image") == "image":
                yield "photos", backend.get("instance_data_dir")
                yield "subject", backend.get("instance_prompt")
    yield from _of_card(folder)


def _of_kohya(folder: Path, path: Path, metadata: dict[str, str]) -> Clues:
    """`ss_datasets` has the subject's words; without it the folders are named by them."""
    yield "base", metadata.get("ss_sd_model_name")
    yield "steps", metadata.get("ss_max_train_steps")
    data = _loads(metadata.get("ss_datasets"))
    tokens = [
        subset.get("class_tokens")
        for dataset in (data if isinstance(data, list) else [])
        for subset in dataset.get("subsets") or []
        if isinstance(subset, dict) and not subset.get("is_reg")
    ]
    folders = _loads(metadata.get("ss_dataset_dirs")) or _loads(metadata.get("ss_tag_frequency"))
    named = [re.fullmatch(r"\d+_(.+)", key) for key in folders or ()]
    yield from (("subject", text) for text in tokens if text)
    if not any(tokens):
        yield from (("subject", match[1].replace("_", " ")) for match in named if match)


def _of_ai_toolkit(folder: Path, path: Path, metadata: dict[str, str]) -> Clues:
    said = _yaml(_text(folder / "config.yaml"))
    yield "base", _first(said, "name_or_path")
    yield "subject", _first(said, "trigger_word")
    yield "photos", _first(said, "folder_path")
    yield "steps", _first(said, "steps")
    for name in _loads(metadata.get("ss_tag_frequency")) or ():
        yield "subject", re.sub(r"^\d+_", "", name)


def _of_one_trainer(folder: Path, path: Path, metadata: dict[str, str]) -> Clues:
    said = _loads(metadata.get("ot_config")) or {}
    yield "base", _first(said, "base_model_name")
    yield "photos", _first(_first(said, "concepts"), "path")


def _of_diffusion_pipe(folder: Path, path: Path, metadata: dict[str, str]) -> Clues:
    """The settings are copied to every checkpoint; those of the photos stay where they are. Newer
    families are trained on files of parts, of which none is a base.
    """
    for file in sorted((path if path.is_dir() else path.parent).glob("*.toml")):
        said = _toml(file)
        yield "base", _first(said, "diffusers_path") or _first(said, "checkpoint_path")
        yield "denoiser", _first(said, "diffusion_model") or _first(said, "transformer_path")
        yield "photos", _first(_toml(Path(str(said.get("dataset") or "/nowhere"))), "path")


_CLUES = {
    DIFFUSERS: _of_diffusers,
    SIMPLE_TUNER: _of_simple_tuner,
    KOHYA: _of_kohya,
    AI_TOOLKIT: _of_ai_toolkit,
    ONE_TRAINER: _of_one_trainer,
    DIFFUSION_PIPE: _of_diffusion_pipe,
}


# -------------------------------------------------------- files of settings, none of which must be
def _metadata(path: Path) -> dict[str, str]:
    weights = _weights(path)
    if weights is None:
        return {}
    try:
        with safe_open(weights, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8") if file.stat().st_size < _LONGEST else ""
    except (OSError, UnicodeDecodeError, ValueError):
        return ""


def _loads(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        return None


def _json(file: Path) -> dict[str, Any]:
    said = _loads(_text(file))
    return said if isinstance(said, dict) else {}


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(file))
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}


def _said(metadata: dict[str, str], key: str, inside: str) -> Any:
    return _first(_loads(metadata.get(key)), inside)


def _first(tree: Any, key: str, depth: int = 8) -> Any:
    """The first value of a key in nested settings: text or a number, or a list of settings."""
    if depth and isinstance(tree, dict):
        if tree.get(key) not in (None, "", {}):
            return tree[key]
        return next((v for x in tree.values() if (v := _first(x, key, depth - 1))), None)
    if depth and isinstance(tree, list):
        return next((v for x in tree if (v := _first(x, key, depth - 1))), None)
    return None
