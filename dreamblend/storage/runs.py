"""A run as `select` and `predict` see it: its snapshots in order, its base, its subject, its
photos. Of train.py, whose snapshots say all of it, or of another trainer, where the user may have
to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dreamblend.errors import InputError
from dreamblend.storage import snapshots, trainers
from dreamblend.storage.snapshots import About, Snapshot
from dreamblend.storage.trainers import TrainerRun

# what may be missing -> what a sentence calls it
_ASKED = {
    "base": "base",
    "identifier": "identifier (the word for the subject, such as sks)",
    "class_noun": "class noun (what the subject is, such as mug)",
    "photos": "photos",
}
# what a user may have to say of another trainer's run; kept in its pair.json
SUBJECT = (
    *("base", "base_config", "base_prediction", "revision", "variant"),
    *("identifier", "class_noun", "photos"),
)


@dataclass(frozen=True)
class Run:
    """A run, and what is known of it.

    Args:
        path: as the user names it.
        of: the run itself, where `path` holds its results alone.
        results: the folder that keeps what is measured of it.
        other: what was recognised of another trainer's; None of train.py's.
        base, base_config, base_prediction, revision, variant: what it was tuned from, as
            `load_base` takes it; the last two of train.py's where the user names others.
        identifier, class_noun: how prompts name the subject.
        photos: folder of the subject's photos.
    """

    path: Path
    of: Path
    results: Path
    other: TrainerRun | None = None
    base: str | None = None
    base_config: str | None = None
    base_prediction: str | None = None
    identifier: str | None = None
    class_noun: str | None = None
    photos: Path | None = None
    revision: str | None = None
    variant: str | None = None

    @cached_property
    def snapshots(self) -> dict[int, Snapshot]:
        """By step, or by epoch where steps are not known. Read and verified once."""
        return {step: snapshots.read(path) for step, path in snapshots.find(self.path)}

    @property
    def about(self) -> About | None:
        """The record of its snapshots; None of another trainer's run."""
        return next(iter(self.snapshots.values())).about

    @property
    def method(self) -> str:
        return next(iter(self.snapshots.values())).method

    @property
    def unit(self) -> str:
        """What the snapshots' numbers count."""
        return self.other.unit if self.other else "step"

    @property
    def told(self) -> dict[str, object]:
        """What pair.json says for whoever opens the run next: the run whose results are elsewhere,
        and the base and the subject that its own files may not say.
        """
        elsewhere = self.results.resolve() != (self.other.path if self.other else self.of).resolve()
        said = {name: value for name in SUBJECT if (value := getattr(self, name)) is not None}
        return {
            **({"run": str(self.of.resolve())} if elsewhere else {}),
            **({"told": {k: str(v) for k, v in said.items()}} if self.other else {}),
        }

    def demand(self, *names: str, option: str = "--") -> None:
        """Raise InputError, one sentence for all of it, where some of base, identifier, class_noun
        and photos is not known. `option` is how the command's options for them begin.
        """
        lacking = [name for name in names if not getattr(self, name)]
        if not lacking:
            return
        of = self.other.trainer if self.other else "train.py"
        said = self.other.facts.hints if self.other else ()
        hints = f" ({'; '.join(said)})" if said else ""
        what = _listed([_ASKED[name] for name in lacking])
        options = _listed([f"{option}{name}" for name in lacking])
        raise InputError(
            f"the files of {self.path}, a run of {of}, do not say its {what}{hints}: give"
            f" {'it' if len(lacking) == 1 else 'them'} with {options}"
        )


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def open_run(
    run: Path,
    *,
    base: str | None = None,
    base_config: str | None = None,
    base_prediction: str | None = None,
    identifier: str | None = None,
    class_noun: str | None = None,
    photos: Path | None = None,
    results: Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Run:
    """The run in a folder, of train.py or of another trainer. What is given here wins over what its
    files say.

    Raises InputError where the folder holds no run, or several.
    """
    found = snapshots.find(run)
    within = trainers.results_of(run)
    of = within or run
    if (of / "snapshots").is_dir():
        about = snapshots.read(found[0][1]).about
        assert about is not None  # a run's snapshots have a record, or `read` refuses them
        known = Run(
            run,
            of,
            run,
            base=about.base,
            base_config=about.settings.get("base_config"),
            base_prediction=about.settings.get("base_prediction"),
            identifier=about.identifier,
            class_noun=about.class_noun,
            photos=Path(about.settings["instance_dir"]),
        )
    else:
        other = trainers.recognise(of)
        assert other is not None  # `find` has found it
        facts = other.facts
        known = Run(
            run,
            of,
            run if within else other.results,
            other,
            base=facts.base,
            identifier=facts.identifier,
            class_noun=facts.class_noun,
            photos=facts.photos,
        )
        known = replace(known, **_told(results or known.results))
    given: dict[str, Any] = {
        "base": base,
        "base_config": base_config,
        "base_prediction": base_prediction,
        "identifier": identifier,
        "class_noun": class_noun,
        "photos": photos,
        "results": results,
        "revision": revision,
        "variant": variant,
    }
    return replace(known, **{name: value for name, value in given.items() if value is not None})


def filled(run: Path | None, **given: Any) -> dict[str, Any]:
    """What is given of the base and the subject, as `open_run` takes them, and for what is None
    what the files of another trainer's run say. Snapshots of train.py say it themselves.
    """
    if run is None or (run / "snapshots").is_dir():
        return given
    known = open_run(run, **given)
    return {name: getattr(known, name) for name in given} if known.other else given


def _told(results: Path) -> dict[str, Any]:
    """What `select` was told of another trainer's run, by its pair.json."""
    try:
        told = json.loads((results / "pair.json").read_text(encoding="utf-8"))["told"]
        said = {name: str(told[name]) for name in SUBJECT if name in told}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: Path(value) if name == "photos" else value for name, value in said.items()}
