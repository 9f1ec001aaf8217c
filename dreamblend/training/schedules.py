"""How the learning rate goes on over the steps, by diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dreamblend.errors import InputError

SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass(frozen=True)
class Schedule:
    """A schedule of the rate.

    Args:
        name: one of SCHEDULES. All but `constant` end at the last step.
        warmup: the steps over which the rate rises.
        cycles: how many times `cosine_with_restarts` goes down to zero.
        power: of `polynomial`: 1 where None.
    """

    name: str
    warmup: int = 0
    cycles: int | None = None
    power: float | None = None

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise InputError(
                f"model.lr_scheduler is {self.name!r}: it is one of {', '.join(SCHEDULES)}"
            )
        for option, value, of in (
            ("lr_num_cycles", self.cycles, "cosine_with_restarts"),
            ("lr_power", self.power, "polynomial"),
        ):
            if value is not None and self.name != of:
                raise InputError(
                    f"model.{option} is of model.lr_scheduler {of}, which is {self.name}: leave it"
                    f" out, or set {of}"
                )
            if value is not None and value <= 0:
                raise InputError(f"model.{option} is {value}: it must be above zero")
        if self.name == "cosine_with_restarts" and (self.cycles or 1) < 2:
            raise InputError(
                "model.lr_scheduler cosine_with_restarts needs model.lr_num_cycles, which is 2 or"
                " more"
            )

    @property
    def ends(self) -> bool:
        """Whether the rate depends on which step is the last."""
        return self.name != "constant"

    @property
    def record(self) -> dict[str, Any]:
        """What snapshot.json says of it beside its name and its warm-up."""
        settings = {"lr_num_cycles": self.cycles, "lr_power": self.power}
        return {name: value for name, value in settings.items() if value is not None}

    def make(
        self, optimizer: torch.optim.Optimizer, last: int
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """The schedule of an optimizer, to step number `last`."""
        from diffusers.optimization import get_scheduler

        if self.ends and last < 1:
            raise InputError(
                f"model.lr_scheduler {self.name} ends at the last step: set trainer.max_steps"
            )
        done = -1  # the scheduler begins at its first step
        if self.warmup:
            # its first step has rate 0 and trains nothing: begin at its second
            last, done = last + 1, 0
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        return get_scheduler(
            self.name if self.ends else "constant_with_warmup",
            optimizer,
            num_warmup_steps=self.warmup,
            num_training_steps=last,
            num_cycles=self.cycles or 1,
            power=self.power or 1.0,
            last_epoch=done,
        )


def refresh(schedule: torch.optim.lr_scheduler.LambdaLR) -> list[float]:
    """Set and return the rates that a schedule has at its step. Those in a resume state are of the
    schedule that it was saved with, which may have ended.
    """
    rates = [
        float(base * share(schedule.last_epoch))
        for base, share in zip(schedule.base_lrs, schedule.lr_lambdas)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates):
        group["lr"] = rate
    return rates
