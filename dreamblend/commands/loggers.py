"""Where the curves and images of a run go, by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from dreamblend.errors import InputError, one_line

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
    _log_in()
    return WandbLogger(name=run.name, save_dir=run, project="dreamblend")


def _log_in() -> None:
    """Ask for a key now where there is a terminal to ask at, and not after the model is loaded.
    Every process does: one that cannot log in would leave the others waiting for it.
    """
    import wandb

    try:
        wandb.login()
    except wandb.errors.UsageError as error:
        raise InputError(
            f"--logger wandb cannot log in ({one_line(error)}): run wandb login, or set"
            " WANDB_MODE=offline"
        ) from error
