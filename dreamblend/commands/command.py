"""The LightningCLI that `fit` and `predict` share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from dreamblend.errors import InputError, explained, one_line, raised_by
from dreamblend.options import Parser, arranged, home


class LightningParser(Parser, LightningArgumentParser):
    """Lightning's parser with our error messages."""


class Command(LightningCLI):
    """Options win over --config files, and a wrong setting is an InputError."""

    def __init__(
        self, model: type[L.LightningModule], data: type[L.LightningDataModule], **settings: Any
    ):
        super().__init__(model, data, parser_class=LightningParser, **settings)

    def _set_seed(self) -> None:
        with _settings():
            super()._set_seed()

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = home(parser.parse_args(arranged(sys.argv[1:])))

    def instantiate_classes(self) -> None:
        with _settings():
            super().instantiate_classes()


@contextmanager
def _settings() -> Iterator[None]:
    """Turn what Lightning or jsonargparse refuses before anything runs into an InputError about
    the settings.
    """
    try:
        yield
    except ModuleNotFoundError as error:  # of a logger, such as wandb
        raise InputError(f"these settings need a package: {one_line(error)}") from error
    except (ValueError, TypeError) as error:
        if (
            isinstance(error, InputError)
            or explained(error)
            or not raised_by(error).startswith(("lightning", "jsonargparse"))
        ):
            raise
        raise InputError(f"these settings cannot be used: {one_line(error)}") from error
