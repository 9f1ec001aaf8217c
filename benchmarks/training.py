"""Subjects and how they are trained: the runs that benchmarks measure, made where they are not
there yet, and their snapshots one by one.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tqdm import tqdm

from dreamblend.blending.blends import Blend
from dreamblend.blending.models import Models
from dreamblend.blending.pair import Pair
from dreamblend.callbacks import SnapshotCheckpoint, WeightEMA
from dreamblend.commands.fit import CLIP
from dreamblend.evaluation.bench import Bench, means
from dreamblend.models import load_backbone
from dreamblend.sandbox import world
from dreamblend.selection.probes import PROBES
from dreamblend.storage import snapshots
from dreamblend.training.data import SubjectData
from dreamblend.training.module import Tuner
from dreamblend.tuning import Method, restore

IDENTIFIER = "sks"


@dataclass(frozen=True)
class Subject:
    """Whom a benchmark asks for, and in which prompts (with the identifier)."""

    name: str
    photos: Path
    class_noun: str
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """A blend as it is measured: of a pair, and with a grid of attention sites, of its own where
    these are not None.
    """

    blend: Blend
    pair: tuple[int, int] | None = None
    grid: int | None = None

    @property
    def label(self) -> str:
        """The blend with all of its settings, as a point is kept: "cag strength=0.3 window=0.0-0.6
        repeats=1 of 25+400".
        """
        return self._called(vars(self.blend))

    @property
    def shown(self) -> str:
        """The same with the settings that are not the default's: "cag strength=0.3 of 25+400"."""
        default = vars(type(self.blend)())
        return self._called({k: v for k, v in vars(self.blend).items() if v != default[k]})

    def _called(self, settings: dict) -> str:
        def plain(v):
            return "-".join(map(str, v)) if isinstance(v, tuple | list) else str(v)

        words = [self.blend.name, *(f"{k}={plain(v)}" for k, v in settings.items())]
        words += [f"of {self.pair[0]}+{self.pair[1]}"] if self.pair else []
        return " ".join([*words, *([f"on {self.grid} x {self.grid}"] if self.grid else [])])

    @property
    def settings(self) -> dict:
        """As `dreamblend.evaluation.outcome` takes them."""
        pair = dict(zip(("early", "late"), self.pair or ()))
        grid = {"grid": self.grid} if self.grid else {}
        return {**self.blend.settings, **pair, **grid, "shown": self.shown}


@dataclass(frozen=True)
class Recipe:
    """A tuning method with its settings, and the pair of snapshots that its blends are of. `steps`
    are its snapshots, where they are not those of all.
    """

    name: str
    tuning: Callable[[], Method] | None
    rate: float
    pair: tuple[int, int] | None = None
    blends: tuple[Setting, ...] = ()
    priors: int = 0  # class images of prior preservation
    steps: tuple[int, ...] | None = None

    def within(self, steps: tuple[int, ...]) -> Recipe:
        """The same of these snapshots and no other: of the first and the last, where its pair is
        not among them; blends of other pairs that are not are left out.
        """
        inside = self.pair is None or set(self.pair) <= set(steps)
        return replace(
            self,
            pair=self.pair if inside else (steps[0], steps[-1]),
            blends=tuple(s for s in self.blends if set(s.pair or ()) <= set(steps)),
            steps=None,
        )

    @property
    def settings(self) -> dict:
        return {
            "tuning": self.tuning().settings if self.tuning else None,
            "rate": self.rate,
            "pair": self.pair,
            "priors": self.priors,
        }


def device() -> str:
    """Where it is drawn: on the GPU where there is one. (Lightning chooses so for the training.)"""
    return "cuda" if torch.cuda.is_available() else "cpu"


# ----------------------------------------------------------------------------- subjects
def render_photos(subject: str, folder: Path) -> Path:
    """The photos of a subject of the sandbox, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, photo in enumerate(world.photos(subject)):
        photo.save(folder / f"{i}.png")
    return folder


def places(noun: str) -> tuple[str, ...]:
    """Prompts for the subject in every place where it was not photographed and that no probe asks
    for.
    """
    return tuple(
        f"a {IDENTIFIER} {noun} {place}"
        for place in world.PLACES
        if place not in world.HOME_PLACES and not any(place in probe for probe in PROBES)
    )


def sandbox_subject(
    name: str, photos: Path, prompts: Callable[[str], tuple[str, ...]] = places
) -> Subject:
    """A subject of the sandbox, its photos in a folder of their own, and its class's prompts."""
    noun = world.SUBJECTS[name].noun
    return Subject(name, render_photos(name, photos), noun, prompts(noun))


# --------------------------------------------------------------------------------------- runs
def make_trainer(run: Path, max_steps: int, callbacks: list[L.Callback], **settings) -> L.Trainer:
    """A trainer into an empty folder as the recipes in configs/ have it, but for its previews: with
    averaged weights and clipped gradients. `settings` are the Trainer's.
    """
    shutil.rmtree(run, ignore_errors=True)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*is already configured as.*")
    L.seed_everything(0, verbose=False)
    return L.Trainer(
        max_steps=max_steps,
        default_root_dir=run,
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        callbacks=[WeightEMA(0.97), *callbacks],
        enable_model_summary=False,
        gradient_clip_val=CLIP,
        **settings,
    )


def tune(
    base: str,
    recipe: Recipe,
    subject: Subject,
    steps: Sequence[int],
    run: Path,
    class_images_dir: Path | None = None,
) -> Path:
    """Fine-tune into `run`; nothing where its last snapshot is there.

    A run that was interrupted begins anew: it is short beside what is drawn with it.
    """
    if snapshots.folder(run / "snapshots", steps[-1]).exists():
        return run
    trainer = make_trainer(run, steps[-1], [SnapshotCheckpoint(list(steps))], logger=False)
    priors = (
        {"num_class_images": recipe.priors, "class_images_dir": class_images_dir}
        if recipe.priors
        else {}
    )
    trainer.fit(
        Tuner(base, tuning=recipe.tuning(), learning_rate=recipe.rate, lr_warmup_steps=10),
        SubjectData(subject.photos, subject.class_noun, IDENTIFIER, batch_size=4, **priors),
    )
    return run


def bench_of(subject: Subject, seeds: Sequence[int], sampling: int, **settings: Any) -> Bench:
    """What draws and judges a subject in its prompts, where it is drawn. `settings` are Bench's."""
    of = (subject.photos, IDENTIFIER, subject.class_noun, list(subject.prompts), list(seeds))
    return Bench(*of, sampling, device=device(), **settings)


def load_pair(
    run: Path, pair: Sequence[int], base: str, dtype: torch.dtype = torch.float32
) -> Models:
    """Two snapshots of a run, by their steps, where it is drawn."""
    models = Models.load(Pair.find(run, *map(str, pair)), base)
    models.to(device(), dtype)
    return models


def singles(bench: Bench, base: str, run: Path) -> dict[int, dict]:
    """Step -> means of what each snapshot of a run draws alone; step 0 is the untuned base."""
    backbone = load_backbone(base).to(device())
    found = {0: means(bench.single(backbone))}
    for step, path in tqdm(snapshots.find(run), desc=f"snapshots of {run}"):
        single = restore(snapshots.read(path), backbone, "single").to(device())
        found[step] = means(bench.single(single))
        backbone.forget("single")
    return found
