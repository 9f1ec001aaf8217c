"""T-LoRA (Soboleva et al., AAAI 2026, arXiv 2507.05964): adapters whose rank falls with the noise,
as the noisiest steps overfit first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dreamblend.errors import InputError
from dreamblend.models import Backbone
from dreamblend.storage.foreign import LORA
from dreamblend.storage.snapshots import Files, Weights
from dreamblend.tuning.lora import TRAINING, LoRA


class TLoRA(LoRA):
    """Train low-rank adapters. At timestep t of T only their first r(t) directions act, in training
    and in sampling:

        r(t) = floor((rank - min_rank) * (1 - t / T)^power) + min_rank

    A snapshot is an ordinary LoRA file. Its metadata holds the mask's settings; plain diffusers
    applies it unmasked. This is the paper's "vanilla" T-LoRA: its orthogonal initialisation
    subtracts the initial product, which an ordinary LoRA file of this rank cannot hold. The text
    encoder sees no timestep and stays frozen; DoRA's magnitudes have no rank to mask.

    Args:
        rank: inner dimension of an adapter, all of it in use at t = 0.
        min_rank: directions that act at every timestep; half the rank where None.
        power: how fast the others are switched off (alpha_rank_scale in the authors' code).
        alpha: scale; the adapter's output is multiplied by alpha / rank. The rank where None.
        dropout: probability of dropping an input of an adapter.
        targets: the denoiser's layers that get an adapter, as LoRA's.
    """

    name = "t-lora"

    def __init__(
        self,
        rank: int = 16,
        min_rank: int | None = None,
        power: float = 1.0,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: list[str] | str | None = None,
    ):
        super().__init__(rank, alpha, dropout, targets=targets)
        self.min_rank, self.power = -(-rank // 2) if min_rank is None else min_rank, power
        if not 0 <= self.min_rank <= rank:
            raise InputError(
                f"model.tuning.min_rank is {min_rank}: it is a part of the rank, from 0 to {rank}"
            )
        if power <= 0:
            raise InputError(f"model.tuning.power is {power}: it must be above zero")

    def attach(self, backbone: Backbone, identifier: str = "", class_noun: str = "") -> None:
        if not backbone.plain_timesteps:
            raise InputError(
                f"the denoiser of {backbone.base} is not told the timesteps of its scheduler, by"
                " which T-LoRA masks ranks: train LoRA"
            )
        super().attach(backbone, identifier, class_noun)
        mask_ranks(backbone.denoiser, TRAINING, self.min_rank, self.power, _timesteps(backbone))

    def export(self, backbone: Backbone) -> Files:
        file = super().export(backbone)[LORA]
        assert isinstance(file, Weights)  # as LoRA writes it
        settings = json.loads(file.metadata["lora_adapter_metadata"])
        settings |= {
            "t_lora.min_rank": self.min_rank,
            "t_lora.power": self.power,
            "t_lora.timesteps": _timesteps(backbone),
        }
        metadata = {"lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
        return {LORA: Weights(file.tensors, metadata)}

    @staticmethod
    def restore(
        path: Path, backbone: Backbone, name: str, identifier: str | None = None
    ) -> Backbone:
        file = path / LORA if path.is_dir() else path
        try:
            with safe_open(file, framework="pt") as opened:
                settings = json.loads(opened.metadata()["lora_adapter_metadata"])
            mask = [settings[f"t_lora.{key}"] for key in ("min_rank", "power", "timesteps")]
        except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
            raise InputError(
                f"{file} does not say how its ranks are masked by timestep: it is damaged; use"
                " another snapshot"
            ) from error
        view = LoRA.restore(path, backbone, name)
        mask_ranks(backbone.denoiser, name, *mask)
        return view


def active_ranks(t: Tensor, rank: int, min_rank: int, power: float, timesteps: int) -> Tensor:
    """r(t), (batch,), for timesteps t (batch,), which some samplers give between two."""
    share = (1 - t.double() / timesteps).clamp(0, 1) ** power
    return ((rank - min_rank) * share).floor().long() + min_rank


def mask_ranks(
    denoiser: nn.Module, adapter: str, min_rank: int, power: float, timesteps: int
) -> None:
    """Let only the first r(t) directions of an adapter's layers act, sample by sample.

    The hooks are on the layers of this adapter, so that other adapters of the denoiser are not
    masked, and a mask goes away with its adapter.
    """
    mask = _Mask(_clock(denoiser), min_rank, power, timesteps)
    for name, module in denoiser.named_modules():
        if name.endswith(f"lora_A.{adapter}"):
            module.register_forward_hook(mask)


@dataclass
class _Mask:
    """Hook on lora_A, whose output is (batch, tokens, rank), or (batch, rank, height, width) of a
    convolution.
    """

    clock: _Clock
    min_rank: int
    power: float
    timesteps: int

    def __call__(self, _: nn.Module, __: tuple, inner: Tensor) -> Tensor:
        channel = 1 if inner.ndim == 4 else inner.ndim - 1
        rank, t = inner.shape[channel], self.clock.t.to(inner.device)
        acts = (
            torch.arange(rank, device=inner.device)
            < active_ranks(t, rank, self.min_rank, self.power, self.timesteps)[:, None]
        )
        shape = [1] * inner.ndim
        shape[0], shape[channel] = acts.shape  # (batch or 1, rank)
        return inner * acts.view(shape).to(inner.dtype)


class _Clock:
    """A denoiser's forward pre-hook that keeps the timesteps of its call, (batch,) or (1,)."""

    t: Tensor

    def __call__(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        t = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.t = torch.as_tensor(t).reshape(-1)


def _clock(denoiser: nn.Module) -> _Clock:
    """The denoiser's one clock."""
    for hook in denoiser._forward_pre_hooks.values():
        if isinstance(hook, _Clock):
            return hook
    denoiser.register_forward_pre_hook(clock := _Clock(), with_kwargs=True)
    return clock


def _timesteps(backbone: Backbone) -> int:
    return backbone.scheduler.config.num_train_timesteps
