"""What Lightning's trainer holds, with the types that Lightning itself does not declare."""

from __future__ import annotations

from typing import TypeVar

import lightning as L

Data = TypeVar("Data", bound=L.LightningDataModule)


def callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """The list of a trainer's callbacks. A change of the list changes what the trainer calls."""
    return trainer.callbacks  # type: ignore[attr-defined]  # its connector sets it


def datamodule(trainer: L.Trainer, kind: type[Data]) -> Data:
    """The trainer's datamodule, which is of `kind` in every run of the commands."""
    data = trainer.datamodule  # type: ignore[attr-defined]  # its connector sets it
    assert isinstance(data, kind), f"the trainer has a {type(data).__name__}, no {kind.__name__}"
    return data
