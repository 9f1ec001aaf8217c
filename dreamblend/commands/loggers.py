"""Where the curves and images of a run go, by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from dreamblend.errors import InputError

LOGGERS = ("tensorboard", "wandb", "csv", "none")


def make(name: str, run: Path) -> Logger | bool:
    """The logger of a run into its folder; False for none. Raises InputError where its package is
    missing.
    """
    if name not in LOGGERS:
        raise InputError(f"--logger is {name!r}: it is one of {', '.join(LOGGERS)}")
    if name == "none":
        return False
    if name == "csv":
        return CSVLogger(run)
    if name == "tensorboard":
        return TensorBoardLogger(run)
    if importlib.util.find_spec("wandb") is None:
        raise InputError("--logger wandb needs the package wandb: pip install wandb")
    return WandbLogger(name=run.name, save_dir=run, project="dreamblend")
