"""LoRA files of any tool: every tensor finds its layer and acts, or the file is refused by name.

`lora_names` knows the tools' names, `lora_config` the settings; peft alone makes and fills the
adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dreamblend.errors import InputError
from dreamblend.models.original_names import Original
from dreamblend.storage.foreign import LORA, PEFT, PEFT_CONFIG
from dreamblend.tuning import lora_config
from dreamblend.tuning.lora_config import MERGE, Layers, Settings
from dreamblend.tuning.lora_names import PEFT_NAMES, PEFT_PREFIX, parse, spellings
from dreamblend.tuning.peft_adapters import inject


@dataclass
class Adapter:
    """What files hold for one module."""

    layers: Layers = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)  # empty where the file has none


def load(path: Path, modules: dict[str, nn.Module], name: str, base: str) -> None:
    """Put the adapter at `path` (a file or a folder) into modules (`unet`, `text_encoder`) under a
    name.

    Raises InputError where one of its tensors or settings cannot act.
    """
    for part, adapter in read(path, modules, base).items():
        _fill(path, part, adapter, modules[part], name, base)


def read(path: Path, modules: dict[str, nn.Module], base: str) -> dict[str, Adapter]:
    """What the adapter at `path` (a file or a folder, of any tool) holds for each of the modules,
    by their names. Raises InputError as `load`.
    """
    adapters: dict[str, Adapter] = {}
    for file in _files(path, modules):
        _read(file, modules, adapters, base)
    return adapters


def _files(path: Path, parts: Iterable[str]) -> list[Path]:
    """The files of an adapter: one, or one a module as peft saves them."""
    if path.is_file():
        return [path]
    if (path / LORA).is_file():
        return [path / LORA]
    return [
        folder / PEFT
        for folder in (path, *(path / part for part in parts))
        if (folder / PEFT).is_file()
    ]


def _read(
    file: Path, modules: dict[str, nn.Module], adapters: dict[str, Adapter], base: str
) -> None:
    """Add a file's tensors to the adapters of their modules, each to its layer."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the LoRA {file}: {error}") from error
    # diffusion-pipe gives peft's file the keys of others
    of_peft = file.name == PEFT or any(key.startswith(PEFT_PREFIX) for key in tensors)
    settings = lora_config.read(file, of_peft, metadata, modules)
    layers = spellings(modules)
    homeless = []
    used = set()
    for key, value in tensors.items():
        name = parse(key)
        if name is None or name.layer not in layers:
            homeless.append(key)
            continue
        part, original = layers[name.layer]
        used.add(part)
        if key.endswith("dora_scale") and value.ndim > 1 and value.shape[0] == 1 != value.shape[1]:
            raise InputError(
                f"{file} is a DoRA whose magnitudes ({key}) are of a layer's inputs and not of its"
                f" outputs, which cannot be read: {MERGE}"
            )
        for layer, own in _shares(file, key, value, name.role, original, modules[part], base):
            roles = adapters.setdefault(part, Adapter()).layers.setdefault(layer, {})
            if name.role in roles:
                raise InputError(
                    f"{file} names the layer {layer} twice ({key}): save it again with the tool"
                    " that made it"
                )
            roles[name.role] = own
    if homeless and not used:
        raise InputError(
            f"the LoRA {file} holds nothing for {base}: it was made for another family of models"
        )
    if homeless:
        others = f" and {len(homeless) - 1} more" * (len(homeless) > 1)
        raise InputError(
            f"{file} holds {homeless[0]}{others}, which no layer of {base} takes: name its own base"
            f" with --model.base, or {MERGE}"
        )
    for part in used:
        adapters[part].settings = settings[part]
    if of_peft and any(_lacks_alpha(adapters[part]) for part in used):
        warnings.warn(
            f"{file} does not say its alpha, which is taken to be its rank: if it was another, put"
            f' {{"lora_alpha": ...}} in {PEFT_CONFIG} beside it',
            stacklevel=2,
        )


def _lacks_alpha(adapter: Adapter) -> bool:
    return "lora_alpha" not in adapter.settings and not all(
        "alpha" in roles for roles in adapter.layers.values()
    )


def _shares(
    file: Path,
    key: str,
    value: Tensor,
    role: str,
    original: Original,
    module: nn.Module,
    base: str,
) -> list[tuple[str, Tensor]]:
    """Each layer of an original one with what is its own of a tensor: the factor of the inputs and
    the scale are the same for all, the outputs are divided.
    """
    if role in ("A", "alpha") or original.plain:
        return [(layer, value) for layer in original.layers]
    counts = [len(_weight(module.get_submodule(layer))) for layer in original.layers]
    try:
        return list(original.split(value, counts).items())
    except ValueError as error:
        raise InputError(
            f"cannot load the LoRA {file} onto {base}: {key} does not fit, as {error}; name its own"
            " base with --model.base"
        ) from error


def _weight(layer: nn.Module) -> Tensor:
    """Of a layer, or of the one that an adapter wraps."""
    weight = getattr(layer, "base_layer", layer).weight
    assert isinstance(weight, Tensor)  # peft wraps layers of one weight alone
    return weight


def _fill(path: Path, part: str, adapter: Adapter, module: nn.Module, name: str, base: str) -> None:
    """Give a module the adapter, with its tensors."""
    from peft import set_peft_model_state_dict

    config = lora_config.configuration(path, part, adapter.layers, adapter.settings)
    state = {
        f"{layer}.{PEFT_NAMES[role]}": shaped(value, role, module.get_submodule(layer))
        for layer, roles in adapter.layers.items()
        for role, value in roles.items()
        if role != "alpha"
    }
    try:
        inject(config, module, name)
        missing, unexpected = cast(  # torch's `_IncompatibleKeys`, which peft declares as no type
            "tuple[list[str], list[str]]", set_peft_model_state_dict(module, state, name)
        )
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"cannot load the LoRA {path} onto {base}: {str(error).strip().splitlines()[0]}; name"
            " its own base with --model.base"
        ) from error
    unfilled = [
        key for key in missing if "lora_" in key and f".{name}" in key and not key.endswith(".bias")
    ]  # a bias begins as zero
    if left := [*unexpected, *unfilled]:
        raise InputError(
            f"cannot load the LoRA {path} onto {base}: peft finds no place for {left[0]} and"
            f" {len(left) - 1} more"
        )


def shaped(value: Tensor, role: str, layer: nn.Module) -> Tensor:
    """A tensor in peft's shape: some tools write factors of 1 x 1 convolutions as matrices, or the
    other way round, and magnitudes as columns.
    """
    weight = _weight(layer)
    if role == "magnitude" and value.numel() == weight.shape[0]:
        return (
            value.reshape(-1)
            if weight.ndim == 2
            else value.reshape(1, -1, *[1] * (weight.ndim - 2))
        )
    if role in "AB" and weight.ndim == 2 and value.shape[2:].numel() == 1:
        return value.flatten(1)
    if role in "AB" and value.ndim == 2:
        return value.reshape(*value.shape, *[1] * (weight.ndim - 2))
    return value
