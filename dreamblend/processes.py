"""What the processes of one run do together, so that none waits for one that has ended."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L

from dreamblend.errors import InputError


def first_alone(trainer: L.Trainer, work: Callable[[], None]) -> None:
    """Let the first process do `work` while the others wait; where it raises InputError, they end
    too. Every process calls this.

    The first one tells the error; the others end with its status and say nothing.
    """
    error: InputError | None = None
    if trainer.is_global_zero:
        try:
            work()
        except InputError as raised:
            error = raised
    failed = trainer.strategy.broadcast(error is not None)
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)
