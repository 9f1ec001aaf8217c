"""Which adapters of a module act, and copies of a module in which some weights are new."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import LoraConfig


def configs(module: nn.Module) -> dict[str, LoraConfig]:
    """The configurations of a module's adapters by name; empty where it has none."""
    return getattr(module, "peft_config", None) or {}


def set_adapters(module: nn.Module, adapters: dict[str, float]) -> None:
    """Make exactly these peft adapters of a module active, each scaled by its weight; none where
    empty.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            scaling: dict[str, float] = getattr(layer, "scaling")  # noqa: B009  # peft declares none
            here = [name for name in adapters if name in scaling]
            layer.enable_adapters(bool(here))
            if here:
                layer.set_adapter(here)
                for name in here:
                    getattr(layer, "set_scale")(name, adapters[name])  # noqa: B009  # as before
            # An adapter is for reading here; training asks for its own gradients.
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)


def overlay(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy of a module in which only the named parameters are new: every other one, and every
    other layer, is shared.

    Raises KeyError for a parameter that the module does not have, ValueError for one of another
    shape.
    """
    names = {
        name.replace(".base_layer", ""): name for name, _ in module.named_parameters()
    }  # where adapters wrap a layer
    copies: dict[str, nn.Module] = {}

    def copied(path: str) -> nn.Module:
        if path not in copies:
            copies[path] = new = copy.copy(module.get_submodule(path))
            new._modules, new._parameters = dict(new._modules), dict(new._parameters)
            if path:
                parent, _, child = path.rpartition(".")
                copied(parent)._modules[child] = new
        return copies[path]

    for name, value in weights.items():
        path, _, last = names[name].rpartition(".")
        old = copied(path)._parameters[last]
        assert old is not None  # it is one of the named parameters
        if old.shape != value.shape:
            raise ValueError(f"{name} is {tuple(value.shape)} and not {tuple(old.shape)}")
        copied(path)._parameters[last] = nn.Parameter(
            value.to(old.device, old.dtype), requires_grad=False
        )
    return copied("")
