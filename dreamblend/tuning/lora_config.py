"""The peft configuration of an adapter in a LoRA file: read, checked, and made again from it and
from the tensors.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor

from dreamblend.errors import InputError
from dreamblend.storage.foreign import PEFT, PEFT_CONFIG
from dreamblend.tuning.lora_names import PEFT_NAMES

if TYPE_CHECKING:
    from peft import LoraConfig

Layers = dict[str, dict[str, Tensor]]  # layer -> role of a tensor -> tensor
Settings = dict[str, Any]  # a LoraConfig as JSON has it
_Number = TypeVar("_Number", bound=float)

# Settings that have no effect here, or that are known in another way: the tensors show them,
# `configuration` reads them, or only training uses them.
_HARMLESS = {
    "r",
    "rank_pattern",
    "lora_alpha",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "fan_in_fan_out",
    "inference_mode",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "init_lora_weights",
    "eva_config",
    "ensure_weight_tying",
    "qalora_group_size",
    "megatron_core",
}
# The other ways to begin (pissa, olora, loftq...) change the base.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
MERGE = (
    "merge it into its base where it was made (peft: merge_and_unload, then save_pretrained), and"
    " name the merged checkpoint"
)


def read(
    file: Path, of_peft: bool, metadata: dict[str, str], parts: Iterable[str]
) -> dict[str, Settings]:
    """The settings of a file's adapter by module: from the JSON file beside a file with peft's
    names, else from the metadata, where diffusers keeps them.

    Raises InputError where the adapter is more than factors, or has factors other than LoRA's.
    """
    source = file.with_name(PEFT_CONFIG)
    beside = of_peft and source.is_file()
    if file.name == PEFT and not beside:  # peft itself writes both
        raise InputError(
            f"{file} is a peft adapter, and its alpha is in {source}, which is missing: copy it"
            " there"
        )
    source = source if beside else file
    try:
        if beside:
            whole = json.loads(source.read_text(encoding="utf-8"))
            settings = {part: whole for part in parts}
        else:
            whole = json.loads(metadata.get("lora_adapter_metadata") or "{}")
            settings = {part: _of_part(whole, part) for part in parts}
        if not isinstance(whole, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"the adapter's settings in {source} are damaged ({error}): save it again with the tool"
            " that made it"
        ) from error
    for of_part in settings.values():
        _check(source, of_part)
    return settings


def _of_part(settings: Settings, part: str) -> Settings:
    """Those of one module, which diffusers writes as `<module>.<setting>`; those of a file of one
    module alone may be as peft has them.
    """
    if "lora_alpha" in settings:
        return settings
    return {
        key.removeprefix(f"{part}."): value
        for key, value in settings.items()
        if key.startswith(f"{part}.")
    }


def _check(source: Path, settings: Settings) -> None:
    from peft import LoraConfig

    if (kind := settings.get("peft_type", "LORA")) != "LORA":
        raise InputError(
            f"{source} says that it is a peft adapter of the kind {kind}, and only LORA can be"
            f" read: {MERGE}"
        )
    usual = LoraConfig().to_dict()
    for key, value in settings.items():
        if key not in _HARMLESS and value and value != usual.get(key):
            raise InputError(
                f"{source} is of a peft adapter with {key}: {value!r}, which cannot act beside"
                f" another on one base: {MERGE}"
            )
    start = settings.get("init_lora_weights", True)
    if start not in _STARTS:
        raise InputError(
            f"{source} is of a peft adapter with init_lora_weights: {start!r}, which changed its"
            f" base: {MERGE}"
        )


def configuration(path: Path, part: str, layers: Layers, settings: Settings) -> LoraConfig:
    """The peft configuration of the adapter of one module: ranks from its tensors, alphas from its
    tensors or its settings.

    Raises InputError where a layer lacks a tensor, or the settings contradict the tensors.
    """
    from peft import LoraConfig

    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    dora = any("magnitude" in roles for roles in layers.values())
    for layer, roles in layers.items():
        down, up = ("embedding_A", "embedding_B") if "embedding_A" in roles else ("A", "B")
        needed = (down, up, "magnitude") if dora else (down, up)
        if lacking := [role for role in needed if role not in roles]:
            raise InputError(
                f"{path} has no {PEFT_NAMES[lacking[0]]} for the layer {part}.{layer}: it is"
                " incomplete; save it again"
            )
        rank = ranks[layer] = roles[down].shape[0]
        stated = _of_layer(settings, "rank_pattern", "r", layer)
        if stated not in (None, rank):
            raise InputError(
                f"{path} says that the rank of {part}.{layer} is {stated}, and holds {rank}:"
                " save it again with the tool that made it"
            )
        alpha = _of_layer(settings, "alpha_pattern", "lora_alpha", layer)
        alphas[layer] = (
            roles["alpha"].item() if "alpha" in roles else rank if alpha is None else alpha
        )
    if "use_dora" in settings and settings["use_dora"] != dora:
        raise InputError(
            f"{path} says use_dora: {settings['use_dora']}, and its tensors say {dora}: save it"
            " again with the tool that made it"
        )
    usual_rank, other_ranks = _patterns(ranks)
    usual_alpha, other_alphas = _patterns(alphas)
    return LoraConfig(
        r=usual_rank,
        lora_alpha=cast("int", usual_alpha),  # peft takes any number, whatever it declares
        rank_pattern=other_ranks,
        alpha_pattern=other_alphas,
        # a list would also name every layer whose name ends as one of it
        target_modules="|".join(map(re.escape, layers)),
        use_dora=dora,
        use_rslora=bool(settings.get("use_rslora")),
        lora_bias=any("bias" in roles for roles in layers.values()),
        inference_mode=True,
    )


def _of_layer(settings: Settings, pattern: str, usual: str, layer: str) -> Any:
    """The value of a layer where a pattern of the settings names it, else the usual one."""
    from peft.utils.other import get_pattern_key

    values = settings.get(pattern) or {}
    for name in (layer, f"text_model.{layer}"):  # as the settings may call it
        if (key := get_pattern_key(list(values), name)) in values:
            return values[key]
    return settings.get(usual)


def _patterns(values: dict[str, _Number]) -> tuple[_Number, dict[str, _Number]]:
    """The most common value, and the others by layer, as peft takes them."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {
        f"^{re.escape(layer)}": value for layer, value in values.items() if value != usual
    }
