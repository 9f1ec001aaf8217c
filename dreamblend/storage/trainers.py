"""The runs of other trainers: which files of a folder are checkpoints, and in which order.

    diffusers' scripts, SimpleTuner   checkpoint-500/, and the folder itself at the end
    kohya sd-scripts, musubi-tuner    mug-000004 (epoch), mug-step00001500, mug at the end
    ai-toolkit                        mug_000001500, mug at the end; config.yaml
    OneTrainer                        save/2026-01-31_10-00-00-save-1500-4-0: step, epoch, its step
    diffusion-pipe                    epoch4/ or step1500/, in a folder named by the time; in it the
                                      file of diffusers, of peft, lora (SDXL) or model (all weights)

Only names, headers and settings are read here, and nothing is unpickled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from dreamblend.errors import InputError
from dreamblend.storage import foreign
from dreamblend.storage.trainer_files import (
    AI_TOOLKIT,
    DIFFUSERS,
    DIFFUSION_PIPE,
    KOHYA,
    ONE_TRAINER,
    SIMPLE_TUNER,
    Facts,
    read_facts,
    read_json,
    read_metadata,
    said_step,
    weights_file,
)

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
        said = said_step(self.metadata)
        return self.number if said is None and self.unit == "step" else said


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
    said = read_json(folder / "pair.json").get("run")
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
            one.metadata = read_metadata(one.path)
            usable.append(one)
    if not usable:
        raise InputError(f"no checkpoint of {folder} can be read ({notes[0]})")
    trainer = SIMPLE_TUNER if _is_simple_tuner(trainer, own) else trainer
    # the very last one may be a file without the settings that the others have beside them
    last = sorted(usable, key=lambda one: (one.unit != "", -one.number))[:2]
    about = read_facts(trainer, folder, [(one.path, one.metadata) for one in last])
    unit, checkpoints, more = _ordered(folder, usable, about)
    said = (*notes, *more)
    return TrainerRun(folder, named_by, trainer, unit, checkpoints, about, said, alone)


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

    files = [weights_file(path) for path in (one, other)]
    if None in files:
        return False
    a, b = (file for file in files if file is not None)
    return a.stat().st_size == b.stat().st_size and sha256(a) == sha256(b)


def _is_simple_tuner(trainer: str, found: list[_Found]) -> bool:
    marks = ("training_state.json", "simpletuner_config.json")
    return trainer == DIFFUSERS and any((f.path / m).is_file() for f in found for m in marks)
