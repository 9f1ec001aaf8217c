"""Keeps the chosen early and late snapshots of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dreamblend import snapshots
from dreamblend.errors import InputError
from dreamblend.files import check_writable, hold
from dreamblend.snapshots import DTYPES, Weights
from dreamblend.tuning.sharding import is_sharded, whole


def log_spaced(count: int, last: int) -> list[int]:
    """`count` steps from last / 100 to last, evenly spaced in their logarithm: early snapshots differ more than late ones.

    Where two would be the same step, the later one moves up; there are no more than there are steps.
    """
    first = max(1, round(last / 100))
    steps: list[int] = []
    for step in np.geomspace(first, last, min(count, last - first + 1)):
        steps.append(max(round(step), steps[-1] + 1 if steps else 1))
    return steps


@contextmanager
def averaged(trainer: L.Trainer, module: L.LightningModule) -> Iterator[bool]:
    """The averaged weights in the place of those in training, where a callback averages them and has begun to; says whether."""
    averagers = [c for c in trainer.callbacks if isinstance(c, WeightAveraging) and c.state_dict()["latest_update_step"]]
    for callback in averagers:
        callback.on_validation_epoch_start(trainer, module)  # exchanges both sets of weights
    try:
        yield bool(averagers)
    finally:
        for callback in averagers:
            callback.on_validation_epoch_end(trainer, module)


class SnapshotCheckpoint(Checkpoint):
    """Writes `RUN/snapshots/step-NNNNNN` at chosen optimizer steps and never removes one.

    The weights are copied where training waits for them; a thread writes the copy while training goes on. With one of
    Lightning's weight averaging callbacks (EMAWeightAveraging), a snapshot holds the averaged weights.

    Args:
        steps: optimizer steps to keep.
        log_spaced: where `steps` is not given, keep this many, log-spaced up to the last one.
        dtype: of the weights on disk: fp32, fp16 or bf16.
    """

    def __init__(self, steps: list[int] | None = None, log_spaced: int = 8, dtype: str = "fp16"):
        super().__init__()
        if dtype not in DTYPES:
            raise InputError(f"SnapshotCheckpoint's dtype is {dtype!r}: it is one of {', '.join(DTYPES)}")
        if steps is not None and (not steps or min(steps) < 1):
            raise InputError(f"SnapshotCheckpoint's steps are {steps}: they are optimizer steps from 1 on")
        if log_spaced < 2:
            raise InputError(f"SnapshotCheckpoint's log_spaced is {log_spaced}: a blend needs at least 2 snapshots")
        self.steps, self.log_spaced, self.dtype = steps, log_spaced, dtype
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future | None = None
        self._held: ExitStack | None = None

    @property
    def state_key(self) -> str:
        return "SnapshotCheckpoint"

    def root(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "snapshots"

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.max_steps < 1 and not self.steps:
            raise InputError("log_spaced snapshots need to know the last step: set trainer.max_steps")
        self.wanted = set(self.steps or log_spaced(self.log_spaced, trainer.max_steps))
        late = sorted(s for s in self.wanted if 0 < trainer.max_steps < s)
        if late:
            raise InputError(f"snapshots at steps {late} would never be reached: trainer.max_steps is {trainer.max_steps}")
        self.hold(trainer)
        if trainer.is_global_zero:
            check_writable(self.root(trainer))
            snapshots.sweep(self.root(trainer))

    def hold(self, trainer: L.Trainer) -> None:
        """Hold the run's folder from now to the end, so that what is unfinished there is this run's. Raises InputError where another run does."""
        if trainer.is_global_zero and self._held is None:
            self._held = hold(Path(trainer.default_root_dir))

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Raise InputError where another run's snapshots are there. Whether this one continues is not known before."""
        root = self.root(trainer)
        there = dict(snapshots.listing(root))
        if not there or trainer.ckpt_path:
            return
        if max(self.wanted) in there:
            raise InputError(f"{root} holds the snapshots of a finished run (steps {', '.join(map(str, there))}): choose another --out")
        about = snapshots.read(min(there.items())[1]).about
        if (about.seed, about.base_hash, {**about.settings, "averaged": None}) != (module.seed, module.base_hash, {**module.settings(), "averaged": None}):
            raise InputError(f"{root} holds snapshots of a run with other settings (steps {', '.join(map(str, there))}): choose another --out")
        rank_zero_info(f"an interrupted run left snapshots in {root} and no state: it begins again, and keeps them")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        there = {s for s in self.wanted if snapshots.folder(self.root(trainer), s).exists()}
        self._done = trainer.strategy.broadcast(there)  # all take part in the same ones
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshot")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        if self._pending is not None and self._pending.done():
            self.join()  # an error of the thread ends the run now and not at the next snapshot
        step = trainer.global_step
        if step in self.wanted and step not in self._done:
            self._done.add(step)
            self.save(trainer, module, step)

    def save(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """Copy the weights, and write the copy in the background. Where they are sharded, every process gives its part."""
        if not (trainer.is_global_zero or is_sharded(module.trained)):
            return
        self.join()
        with averaged(trainer, module) as is_average:
            about, files = module.snapshot(step, DTYPES[self.dtype])
            copied = {
                name: replace(content, tensors=self._copy(trainer, content.tensors)) if isinstance(content, Weights) else content
                for name, content in files.items()
            }
        if not trainer.is_global_zero:
            return
        about = replace(about, settings={**about.settings, "averaged": is_average})
        self._pending = self._writer.submit(snapshots.write, self.root(trainer), about, copied)

    def _copy(self, trainer: L.Trainer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole copies on the CPU, one tensor at a time; none but in the first process."""
        copies: dict[str, Tensor] = {}
        for name, value in whole(tensors):
            if trainer.is_global_zero:
                copies |= snapshots.cast({name: value}, DTYPES[self.dtype])
        return copies

    def join(self) -> None:
        """Wait until the last snapshot is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()  # raises here what went wrong in the thread

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.join()
        rank_zero_info(f"snapshots of steps {sorted(self._done)} are in {self.root(trainer)}")

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Also after Ctrl-C, what was begun is finished."""
        try:
            self.join()
        except InputError as error:
            rank_zero_warn(str(error))
        self.teardown(trainer, module, "fit")

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self._writer is not None:
            self._writer.shutdown(wait=True)
            self._writer = None
        if self._held is not None:
            self._held.close()
            self._held = None
