"""Averages the weights over the steps, as those of one step are noisy; snapshots hold the mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from dreamblend.errors import InputError
from dreamblend.trainer import callbacks
from dreamblend.training.module import Tuner, tuner
from dreamblend.training.optimizers import evaluated
from dreamblend.tuning.sharding import is_sharded

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


class WeightEMA(L.Callback):
    """Exponential moving average of the trained weights, by diffusers' EMAModel.

    After the first step the average equals the trained weights. At step n + 1 it keeps the share
    min(decay, (1 + n) / (10 + n)) of itself and takes the rest from the weights in training. So the
    base has no share in it. Its mean age is a tenth of the steps at first (1 step at step 10, 5 at
    step 50) and decay / (1 - decay) in the end. Only the trained weights are copied: for a LoRA,
    the adapters.

    Args:
        decay: the share that is kept in the end. With 0.97 the mean age becomes 32 steps.
    """

    def __init__(self, decay: float = 0.97):
        if not 0 <= decay < 1:
            raise InputError(f"WeightEMA's decay is {decay}: it is a share from 0 to below 1")
        self.decay = decay
        self._average: EMAModel | None = None  # from the first step on
        # the state of a resumed run, until its weights are on their device
        self._loaded: dict | None = None
        self._step = 0  # the step of the last update

    @property
    def state_key(self) -> str:
        return "WeightEMA"

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if is_sharded(tuner(module).trained):
            raise InputError(
                "callbacks.WeightEMA averages whole weights, and trainer.strategy shares them out:"
                " leave it out of trainer.callbacks"
            )
        if tuner(module).optimizer.averages:
            rank_zero_info(
                f"model.optimizer {tuner(module).optimizer.name} averages the weights itself:"
                " WeightEMA rests"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step or tuner(module).optimizer.averages:
            return  # the gradients are still being accumulated
        self._step = trainer.global_step
        average = self._model(tuner(module))
        average.optimization_step += 1
        kept = average.get_decay(average.optimization_step)
        # its own `step` takes three operations for each weight, hundreds of them, or copies all
        with torch.no_grad():
            torch._foreach_lerp_(average.shadow_params, [*tuner(module).in_training], 1 - kept)

    def _model(self, module: Tuner) -> EMAModel:
        from diffusers.training_utils import EMAModel

        trained = module.in_training
        if self._average is None:
            average = EMAModel(trained, decay=self.decay)
            if self._loaded is not None:
                average.load_state_dict(self._loaded)
                self._loaded = None
            # bf16 would lose the small changes of an average
            average.to(trained[0].device, torch.float32)
            self._average = average
        return self._average

    @contextmanager
    def exchanged(self, module: Tuner) -> Iterator[None]:
        """Put the average in the place of the weights in training, inside the `with` block."""
        average, trained = self._model(module), module.in_training
        average.store(trained)
        average.copy_to(trained)
        try:
            yield
        finally:
            average.restore(trained)

    # -- the resume state
    def state_dict(self) -> dict[str, Any]:
        return {
            "latest_update_step": self._step,
            **(self._average.state_dict() if self._average else self._loaded or {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["latest_update_step"]
        self._loaded = {k: v for k, v in state.items() if k != "latest_update_step"} or None


Averager = WeightEMA | WeightAveraging  # ours, or one of Lightning's


def averagers(trainer: L.Trainer) -> list[Averager]:
    """The callbacks of a trainer that average weights: none where the optimizer does."""
    found: list[Averager] = [c for c in callbacks(trainer) if isinstance(c, Averager)]
    optimizer = tuner(trainer.lightning_module).optimizer
    if not optimizer.averages:
        return found
    for callback in found:
        if isinstance(callback, WeightAveraging):
            raise InputError(
                f"model.optimizer {optimizer.name} averages the weights itself: leave"
                f" {type(callback).__name__} out of trainer.callbacks"
            )
    return []


def description(averager: Averager) -> str:
    """Its name and settings: `WeightEMA(decay=0.97)`."""
    settings = {
        k: v
        for k, v in vars(averager).items()
        if not k.startswith("_") and isinstance(v, int | float | str | None)
    }
    if mean := getattr(averager, "_kwargs", {}).get("avg_fn"):
        # Lightning's callbacks keep their decay in this function: it is what is left of a 1
        settings["decay"] = round(
            float(
                mean(torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 1)
            ),
            9,
        )
    return (
        f"{type(averager).__name__}({', '.join(f'{k}={v}' for k, v in sorted(settings.items()))})"
    )


@contextmanager
def averaged(trainer: L.Trainer, module: Tuner) -> Iterator[str | None]:
    """Put the averaged weights in the place of those in training, inside the `with` block.

    Yields the average's description, or None if nothing has begun to average.
    """
    begun = [c for c in averagers(trainer) if c.state_dict()["latest_update_step"]]
    names = list(map(description, begun))
    with ExitStack() as stack:
        if module.optimizer.averages:
            stack.enter_context(evaluated(trainer.optimizers[0]))
            names.append(module.optimizer.name)
        for callback in begun:
            if isinstance(callback, WeightEMA):
                stack.enter_context(callback.exchanged(module))
            else:
                # Lightning's callbacks exchange both sets of weights
                callback.on_validation_epoch_start(trainer, module)
                stack.callback(callback.on_validation_epoch_end, trainer, module)
        yield ", ".join(names) or None
