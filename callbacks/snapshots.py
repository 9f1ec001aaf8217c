"""Keeps the chosen early and late snapshots of a training run."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from dreamblend import snapshots
from dreamblend.errors import InputError
from dreamblend.snapshots import Weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def log_spaced(count: int, last: int) -> list[int]:
    """`count` steps from last / 100 to last, evenly spaced in their logarithm: early snapshots differ more than late ones."""
    return sorted({round(s) for s in np.geomspace(max(1, last / 100), last, count)})


class SnapshotCheckpoint(Checkpoint):
    """Writes `RUN/snapshots/step-NNNNNN` at chosen optimizer steps and never removes one.

    The weights are copied where training waits for them; a thread writes the copy while training goes on.

    Args:
        steps: optimizer steps to keep.
        log_spaced: keep this many steps instead, log-spaced up to the last one.
        dtype: of the weights on disk: fp32, fp16 or bf16.
    """

    def __init__(self, steps: list[int] | None = None, log_spaced: int | None = None, dtype: str = "fp16"):
        super().__init__()
        if (steps is None) == (log_spaced is None):
            raise InputError("SnapshotCheckpoint takes either `steps` or `log_spaced`")
        if dtype not in DTYPES:
            raise InputError(f"SnapshotCheckpoint's dtype is {dtype!r}: it is one of {', '.join(DTYPES)}")
        if steps is not None and (not steps or min(steps) < 1):
            raise InputError(f"SnapshotCheckpoint's steps are {steps}: they are optimizer steps from 1 on")
        if log_spaced is not None and log_spaced < 2:
            raise InputError(f"SnapshotCheckpoint's log_spaced is {log_spaced}: a blend needs at least 2 snapshots")
        self.steps, self.log_spaced, self.dtype = steps, log_spaced, dtype
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future | None = None

    @property
    def state_key(self) -> str:
        return "SnapshotCheckpoint"

    def root(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "snapshots"

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.max_steps < 1 and self.log_spaced:
            raise InputError("log_spaced snapshots need to know the last step: set trainer.max_steps")
        self._wanted = set(self.steps or log_spaced(self.log_spaced, trainer.max_steps))
        late = sorted(s for s in self._wanted if 0 < trainer.max_steps < s)
        if late:
            raise InputError(f"snapshots at steps {late} would never be reached: trainer.max_steps is {trainer.max_steps}")
        root = self.root(trainer)
        if trainer.is_global_zero:
            try:
                root.mkdir(parents=True, exist_ok=True)
                (root / ".writable").touch()
                (root / ".writable").unlink()
            except OSError as error:
                raise InputError(f"cannot write snapshots into {root}: {error.strerror}; choose another --out") from error
            there = [s for s in self._wanted if snapshots.folder(root, s).exists()]
            if there and not trainer.ckpt_path:
                raise InputError(f"{root} holds snapshots already (steps {sorted(there)}): choose another --out, or continue that run with --ckpt_path")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._done = {s for s in self._wanted if snapshots.folder(self.root(trainer), s).exists()}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshot")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        step = trainer.global_step
        if step in self._wanted and step not in self._done:
            self._done.add(step)
            self.save(trainer, module, step)

    def save(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """Copy the weights, and write the copy in the background."""
        if not trainer.is_global_zero:
            return
        self._join()
        about, files = module.snapshot(step, DTYPES[self.dtype])
        copied = {
            name: replace(content, tensors=snapshots.cast(content.tensors, DTYPES[self.dtype])) if isinstance(content, Weights) else content
            for name, content in files.items()
        }
        self._pending = self._writer.submit(snapshots.write, self.root(trainer), about, copied)

    def _join(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()  # raises here what went wrong in the thread

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._join()
        rank_zero_info(f"snapshots of steps {sorted(self._done)} are in {self.root(trainer)}")

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self._writer is not None:
            self._writer.shutdown(wait=True)  # also after Ctrl-C: what was begun is finished
            self._writer = None
