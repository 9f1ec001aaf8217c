"""Keeps NaN and infinity out of the weights: a step with such a loss or gradient stops the run, or
is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dreamblend.errors import InputError

ON_NAN = ("stop", "skip")
MOST_SKIPPED = 20  # steps in a row; after more of them the run learns nothing


class FiniteSteps:
    """Checks every optimizer step before it is taken.

    Args:
        on_nan: `stop` before the step changes a weight, or `skip` it.
    """

    def __init__(self, on_nan: str):
        self.on_nan = on_nan
        self._batches: list[tuple[dict, Tensor]] = []  # with their losses, since the last step
        self._skipped = 0  # steps in a row
        # of all gradients of the coming step; None where it is not known or not to be used
        self.norm: Tensor | None = None

    def saw(self, batch: dict[str, Any], loss: Tensor) -> None:
        """Remember a batch of the coming step, and its loss."""
        self._batches.append((batch, loss.detach()))

    def check(
        self,
        trainer: L.Trainer,
        parameters: Iterable[nn.Parameter],
        photos: Callable[[dict[str, Any]], list[str]],
    ) -> None:
        """Stop at a value that is not finite, or let the step change nothing. The InputError names
        the step and its photos (`photos`: batch -> names).

        All processes see the same, as their gradients are averaged by now. With the loss scaling of
        fp16, infinite gradients are usual and the scaler skips them, so the losses are checked.
        """
        parameters = list(parameters)
        batches, self._batches, self.norm = self._batches, [], None
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            size = torch.nn.utils.get_total_norm(gradients)
            if hasattr(size, "full_tensor"):  # of sharded weights
                size = size.full_tensor()
            else:
                self.norm = size
        else:
            total = torch.stack([loss for _, loss in batches]).sum()
            size = trainer.strategy.reduce(total, reduce_op="sum")
        if torch.isfinite(size):
            self._skipped = 0
            return
        bad = [batch for batch, loss in batches if not torch.isfinite(loss)]
        what = "the loss" if any(everywhere(trainer, [bool(bad)])) else "a gradient"
        shown = bad if what == "the loss" else [batch for batch, _ in batches]
        names = everywhere(trainer, [name for batch in shown for name in photos(batch)])
        sentence = (
            f"{what} of step {trainer.global_step + 1} is NaN or infinite (photos:"
            f" {', '.join(dict.fromkeys(names))})"
        )
        self._skipped += 1
        if self.on_nan == "stop":
            mend = "lower model.learning_rate, look at these photos, or set model.on_nan to skip"
            raise InputError(f"{sentence}: {mend}; the weights are as they were before that step")
        if self._skipped > MOST_SKIPPED:
            raise InputError(
                f"{sentence}, as were the {MOST_SKIPPED} steps before it: nothing is learned any"
                " more; lower model.learning_rate or check the photos"
            )
        rank_zero_warn(f"{sentence}: it is skipped")
        self.norm = None
        for parameter in parameters:
            parameter.grad = None


def everywhere(trainer: L.Trainer, here: list) -> list:
    """The items of all processes, in the order of their ranks."""
    if trainer.world_size == 1:
        return here
    each: list[list] = [here] * trainer.world_size
    torch.distributed.all_gather_object(each, here)
    return [item for part in each for item in part]
