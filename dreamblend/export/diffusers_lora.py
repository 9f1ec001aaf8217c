"""A LoRA by the names of diffusers: what a pipeline's `load_lora_weights` reads.

    unet.<layer>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector
    text_encoder.text_model.<layer>.lora_A.weight

Ranks and alphas are in the metadata, as peft's configuration of each part.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamblend.export.form import LoRAForm, save
from dreamblend.export.low_rank import Factors, LowRank
from dreamblend.export.what import What
from dreamblend.models import Backbone
from dreamblend.storage.foreign import LORA
from dreamblend.tuning import lora_config
from dreamblend.tuning.lora_names import PEFT_NAMES


class Diffusers(LoRAForm):
    """A folder with the LoRA that diffusers' `load_lora_weights` reads."""

    def write(self, what: What, path: Path) -> None:
        weights = self.low_rank(what)
        tensors, settings = named(weights, what.backbone)
        if mask := what.rank_mask:
            settings |= mask
            print(
                "other tools apply a T-LoRA without its mask, at all timesteps; dreamblend reads"
                " the mask from the file"
            )
        said = {"lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
        path.mkdir()
        save(tensors, path / LORA, said | self.marks(what, weights))


def named(weights: LowRank, model: Backbone) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the file, and the settings of its metadata."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, layers in weights.items():
        encodes = part in model.text_encoders
        roles = {layer: _roles(factors) for layer, factors in layers.items()}
        config = lora_config.configuration(Path(LORA), part, roles, {}).to_dict()
        if encodes:
            _with_text_model(config)
        settings |= {
            f"{part}.{key}": sorted(value) if isinstance(value, set) else value
            for key, value in config.items()
        }
        # in the files of all tools, and dropped by transformers 5 in memory
        start = f"{part}.text_model." if encodes else f"{part}."
        for layer, of_layer in roles.items():
            layer = layer.removeprefix("text_model.") if encodes else layer
            for role, value in of_layer.items():
                if role == "alpha":
                    continue
                # transformers 5 finds the magnitudes by this name only
                end = ".weight" if encodes and role == "magnitude" else ""
                tensors[f"{start}{layer}.{PEFT_NAMES[role]}{end}"] = value
    return tensors, settings


def _roles(factors: Factors) -> dict[str, Tensor]:
    roles = {
        "A": factors.down,
        "B": factors.up,
        "magnitude": factors.magnitude,
        "bias": factors.bias,
        "alpha": torch.tensor(factors.alpha, dtype=torch.float64),
    }
    return {role: value for role, value in roles.items() if value is not None}


def _with_text_model(config: dict[str, Any]) -> None:
    """Let peft find the layers with and without what transformers 5 drops of their names."""
    maybe = r"(text_model\.)?"
    config["target_modules"] = f"{maybe}({config['target_modules']})"
    for pattern in ("rank_pattern", "alpha_pattern"):
        config[pattern] = {
            key.replace("^", f"^{maybe}"): value for key, value in config[pattern].items()
        }
