"""Optimizers by name: each is made by a library that is imported when it is asked for."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch

from dreamblend.errors import InputError

Groups = list[dict[str, Any]]  # of parameters, each with its rate


class Optimizer(ABC):
    """Which optimizer trains, and its settings. The rates and the weight decay are the Tuner's."""

    package: str | None = None  # that has to be installed
    one_rate = False  # whether all that trains must have the same rate
    sharded = False  # whether it takes weights that are shared out among processes
    # whether the weights to keep are an average that it makes, and not those in training
    averages = False

    def __init__(self) -> None:
        if self.package and importlib.util.find_spec(self.package) is None:
            raise InputError(
                f"model.optimizer {self.name} needs the package {self.package}: pip install"
                " 'dreamblend[optimizers]'"
            )
        settings = self.settings
        for name in ("betas", "beta1"):
            betas = settings.get(name)
            each = betas if isinstance(betas, list) else [betas]
            if not all(beta is None or 0 <= beta < 1 for beta in each):
                raise InputError(
                    f"model.optimizer.{name} is {betas}: each is a share from 0 to below 1"
                )
        for name in ("eps", "d_coef", "clip_threshold"):
            if (value := settings.get(name)) is not None and value <= 0:
                raise InputError(f"model.optimizer.{name} is {value}: it must be above zero")

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def settings(self) -> dict[str, Any]:
        """All that changes a weight."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @property
    def record(self) -> dict[str, Any]:
        """What snapshot.json says of it: nothing where it is AdamW as torch has it."""
        if type(self) is AdamW and self.settings == AdamW().settings:
            return {}
        return {"optimizer": {"name": self.name, **self.settings}}

    def usual_rate(self, of_method: float) -> float:
        """The rate to begin with, where AdamW's is `of_method`."""
        return of_method

    @abstractmethod
    def make(
        self, groups: Groups, rate: float, weight_decay: float, fused: bool = False
    ) -> torch.optim.Optimizer:
        """The optimizer of parameters.

        Args:
            groups: what trains, each group with its own rate.
            rate: of the first of them, which schedules call the initial one.
            weight_decay: of all of them.
            fused: whether the device has a faster form of one kernel.
        """


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, 2019), of torch; fused on a CPU and on a GPU.

    Args:
        betas: shares that the averages of gradients and of their squares keep.
        eps: added to the denominator.
    """

    sharded = True

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.betas, self.eps = betas, eps
        super().__init__()

    def make(
        self, groups: Groups, rate: float, weight_decay: float, fused: bool = False
    ) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups, rate, self.betas, self.eps, weight_decay, fused=fused or None
        )


class AdamW8bit(Optimizer):
    """AdamW with its state in 8 bits a value (Dettmers et al., 2022), of bitsandbytes. Tensors of
    less than 4096 values keep theirs in fp32.

    Args:
        betas: shares that the averages of gradients and of their squares keep.
        eps: added to the denominator.
    """

    package = "bitsandbytes"

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.betas, self.eps = betas, eps
        super().__init__()

    def make(
        self, groups: Groups, rate: float, weight_decay: float, fused: bool = False
    ) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit as Made

        return Made(groups, rate, self.betas, self.eps, weight_decay)


class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern, 2018), of transformers: it keeps a row and a column of squares
    for a matrix. The rate is as set, and not relative to the weights.

    Args:
        beta1: share that an average of gradients keeps, which takes as much memory as the weights.
            None keeps no average.
        clip_threshold: the longest root mean square of an update, of rate 1.
        decay_rate: the average of squares keeps the share 1 - step^decay_rate.
    """

    def __init__(
        self, beta1: float | None = None, clip_threshold: float = 1.0, decay_rate: float = -0.8
    ):
        self.beta1, self.clip_threshold, self.decay_rate = beta1, clip_threshold, decay_rate
        super().__init__()

    def make(
        self, groups: Groups, rate: float, weight_decay: float, fused: bool = False
    ) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor as Made

        return Made(
            groups,
            rate,
            weight_decay=weight_decay,
            scale_parameter=False,
            relative_step=False,
            **self.settings,
        )


class Prodigy(Optimizer):
    """Prodigy (Mishchenko and Defazio, 2024), of prodigyopt: Adam that finds its rate. The rate
    that is set multiplies it, and 1 is usual.

    Args:
        betas: shares that the averages of gradients and of their squares keep.
        eps: added to the denominator.
        d_coef: multiplies the rate that it finds: 0.5 to 2 is usual.
        use_bias_correction: Adam's, on as in diffusers' scripts.
        safeguard_warmup: keep a rate that rises at first out of what it finds, on as there.
    """

    package = "prodigyopt"
    one_rate = True

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        d_coef: float = 1.0,
        use_bias_correction: bool = True,
        safeguard_warmup: bool = True,
    ):
        self.betas, self.eps, self.d_coef = betas, eps, d_coef
        self.use_bias_correction, self.safeguard_warmup = use_bias_correction, safeguard_warmup
        super().__init__()

    def usual_rate(self, of_method: float) -> float:
        return 1.0

    def make(
        self, groups: Groups, rate: float, weight_decay: float, fused: bool = False
    ) -> torch.optim.Optimizer:
        from prodigyopt import Prodigy as Made

        with redirect_stdout(StringIO()):  # it prints that the decay is decoupled
            return Made(groups, rate, weight_decay=weight_decay, **self.settings)


class Lion(Optimizer):
    """Lion (Chen et al., 2023), of lion-pytorch: the sign of an average of gradients, at a tenth of
    AdamW's rate.

    Args:
        betas: shares of the average in an update, and in the next average.
    """

    package = "lion_pytorch"

    def __init__(self, betas: tuple[float, float] = (0.9, 0.99)):
        self.betas = betas
        super().__init__()

    def usual_rate(self, of_method: float) -> float:
        return of_method / 10  # the paper: 3 to 10 times smaller

    def make(
        self, groups: Groups, rate: float, weight_decay: float, fused: bool = False
    ) -> torch.optim.Optimizer:
        from lion_pytorch import Lion as Made

        return Made(groups, rate, self.betas, weight_decay)


class AdamWScheduleFree(Optimizer):
    """AdamW without a schedule (Defazio et al., 2024), of schedulefree. It averages the weights
    itself: snapshots, previews and probes take its average, and `WeightEMA` rests.

    Args:
        betas: shares of the average in the weights that train, and of the average of squared
            gradients.
        eps: added to the denominator.
    """

    package = "schedulefree"
    averages = True

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.betas, self.eps = betas, eps
        super().__init__()
        if self.betas[0] == 0:  # it divides by it
            raise InputError("model.optimizer.betas of AdamWScheduleFree begin above zero")

    def make(
        self, groups: Groups, rate: float, weight_decay: float, fused: bool = False
    ) -> torch.optim.Optimizer:
        from schedulefree import AdamWScheduleFree as Made

        made = Made(groups, rate, self.betas, self.eps, weight_decay)
        made.train()
        return made


@contextmanager
def evaluated(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put the average of a schedule-free optimizer in the place of the weights in training, inside
    the `with` block. These come back to the bit, which its own `train` would miss.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in trained]
    getattr(optimizer, "eval")()  # noqa: B009  # optimizers of torch have none
    try:
        yield
    finally:
        for p, value in zip(trained, kept):
            p.data.copy_(value)
        for group in optimizer.param_groups:
            group["train_mode"] = True
