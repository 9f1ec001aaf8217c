"""Runs that benchmarks measure: trained where they are not there yet."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import lightning as L
import torch

from callbacks import SnapshotCheckpoint, WeightEMA
from dreamblend.sandbox import world
from dreamblend.storage import snapshots
from dreamblend.training.data import SubjectData
from dreamblend.training.module import Tuner
from dreamblend.tuning import Method

IDENTIFIER = "sks"


def render_photos(subject: str, folder: Path) -> Path:
    """The photos of a subject of the sandbox, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, photo in enumerate(world.photos(subject)):
        photo.save(folder / f"{i}.png")
    return folder


def places(noun: str) -> list[str]:
    """Prompts for the subject in every place where it was not photographed."""
    return [
        f"a {IDENTIFIER} {noun} {place}" for place in world.PLACES if place not in world.HOME_PLACES
    ]


def tune(
    base: str,
    tuning: Method,
    rate: float,
    photos: Path,
    class_noun: str,
    steps: list[int],
    run: Path,
    decay: float = 0.97,
    **data,
) -> Path:
    """Fine-tune into `run`, with averaged weights in its snapshots as the recipes in configs/ have
    them; nothing where its last one is there.

    A run that was interrupted begins anew: it is short beside what is drawn with it.
    """
    if snapshots.folder(run / "snapshots", steps[-1]).exists():
        return run
    shutil.rmtree(run, ignore_errors=True)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    L.seed_everything(0, verbose=False)
    callbacks = [WeightEMA(decay=decay), SnapshotCheckpoint(steps)]
    trainer = L.Trainer(
        max_steps=steps[-1],
        default_root_dir=run,
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        callbacks=callbacks,
        logger=False,
        enable_model_summary=False,
    )
    trainer.fit(
        Tuner(base, tuning=tuning, rate=rate, warmup=10),
        SubjectData(photos, class_noun, IDENTIFIER, batch_size=4, **data),
    )
    return run
