"""Keeps what an interrupted run needs to go on by itself, and stops a run that is asked to at a
point from which it can.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

from dreamblend.callbacks.snapshots import SnapshotCheckpoint
from dreamblend.errors import InputError, is_lost_process
from dreamblend.storage import snapshots
from dreamblend.trainer import callbacks

NAME = "resume.ckpt"
SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR2,
)  # Ctrl-C; anyone's kill, also SLURM's; SLURM's --signal=USR2@120. Of two the later counts
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: to be run again


class ResumeState(Checkpoint):
    """Writes `RUN/resume.ckpt` (weights in training, averages, optimizer, schedule, loops) and
    removes it when the run's last snapshot is on disk.

    SIGUSR2, SIGTERM and Ctrl-C only set a flag. All processes agree on it at the end of a whole
    optimizer step (gradients that were accumulated half would be lost), write the state and end:
    the first with status 75, or 130 after Ctrl-C. In a SLURM job that got SIGUSR2 the job is
    requeued. A second Ctrl-C ends at once.

    Args:
        every: optimizer steps between two states, for what no signal announces; 0 for none but at a
            signal.
    """

    def __init__(self, every: int = 100):
        super().__init__()
        if every < 0:
            raise InputError(
                f"ResumeState's every is {every}: it is a number of optimizer steps, or 0"
            )
        self.every = every
        self._asked = 0  # 1 + the place in SIGNALS
        self._seen = 0

    @property
    def state_key(self) -> str:
        return "ResumeState"

    # -- at the start
    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = (
                False  # Lightning's saves inside the signal's handler, and can hang
            )
        if trainer.is_global_zero:
            (Path(trainer.default_root_dir) / f".{NAME}.part").unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """After Lightning has registered its own handlers, which would stop a run where they find
        it; it removes these with them.
        """
        self._seen, self._asked = trainer.global_step, 0
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
            return  # gradients are being accumulated
        self._seen = step = trainer.global_step
        asked = self._agreed(trainer)
        if step >= trainer.max_steps > 0:
            return  # it ends by itself
        if asked or (self.every and step % self.every == 0):
            self.save(trainer)
        if asked:
            self._stop(trainer, asked)

    def _agreed(self, trainer: L.Trainer) -> signal.Signals | None:
        """What any process was asked by, as it need not have reached all of them yet; with one
        process no communication.
        """
        asked = self._asked
        if trainer.world_size > 1:
            asked = int(
                trainer.strategy.reduce(
                    torch.tensor(asked, device=trainer.strategy.root_device), reduce_op="max"
                )
            )
        return SIGNALS[asked - 1] if asked else None

    def save(self, trainer: L.Trainer) -> None:
        """Write the state, whole or not at all. Every process calls this."""
        for callback in callbacks(trainer):
            if isinstance(callback, SnapshotCheckpoint):
                # a run that goes on from here makes none of the earlier steps' snapshots
                callback.join()
        final = Path(trainer.default_root_dir) / NAME
        part = final.with_name(f".{NAME}.part")
        try:
            trainer.save_checkpoint(part, weights_only=False)  # the optimizer, too
            if trainer.is_global_zero:
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(part, final)
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch's writer raises the second where the disk is full
            if is_lost_process(error):
                raise
            part.unlink(missing_ok=True)
            raise InputError(
                f"cannot write {final}: {error}; the snapshots are intact: free space, and run the"
                " same command to go on"
            ) from error

    def _stop(self, trainer: L.Trainer, asked: signal.Signals) -> None:
        if not trainer.is_global_zero:
            raise SystemExit(
                0
                # the first process ends for all: srun and Lightning's launcher kill it where
                # another one ends badly
            )
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
        if (
            trainer.is_global_zero
            and snapshots.folder(run / "snapshots", trainer.global_step).is_dir()
        ):  # what a run is for
            (run / NAME).unlink(missing_ok=True)


def _requeue() -> bool:
    """Ask SLURM to run this job again; whether this is such a job."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    if array := os.environ.get(
        "SLURM_ARRAY_JOB_ID"
    ):  # one task's id can be that of the whole array
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        # SLURM sends SIGTERM to all of a job that it requeues, to this command too
        return subprocess.run(["scontrol", "requeue", job], check=False).returncode in (
            0,
            -signal.SIGTERM,
        )
    except OSError:
        return False
