"""What the benchmark of the sandbox measures and asks, as benchmarks/plan.yaml says it, or a file
like it, checked.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from benchmarks.training import IDENTIFIER, Recipe, Setting
from dreamblend.blending.blends import BLENDS
from dreamblend.errors import InputError
from dreamblend.sandbox import world
from dreamblend.selection.probes import PROBES
from dreamblend.tuning import METHODS

PATH = Path(__file__).parent / "plan.yaml"
# words of every prompt, and those that only lead to a context
_COMMON = set("a an the in on of at to next front wearing picture subject".split())


@dataclass(frozen=True)
class Plan:
    """A plan as its file says it: see its comments. `digest` is of the file."""

    written: datetime.date
    base: str
    speed: dict[str, float]
    chosen_on: tuple[str, ...]
    chosen_by: tuple[str, ...]
    seen_by_rule: tuple[str, ...]
    subjects: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: int
    sampling: int
    scale: float
    steps: tuple[int, ...]
    methods: tuple[Recipe, ...]
    questions: tuple[dict[str, Any], ...]
    digest: str

    def prompts_of(self, noun: str) -> tuple[str, ...]:
        return _said_of(noun, self.prompts)

    def chosen_by_prompts_of(self, noun: str) -> tuple[str, ...]:
        return _said_of(noun, self.chosen_by)

    @property
    def about(self) -> dict[str, str]:
        """What results say of it."""
        return {"written": str(self.written), "sha256": self.digest}


def named() -> tuple[Plan, ArgumentParser]:
    """The plan that the command line names by --plan, and a parser of that option alone."""
    asked = ArgumentParser(add_help=False)
    asked.add_argument("--plan", type=Path, default=PATH, help="what is measured and asked")
    return read(asked.parse_known_args()[0].plan), asked


def read(path: Path = PATH) -> Plan:
    """The plan of a file. What it does not say is that of the plan beside it that it is `like`.

    Raises InputError where it names what is not there, where a subject is one that settings were
    chosen on, or where a prompt has the context of a probe.
    """
    text = path.read_text()
    said = yaml.safe_load(text)
    if other := said.pop("like", None):
        whole = (path.parent / other).read_text()
        said, text = {**yaml.safe_load(whole), **said}, whole + text
    said["digest"] = hashlib.sha256(text.encode()).hexdigest()
    if odd := said.keys() ^ {field.name for field in fields(Plan)}:
        raise InputError(f"{path}: {', '.join(sorted(odd))} is unknown, or is not there")
    try:
        said["methods"] = [_recipe(dict(method)) for method in said["methods"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: a method or blend cannot be made ({error})") from error
    plan = Plan(**{name: tuple(v) if isinstance(v, list) else v for name, v in said.items()})
    known = [*plan.subjects, *plan.chosen_on, *plan.seen_by_rule]
    if twice := {name for name in known if known.count(name) > 1}:
        raise InputError(f"{path}: {', '.join(sorted(twice))} is in two lists of subjects")
    if strange := set(known) - set(world.SUBJECTS):
        raise InputError(f"{path}: the sandbox has no {', '.join(sorted(strange))}")
    for whose, others in (("probes", PROBES), ("chosen_by", plan.chosen_by)):
        if shared := context_words(plan.prompts) & context_words(others):
            raise InputError(f"{path}: {whose} ask for {', '.join(sorted(shared))}, too")
    return plan


def _said_of(noun: str, prompts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text.format(subject=f"{IDENTIFIER} {noun}") for text in prompts)


def context_words(prompts: Iterable[str]) -> set[str]:
    """The words of prompts that ask for something beside the subject."""
    return {word for prompt in prompts for word in re.findall(r"[a-z]+", prompt.lower())} - _COMMON


def _recipe(said: dict[str, Any]) -> Recipe:
    tuning = dict(said.pop("tuning"))
    method = METHODS[tuning.pop("method")]
    return Recipe(
        tuning=lambda: method(**tuning),
        blends=tuple(_setting(dict(blend)) for blend in said.pop("blends", ())),
        **{name: tuple(v) if isinstance(v, list) else v for name, v in said.items()},
    )


def _setting(said: dict[str, Any]) -> Setting:
    own = {name: said.pop(name) for name in ("pair", "grid") if name in said}
    if "pair" in own:
        own["pair"] = tuple(own["pair"])
    return Setting(BLENDS[said.pop("blend")](**said), **own)
