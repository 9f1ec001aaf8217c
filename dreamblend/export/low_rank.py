"""Weights of low rank: read from LoRA files, mixed, reduced in rank, and extracted from a change of
dense weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dreamblend.errors import InputError
from dreamblend.models.adapters import overlay
from dreamblend.tuning import lora_config, lora_files


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to the weight W of a layer: alpha / rank * up @ down, and with DoRA the
    length of each of the sum's rows.

    Args:
        down: (rank, inputs), or (rank, inputs, height, width) of a convolution.
        up: (outputs, rank), or (outputs, rank, 1, 1).
        magnitude: (outputs,) of DoRA, or (1, outputs, 1, 1).
        bias: (outputs,) of `up`, by the same scale.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """(outputs, inputs...) in fp32: what is added to the weight, without magnitude and bias."""
        flat = self.scale * self.up.float().flatten(1) @ self.down.float().flatten(1)
        return flat.reshape(len(self.up), *self.down.shape[1:])


LowRank = dict[str, dict[str, Factors]]  # part of a model -> layer -> its factors


def read(path: Path, modules: dict[str, nn.Module], base: str) -> LowRank:
    """The adapter at `path`, of any tool, as peft would have it. Raises InputError as
    `lora_files.read`.
    """
    found: LowRank = {}
    for part, adapter in lora_files.read(path, modules, base).items():
        config = lora_config.configuration(path, part, adapter.layers, adapter.settings)
        for layer, roles in adapter.layers.items():
            if "embedding_A" in roles:
                raise InputError(
                    f"{path} adapts an embedding ({part}.{layer}), which cannot be exported:"
                    f" {lora_config.MERGE}"
                )
            module = modules[part].get_submodule(layer)
            shaped = {
                role: lora_files.shaped(value, role, module)
                for role, value in roles.items()
                if role != "alpha"
            }
            rank = len(shaped["A"])
            alpha = (config.alpha_pattern or {}).get(f"^{re.escape(layer)}", config.lora_alpha)
            found.setdefault(part, {})[layer] = Factors(
                shaped["A"],
                shaped["B"],
                float(alpha) * (rank**0.5 if config.use_rslora else 1.0),
                shaped.get("magnitude"),
                shaped.get("bias"),
            )
    return found


def mixed(shares: Iterable[tuple[float, LowRank]]) -> LowRank:
    """The sum of several, each by its share: the factors lie side by side, so that the ranks add
    up and nothing is lost. In fp32.

    Raises InputError for DoRA, whose rows are not only added to.
    """
    shares = list(shares)
    found: LowRank = {}
    for part, layer in dict.fromkeys((p, n) for _, one in shares for p in one for n in one[p]):
        there = [(s, one[part][layer]) for s, one in shares if layer in one.get(part, {})]
        if any(factors.magnitude is not None for _, factors in there):
            raise InputError(
                "merge adds shares of weights, and DoRA adapters cannot be added: export the early"
                " or the late snapshot alone"
            )
        down = torch.cat([factors.down.float() for _, factors in there])
        up = torch.cat([s * f.scale * f.up.float() for s, f in there], dim=1)
        biases = [s * f.scale * f.bias.float() for s, f in there if f.bias is not None]
        bias = torch.stack(biases).sum(0) if biases else None
        found.setdefault(part, {})[layer] = Factors(down, up, float(len(down)), bias=bias)
    return found


def reduced(weights: LowRank, rank: int) -> tuple[LowRank, float]:
    """The nearest weights of at most this rank, and the share of the squared norm that they keep.

    Raises InputError for DoRA, whose magnitudes belong to the factors that they were trained with.
    """
    found: LowRank = {}
    kept, whole = 0.0, 0.0
    for part, layers in weights.items():
        for name, factors in layers.items():
            if factors.magnitude is not None:
                raise InputError(
                    "the rank of a DoRA cannot be reduced, as its magnitudes belong to its factors:"
                    " leave out --rank"
                )
            # up = Q R and down^T = P S: the product has the singular values of R S^T, which is
            # as small as the rank
            q, r = torch.linalg.qr(factors.scale * factors.up.double().flatten(1))
            p, s = torch.linalg.qr(factors.down.double().flatten(1).T)
            u, values, v = torch.linalg.svd(r @ s.T, full_matrices=False)
            bias = None if factors.bias is None else factors.scale * factors.bias.float()
            found.setdefault(part, {})[name] = replace(
                _of_svd(q @ u, values, v @ p.T, rank, factors.down.shape[1:]), bias=bias
            )
            kept += values[:rank].square().sum().item()
            whole += values.square().sum().item()
    return found, kept / whole if whole else 1.0


def extracted(
    before: dict[str, nn.Module], after: dict[str, nn.Module], rank: int
) -> tuple[LowRank, float]:
    """The nearest weights of at most this rank to the change of linear layers and convolutions,
    and the share that they keep of the squared norm of the whole change, with that of biases and
    norms, which a LoRA does not hold.
    """
    found: LowRank = {}
    kept, whole = 0.0, 0.0
    for part, module in after.items():
        plain = dict(before[part].named_parameters())
        for name, value in module.named_parameters():
            change = value.detach().float() - plain[name].detach().float()
            if not change.any():
                continue
            whole += change.double().square().sum().item()
            layer, _, kind = name.rpartition(".")
            own = module.get_submodule(layer)
            plain_conv = isinstance(own, nn.Conv2d) and own.groups == 1
            if kind != "weight" or not (isinstance(own, nn.Linear) or plain_conv):
                continue
            u, values, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
            found.setdefault(part, {})[layer] = _of_svd(u, values, v, rank, change.shape[1:])
            kept += values[:rank].double().square().sum().item()
    return found, kept / whole if whole else 1.0


def _of_svd(u: Tensor, values: Tensor, v: Tensor, rank: int, inputs: torch.Size) -> Factors:
    """The first factors of u diag(values) v, the best of their rank (Eckart and Young, 1936). Both
    share the values, so that neither leaves the range of half precision.
    """
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    up, down = (u[:, :rank] * root).float(), (root[:, None] * v[:rank]).float()
    ones = [1] * (len(inputs) - 1)
    return Factors(down.reshape(rank, *inputs), up.reshape(*up.shape, *ones), float(rank))


@torch.no_grad()
def added(weights: LowRank, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules with these weights added to their own; all that has not changed is shared.

    Raises InputError for the bias of an adapter on a layer without one.
    """
    found = {}
    for part, layers in weights.items():
        module = modules[part]
        changed: dict[str, Tensor] = {}
        for name, factors in layers.items():
            layer = module.get_submodule(name)
            assert isinstance(layer.weight, Tensor)  # adapters are of layers of one weight
            new = layer.weight.float() + factors.delta()
            if factors.magnitude is not None:
                ones = [1] * (new.ndim - 1)
                lengths = new.flatten(1).norm(dim=1).reshape(-1, *ones)
                new = factors.magnitude.float().reshape(-1, *ones) * new / lengths
            changed[f"{name}.weight"] = new
            if factors.bias is not None:
                if not isinstance(layer.bias, Tensor):
                    raise InputError(
                        f"the LoRA has a bias for {part}.{name}, which has none of its own: export"
                        " it with --form diffusers"
                    )
                changed[f"{name}.bias"] = layer.bias.float() + factors.scale * factors.bias.float()
        found[part] = overlay(module, changed)
    return found


def cast(weights: LowRank, dtype: torch.dtype | None) -> LowRank:
    """In another dtype; as they are where None."""
    if dtype is None:
        return weights

    def of(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype)

    return {
        part: {
            name: replace(
                f,
                down=f.down.to(dtype),
                up=f.up.to(dtype),
                magnitude=of(f.magnitude),
                bias=of(f.bias),
            )
            for name, f in layers.items()
        }
        for part, layers in weights.items()
    }
