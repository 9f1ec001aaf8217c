"""What the processes of one run do together, so that none waits for a process that has ended."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

from dreamblend.errors import InputError

if TYPE_CHECKING:
    import lightning as L

__all__ = [
    "first_alone",
    "gathered",
    "rank_zero_only",
    "rank_zero_warn",
]  # Lightning's, without Lightning


def _rank() -> int:
    """The rank of this process, before there is a trainer that knows it."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # as Lightning reads them
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


if not hasattr(rank_zero_only, "rank"):  # importing Lightning sets it in the same way
    rank_zero_only.rank = _rank()  # type: ignore[attr-defined]  # what its own docstring asks for


@atexit.register
def _leave() -> None:
    """Leave the process group before the interpreter ends. Gloo's threads may otherwise abort a
    process whose work is done, and Lightning then kills the others; of NCCL's it does this itself.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


Item = TypeVar("Item")


def gathered(items: list[Item]) -> list[Item]:
    """The items of all processes, in the order of their ranks. Every process calls this."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return items
    of_each: list[list[Item]] = [[]] * dist.get_world_size()
    dist.all_gather_object(of_each, items)
    return list(chain.from_iterable(of_each))


def first_alone(trainer: L.Trainer, work: Callable[[], None]) -> None:
    """Let the first process do `work` while the others wait. Every process calls this.

    If `work` raises InputError, the first process raises it, and the others exit with the same
    status and no message.
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
