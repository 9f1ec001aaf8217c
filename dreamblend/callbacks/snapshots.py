"""Writes snapshots of a training run at chosen steps."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dreamblend.callbacks.averaging import averaged, averagers, description
from dreamblend.errors import InputError
from dreamblend.processes import first_alone
from dreamblend.storage import snapshots
from dreamblend.storage.files import check_writable, hold
from dreamblend.storage.snapshots import DTYPES, Weights
from dreamblend.trainer import callbacks
from dreamblend.training.identity import identity
from dreamblend.training.module import Tuner, tuner
from dreamblend.tuning.sharding import is_sharded, whole


def log_spaced(count: int, last: int) -> list[int]:
    """`count` steps from last / 100 to last, evenly spaced in their logarithm, as early snapshots
    differ more than late ones.

    If two would be the same step, the later one moves up. If there are fewer steps than `count`,
    the list holds them all.
    """
    first = max(1, round(last / 100))
    steps: list[int] = []
    for step in np.geomspace(first, last, min(count, last - first + 1)):
        steps.append(max(round(step), steps[-1] + 1 if steps else 1))
    return steps


class AtSnapshots(L.Callback):
    """Calls `look` once at every snapshot. Meanwhile the module has the snapshot's weights, is in
    eval mode, and computes in the precision of training.

    This runs on the first process alone. If the model is sharded it runs on all of them, as they
    compute together.
    """

    def look(self, trainer: L.Trainer, module: Tuner) -> None:
        raise NotImplementedError

    def show(self, trainer: L.Trainer, module: Tuner) -> None:
        if not (trainer.is_global_zero or is_sharded(module.trained)):
            return
        training = [m.training for m in module.trained]
        with averaged(trainer, module), module.drawing():
            module.trained.eval()
            self.look(trainer, module)
        for m, was in zip(module.trained, training):
            m.train(was)


class SnapshotCheckpoint(Checkpoint):
    """Writes `RUN/snapshots/step-NNNNNN` at chosen optimizer steps and at the last one, however the
    run ends. It never removes a snapshot.

    Training waits while the weights are copied; a thread writes the copy while training goes on.
    If a callback averages the weights (callbacks.WeightEMA, or one of Lightning's), a snapshot
    holds the average and says which.

    Args:
        steps: optimizer steps to keep. The last step is kept too.
        log_spaced: without `steps`, keep this many, log-spaced up to the last one.
        dtype: of the weights on disk: fp32, fp16 or bf16. fp32 keeps every weight as it was
            trained. The others halve the file, but full weights lose early changes, which are small
            beside the weights. For changes of 1e-4 in weights of about 0.03, bf16 undoes a quarter
            of them and errs by half their size, fp16 by a sixteenth. Adapters hold only the change,
            so either dtype is fine for them.
    """

    def __init__(self, steps: list[int] | None = None, log_spaced: int = 8, dtype: str = "fp32"):
        super().__init__()
        if dtype not in DTYPES:
            raise InputError(
                f"SnapshotCheckpoint's dtype is {dtype!r}: it is one of {', '.join(DTYPES)}"
            )
        if steps is not None and (not steps or min(steps) < 1):
            raise InputError(
                f"SnapshotCheckpoint's steps are {steps}: they are optimizer steps from 1 on"
            )
        if log_spaced < 2:
            raise InputError(
                f"SnapshotCheckpoint's log_spaced is {log_spaced}: a blend needs at least 2"
                " snapshots"
            )
        self.steps, self.log_spaced, self.dtype = steps, log_spaced, dtype
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future | None = None
        self._held: ExitStack | None = None
        # the identity of the run whose snapshots are in the folder, and the path it was read from
        self._before: tuple[dict, str] | None = None

    @property
    def state_key(self) -> str:
        return "SnapshotCheckpoint"

    def root(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "snapshots"

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        tuner(module).averages = [description(c) for c in averagers(trainer)]
        if trainer.max_steps < 1 and not self.steps:
            raise InputError(
                "log_spaced snapshots need to know the last step: set trainer.max_steps"
            )
        self.wanted = set(self.steps or log_spaced(self.log_spaced, trainer.max_steps))
        late = sorted(s for s in self.wanted if 0 < trainer.max_steps < s)
        if late:
            raise InputError(
                f"snapshots at steps {late} would never be reached: trainer.max_steps is"
                f" {trainer.max_steps}"
            )
        self.wanted |= {trainer.max_steps} if trainer.max_steps > 0 else set()
        first_alone(trainer, lambda: self._begin(trainer))

    def _begin(self, trainer: L.Trainer) -> None:
        self.hold(trainer)
        check_writable(self.root(trainer))
        snapshots.sweep(self.root(trainer))

    def hold(self, trainer: L.Trainer) -> None:
        """Hold the run's folder from now to the end, so that unfinished files there are this run's.
        Raises InputError if another run holds it.
        """
        if trainer.is_global_zero and self._held is None:
            self._held = hold(Path(trainer.default_root_dir))

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Raise InputError if the folder has another run's snapshots. Whether this run continues
        one is not known earlier.
        """
        root = self.root(trainer)
        there = snapshots.listing(root)
        if not there:
            return
        if max(self.wanted) in dict(there) and not trainer.ckpt_path:
            raise InputError(
                f"{root} holds the snapshots of a finished run (steps"
                f" {', '.join(str(step) for step, _ in there)}): choose another --out"
            )
        first = snapshots.read(there[0][1])
        assert first.about is not None, "what is named as ours says what it is, or reading refuses"
        self._before = identity(first.about), str(first.path)
        tuner(module).check_same_run(*self._before)
        if not trainer.ckpt_path:
            rank_zero_info(
                f"an interrupted run left snapshots in {root} and no state: it begins again, and"
                " keeps them"
            )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._before is not None:
            # the class images that were missing exist now
            tuner(module).check_same_run(*self._before)
        there = {s for s, _ in snapshots.listing(self.root(trainer))}
        self._done = trainer.strategy.broadcast(there)  # all processes must agree
        self._kept = trainer.global_step
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="snapshot")

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        if self._pending is not None and self._pending.done():
            self.join()  # an error of the thread ends the run now, not at the next snapshot
        if trainer.global_step in self.wanted:
            self.keep(trainer, tuner(module))

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep the last step of a run that ends before trainer.max_steps (by time, epochs or early
        stopping): it ends with an epoch. Later, Lightning's averages replace the weights.
        """
        epochs = trainer.current_epoch + 1  # Lightning counts this one after the hook
        if trainer.should_stop or epochs >= (trainer.max_epochs or -1) > 0:
            self.keep(trainer, tuner(module))

    def keep(self, trainer: L.Trainer, module: Tuner) -> None:
        """Save this step's snapshot if it does not exist yet, and call what looks at it. Once per
        step, however many batches a step has.
        """
        step = trainer.global_step
        if step == self._kept:
            return
        self._kept = step
        if step not in self._done:
            self._done.add(step)
            self.save(trainer, module, step)
        for callback in callbacks(trainer):
            if isinstance(callback, AtSnapshots):
                callback.show(trainer, module)

    def save(self, trainer: L.Trainer, module: Tuner, step: int) -> None:
        """Copy the weights, and write the copy in the background. If they are sharded, every
        process gives its part.
        """
        if not (trainer.is_global_zero or is_sharded(module.trained)):
            return
        self.join()
        with averaged(trainer, module) as average:
            copied = {
                name: (
                    replace(content, tensors=self._copy(trainer, content.tensors))
                    if isinstance(content, Weights)
                    else content
                )
                for name, content in module.tuning.export(module.backbone).items()
            }
        if not trainer.is_global_zero:
            return
        about = module.about(step, DTYPES[self.dtype])
        about = replace(about, settings={**about.settings, "averaged": average})
        assert self._writer is not None, "on_train_start makes it"
        self._pending = self._writer.submit(snapshots.write, self.root(trainer), about, copied)

    def _copy(self, trainer: L.Trainer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole copies on the CPU, one tensor at a time. Only the first process keeps them."""
        copies: dict[str, Tensor] = {}
        for name, value in whole(tensors):
            if trainer.is_global_zero:
                copies |= snapshots.cast({name: value}, DTYPES[self.dtype])
        return copies

    def join(self) -> None:
        """Wait until the last snapshot is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()  # raises the thread's error

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.join()
        rank_zero_info(f"snapshots of steps {sorted(self._done)} are in {self.root(trainer)}")

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        """Finish the snapshot that was begun, also after Ctrl-C."""
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
