"""Saves the state from which an interrupted run continues, and stops a run at such a state when a
signal asks for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

from dreamblend.callbacks.snapshots import SnapshotCheckpoint
from dreamblend.errors import InputError, is_lost_process
from dreamblend.storage import snapshots
from dreamblend.trainer import callbacks

NAME = "resume.ckpt"
# Ctrl-C; kill, also by SLURM; SLURM's --signal=USR2@120. Of two, the later one here counts
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run it again
SHARE = 0.01  # of the time of a run that its states may take
APART = 60.0  # seconds between two states, at least


def wait_after(took: float) -> float:
    """Seconds from a state, which took this many, to the next one."""
    return max(APART, took / SHARE)


class Straight(TorchCheckpointIO):
    """Writes straight to the file. Lightning's own first makes the whole file in memory, twice:
    31 GB for all weights of Stable Diffusion with their averages and moments.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        torch.save(checkpoint, path)


class ResumeState(Checkpoint):
    """Writes `RUN/resume.ckpt` (weights in training, averages, optimizer, schedule, loops), at the
    last step too, so that a finished run can be trained on.

    SIGUSR2, SIGTERM and Ctrl-C only set a flag. All processes agree on it at the end of a whole
    optimizer step, as half-accumulated gradients would be lost. Then they write the state and end,
    the first with status 75, or 130 after Ctrl-C. A SLURM job that got SIGUSR2 is requeued. A
    second Ctrl-C ends the run at once.

    Args:
        every: optimizer steps between two states, for interruptions without a signal. If None, a
            minute is between them, or as much more as keeps what they take below 1 % of the run. 0
            saves only at a signal.
        keep: keep the state of a finished run. False removes it when the last snapshot is on disk.
    """

    def __init__(self, every: int | None = None, keep: bool = True):
        super().__init__()
        if every is not None and every < 0:
            raise InputError(
                f"ResumeState's every is {every}: it is a number of optimizer steps, or 0"
            )
        self.every, self.keep = every, keep
        self._asked = 0  # 1 + the index in SIGNALS; 0 for no signal
        self._seen = 0
        self._due = 0.0  # when the next state is due, by the clock

    @property
    def state_key(self) -> str:
        return "ResumeState"

    # -- at the start
    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            # Lightning would save inside the signal's handler, which can hang
            environment.auto_requeue = False
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = Straight()
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / f".{NAME}.part").unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Register the handlers. Lightning has registered its own by now, which would stop a run in
        the middle of a step; at the end it removes both.
        """
        self._seen, self._asked = trainer.global_step, 0
        self._due = time.monotonic() + APART
        for number in SIGNALS:
            signal.signal(number, self._ask)
        if self._seen:
            rank_zero_info(f"going on at step {self._seen}")

    def _ask(self, number: int, _) -> None:
        if number == signal.SIGINT and self._asked:
            raise KeyboardInterrupt
        self._asked = max(self._asked, 1 + SIGNALS.index(number))

    # -- at every step
    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen:
            return  # the gradients are still being accumulated
        self._seen = step = trainer.global_step
        asked, due = self._agreed(trainer, step)
        if step >= trainer.max_steps > 0:  # the run ends here anyway
            if self.keep:
                self.save(trainer)
            return
        if asked or due:
            self.save(trainer)
        if asked:
            self._stop(trainer, asked)

    def _agreed(self, trainer: L.Trainer, step: int) -> tuple[signal.Signals | None, bool]:
        """The signal that any process got, as it may not have reached all of them yet, and whether
        any process's clock says that a state is due. A single process does not communicate.
        """
        if self.every is None:
            due = time.monotonic() >= self._due
        else:
            due = self.every > 0 and step % self.every == 0
        asked = self._asked
        if trainer.world_size > 1:
            here = torch.tensor([asked, int(due)], device=trainer.strategy.root_device)
            asked, due = trainer.strategy.reduce(here, reduce_op="max").tolist()
        return SIGNALS[asked - 1] if asked else None, bool(due)

    def save(self, trainer: L.Trainer) -> None:
        """Write the state, complete or not at all. Every process calls this."""
        started = time.monotonic()
        for callback in callbacks(trainer):
            if isinstance(callback, SnapshotCheckpoint):
                # a run that continues from here does not make the snapshots of earlier steps
                callback.join()
        final = Path(trainer.default_root_dir) / NAME
        part = final.with_name(f".{NAME}.part")
        try:
            trainer.save_checkpoint(part, weights_only=False)  # with the optimizer
            if trainer.is_global_zero:
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(part, final)
        except (OSError, RuntimeError) as error:
            # torch's writer raises RuntimeError if the disk is full
            if is_lost_process(error):
                raise
            part.unlink(missing_ok=True)
            raise InputError(
                f"cannot write {final}: {error}; the snapshots are intact: free space, and run the"
                " same command to go on"
            ) from error
        now = time.monotonic()
        self._due = now + wait_after(now - started)

    def _stop(self, trainer: L.Trainer, asked: signal.Signals) -> None:
        if not trainer.is_global_zero:
            # srun and Lightning's launcher kill the first process if another one ends with an error
            raise SystemExit(0)
        how = (
            "the job was requeued"
            if asked == signal.SIGUSR2 and _requeue()
            else "run the same command to go on"
        )
        print(
            f"stopped at step {trainer.global_step}, and its state is in"
            f" {trainer.default_root_dir}: {how}",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(130 if asked == signal.SIGINT else STOPPED)

    # -- at the end
    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        run = Path(trainer.default_root_dir)
        last = snapshots.folder(run / "snapshots", trainer.global_step)
        if trainer.is_global_zero and last.is_dir() and not self.keep:
            (run / NAME).unlink(missing_ok=True)


def _requeue() -> bool:
    """Ask SLURM to run this job again. Returns whether it will: False outside of a SLURM job."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        # SLURM_JOB_ID of one task can be the id of the whole array
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        # SLURM sends SIGTERM to every process of a requeued job, also to this command
        return subprocess.run(["scontrol", "requeue", job], check=False).returncode in (
            0,
            -signal.SIGTERM,
        )
    except OSError:
        return False
