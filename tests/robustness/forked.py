"""Processes forked from one that has imported the libraries: an entry point each, or the members of
one distributed run.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

PATIENCE = 120  # seconds after which a process is taken to hang
WRITES = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
}  # Python's audit events


class Wrong(Exception):
    """What was found not to be as it should be."""


def demand(holds: object, what: str) -> None:
    if not holds:
        raise Wrong(what)


@dataclass
class Run:
    """A forked process that runs an entry point; `writes` counts what it does to files below
    `folder`.
    """

    process: multiprocessing.Process
    log: Path
    writes: object
    reached: object  # an event: the write at which it is to be killed

    def end(self, patience: float = PATIENCE) -> int:
        """Its exit status: -9 where it was killed. Raises Wrong where it hangs."""
        self.process.join(patience)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise Wrong(f"hung for {patience:.0f} seconds")
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    @property
    def said(self) -> str:
        """Nothing yet, where it has not come to open its log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def begin(
    main: Callable[[], None],
    words: list[object],
    folder: Path,
    log: Path,
    at: int = 0,
    most: int | None = None,
    environment: dict[str, str] = {},
) -> Run:
    """Run `main` with a command line.

    Args:
        at: the write (from 1) below `folder` at which `Run.reached` is set.
        most: bytes that no file may exceed, where given.
    """
    context = multiprocessing.get_context("fork")
    writes, reached = context.Value("i", 0, lock=False), context.Event()

    def work() -> None:
        torch.set_num_threads(1)
        os.environ.update(environment)
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

        def count(event: str, args: tuple) -> None:
            if (
                event in WRITES
                and isinstance(args[0], str | os.PathLike)
                and str(args[0]).startswith(str(folder))
            ):
                writes.value += 1
                if writes.value == at:
                    reached.set()

        sys.addaudithook(count)
        sys.argv = [f"{main.__module__}.py", *map(str, words)]
        main()

    process = context.Process(target=work, daemon=True)
    process.start()
    return Run(process, log, writes, reached)


def torchrun(processes: int) -> list[dict[str, str]]:
    """The environments that torchrun gives to so many processes of this machine, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "one",
    }
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
