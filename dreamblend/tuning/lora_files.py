"""LoRA files, whoever wrote them: every tensor finds its layer and acts, or the file is refused by
name.

    diffusers    unet.<layer>.lora_A.weight or .lora.down.weight,
                 text_encoder.<layer>.lora_linear_layer.down.weight,
                 <attention>.processor.to_q_lora.down.weight
    kohya        lora_unet_<layer>.lora_down.weight, .alpha and .dora_scale, lora_te_<layer>,
                 with _ for every dot; LyCORIS and OneTrainer likewise
    peft         base_model.model.<layer>.lora_A.weight, and adapter_config.json beside

diffusers' converters of these names drop DoRA's magnitudes and the alphas of single layers
(`_convert_non_diffusers_lora_to_diffusers`, `get_peft_kwargs` of 0.42), so here a name is looked up
among the layers themselves, and peft alone makes and fills the adapters.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dreamblend.errors import InputError
from dreamblend.storage.foreign import LORA, PEFT, PEFT_CONFIG

_ROLE = re.compile(
    r"(?P<layer>.+?)\.(?:"
    r"(?P<A>(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down|down)\.weight)|(?P<B>(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up|up)\.weight)|"
    r"(?P<bias>(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up)\.bias)|(?P<magnitude>lora_magnitude_vector(?:\.weight)?|dora_scale)|"
    r"(?P<alpha>alpha)|(?P<embedding_A>lora_embedding_A)|(?P<embedding_B>lora_embedding_B))"
)
_PEFT_NAMES = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
}
_FLAT = {
    "unet": ("lora_unet_", "lycoris_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lycoris_te_"),
    "text_encoder_2": ("lora_te2_",),
}  # how kohya's names begin
# Settings of a peft adapter that the tensors say, that `_config` reads, or that training alone
# uses.
_SAID_OTHERWISE = {
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
_MERGE = (
    "merge it into its base where it was made (peft: merge_and_unload, then save_pretrained), and"
    " name the merged checkpoint"
)


@dataclass
class Adapter:
    """What files hold for one module, by its layers."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # layer -> role -> tensor
    said: dict = field(default_factory=dict)  # peft's configuration, where the file has one


def load(path: Path, modules: dict[str, nn.Module], name: str, base: str) -> None:
    """Put the adapter at `path` (a file or a folder) into modules (`unet`, `text_encoder`) under a
    name.

    Raises InputError where a tensor or a setting of it cannot act.
    """
    found: dict[str, Adapter] = {}
    for file in _files(path, modules):
        _sort(file, modules, found, base)
    for part, adapter in found.items():
        _inject(path, part, adapter, modules[part], name, base)


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


def _spellings(modules: dict[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """What files call a layer -> its module and its name there."""
    found = {}
    for part, module in modules.items():
        for layer, _ in module.named_modules():
            if (
                not layer or ".base_layer" in layer or ".lora_" in layer
            ):  # of adapters that are there already
                continue
            plain = layer.removeprefix(
                "text_model."
            )  # older versions of transformers have it, and all files
            names = [plain, *([f"text_model.{plain}"] if part.startswith("text_encoder") else [])]
            attention, _, last = plain.rpartition(".")
            if last in ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj", "out_proj"):
                names += [
                    f"{n.rpartition('.')[0]}.to_{last.removeprefix('to_').removesuffix('_proj')}_lora"
                    for n in names
                ]
            elif plain.endswith(".to_out.0"):
                names.append(f"{attention}_lora")
            for spelled in [
                *names,
                *(f"{part}.{n}" for n in names),
                *(start + n.replace(".", "_") for n in names for start in _FLAT.get(part, ())),
            ]:
                found[spelled] = part, layer
    return found


def _sort(file: Path, modules: dict[str, nn.Module], found: dict[str, Adapter], base: str) -> None:
    """Add a file's tensors to what was found, each to its layer."""
    spellings = _spellings(modules)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the LoRA {file}: {error}") from error
    of_peft = any(key.startswith("base_model.model.") for key in tensors)
    homeless = []
    used = set()
    said = _said(file, of_peft, metadata, modules)
    for key, value in tensors.items():
        match = _ROLE.fullmatch(key.removeprefix("base_model.model.").replace(".processor.", "."))
        if match is None or match["layer"] not in spellings:
            homeless.append(key)
            continue
        part, layer = spellings[match["layer"]]
        used.add(part)
        roles = found.setdefault(part, Adapter()).tensors.setdefault(layer, {})
        role = next(r for r, said in match.groupdict().items() if said and r != "layer")
        if role in roles:
            raise InputError(
                f"{file} names the layer {layer} twice ({key}): save it again with the tool that"
                " made it"
            )
        if key.endswith("dora_scale") and value.ndim > 1 and value.shape[0] == 1 != value.shape[1]:
            raise InputError(
                f"{file} is a DoRA whose magnitudes ({key}) are of a layer's inputs and not of its"
                f" outputs, which cannot be read: {_MERGE}"
            )
        roles[role] = value
    if homeless and not used:
        raise InputError(
            f"the LoRA {file} holds nothing for {base}: it was made for another family of models"
        )
    if homeless:
        others = f" and {len(homeless) - 1} more" * (len(homeless) > 1)
        raise InputError(
            f"{file} holds {homeless[0]}{others}, which no layer of {base} takes: name its own base"
            f" with --model.base, or {_MERGE}"
        )
    for part in used:
        found[part].said = said[part]


def _said(
    file: Path, of_peft: bool, metadata: dict[str, str], parts: Iterable[str]
) -> dict[str, dict]:
    """peft's configuration of a file's adapter by module: beside it, or in its metadata as
    diffusers keeps it.

    Raises InputError where the adapter is more than factors, or has other ones than LoRA's.
    """
    source = file.with_name(PEFT_CONFIG) if of_peft else file
    if of_peft and not source.is_file():
        raise InputError(
            f"{file} is a peft adapter, and its alpha is in {source}, which is missing: copy it"
            " there"
        )
    try:
        text = (
            source.read_text(encoding="utf-8")
            if of_peft
            else metadata.get("lora_adapter_metadata") or "{}"
        )
        said = json.loads(text)
        said = {
            part: (
                said
                if of_peft
                else {
                    k.removeprefix(f"{part}."): v
                    for k, v in said.items()
                    if k.startswith(f"{part}.")
                }
            )
            for part in parts
        }
        if not all(isinstance(of_part, dict) for of_part in said.values()):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"what {source} says of its adapter is damaged ({error}): save it again with the tool"
            " that made it"
        ) from error
    for part in said.values():
        _check(source, part)
    return said


def _check(source: Path, said: dict) -> None:
    from peft import LoraConfig

    if (kind := said.get("peft_type", "LORA")) != "LORA":
        raise InputError(
            f"{source} says that it is a peft adapter of the kind {kind}, and only LORA can be"
            f" read: {_MERGE}"
        )
    usual = LoraConfig().to_dict()
    for key, value in said.items():
        if key not in _SAID_OTHERWISE and value and value != usual.get(key):
            raise InputError(
                f"{source} is of a peft adapter with {key}: {value!r}, which cannot act beside"
                f" another on one base: {_MERGE}"
            )
    start = said.get("init_lora_weights", True)
    if start not in (
        True,
        False,
        None,
        "gaussian",
        "eva",
        "orthogonal",
    ):  # the others (pissa, olora, loftq...) change the base as they begin
        raise InputError(
            f"{source} is of a peft adapter with init_lora_weights: {start!r}, which changed its"
            f" base: {_MERGE}"
        )


def _config(path: Path, part: str, adapter: Adapter):
    """The peft configuration of an adapter: ranks from its tensors, alphas from its tensors or from
    what is said.
    """
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    said, ranks, alphas = adapter.said, {}, {}
    dora = any("magnitude" in roles for roles in adapter.tensors.values())
    for layer, roles in adapter.tensors.items():
        down, up = ("embedding_A", "embedding_B") if "embedding_A" in roles else ("A", "B")
        if lacking := [
            role for role in (down, up, *(["magnitude"] if dora else [])) if role not in roles
        ]:
            raise InputError(
                f"{path} has no {_PEFT_NAMES[lacking[0]]} for the layer {part}.{layer}: it is"
                " incomplete; save it again"
            )
        rank, alpha = roles[down].shape[0], said.get("lora_alpha")
        names = layer, f"text_model.{layer}"  # as the configuration may call it
        for pattern, default in (("rank_pattern", said.get("r")), ("alpha_pattern", alpha)):
            given = said.get(pattern) or {}
            value = next(
                (given[key] for n in names if (key := get_pattern_key(given, n)) in given), default
            )
            if pattern == "alpha_pattern":
                alpha = value
            elif value not in (None, rank):
                raise InputError(
                    f"{path} says that the rank of {part}.{layer} is {value}, and holds {rank}:"
                    " save it again with the tool that made it"
                )
        ranks[layer] = rank
        alphas[layer] = (
            roles["alpha"].item() if "alpha" in roles else rank if alpha is None else alpha
        )
    if "use_dora" in said and said["use_dora"] != dora:
        raise InputError(
            f"{path} says use_dora: {said['use_dora']}, and its tensors say {dora}: save it again"
            " with the tool that made it"
        )
    (rank, other_ranks), (alpha, other_alphas) = _patterns(ranks), _patterns(alphas)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern=other_ranks,
        alpha_pattern=other_alphas,
        target_modules=list(adapter.tensors),
        use_dora=dora,
        use_rslora=bool(said.get("use_rslora")),
        lora_bias=any("bias" in roles for roles in adapter.tensors.values()),
        inference_mode=True,
    )


def _patterns(values: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and the others by layer, as peft takes them."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {
        f"^{re.escape(layer)}": value for layer, value in values.items() if value != usual
    }


def _inject(
    path: Path, part: str, adapter: Adapter, module: nn.Module, name: str, base: str
) -> None:
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    config = _config(path, part, adapter)
    state = {
        f"{layer}.{_PEFT_NAMES[role]}": _shaped(value, role, module.get_submodule(layer))
        for layer, roles in adapter.tensors.items()
        for role, value in roles.items()
        if role != "alpha"
    }
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Already found a `peft_config` attribute"
            )  # the other snapshot's, as it should be
            inject_adapter_in_model(config, module, name)
        module._hf_peft_config_loaded = True  # so that diffusers and transformers know of it
        loaded = set_peft_model_state_dict(module, state, name)
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"cannot load the LoRA {path} onto {base}: {str(error).strip().splitlines()[0]}; name"
            " its own base with --model.base"
        ) from error
    mine = [
        key
        for key in loaded.missing_keys
        if "lora_" in key and f".{name}" in key and not key.endswith(".bias")
    ]  # a bias begins as zero
    if left := [*loaded.unexpected_keys, *mine]:
        raise InputError(
            f"cannot load the LoRA {path} onto {base}: peft finds no place for {left[0]} and"
            f" {len(left) - 1} more"
        )


def _shaped(value: Tensor, role: str, layer: nn.Module) -> Tensor:
    """A tensor in peft's shape: some tools write factors of 1 x 1 convolutions as matrices, or the
    other way round, and magnitudes as columns.
    """
    weight = getattr(layer, "base_layer", layer).weight
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
