"""DreamBooth on all weights of the denoiser (Ruiz et al., CVPR 2023), optionally of the text encoder."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from dreamblend.errors import InputError
from dreamblend.models import Backbone, load_backbone, locate_base
from dreamblend.models.trust import read_config
from dreamblend.snapshots import Files, Weights
from dreamblend.tuning.method import Method


class Full(Method):
    """Train every weight of the denoiser.

    Args:
        text_encoder: train the text encoder too.
    """

    name = "full"

    def __init__(self, text_encoder: bool = False):
        self.text_encoder = text_encoder

    def attach(self, backbone: Backbone, identifier: str = "", class_noun: str = "") -> None:
        for module in self.trained(backbone):
            module.requires_grad_(True)

    def export(self, backbone: Backbone) -> Files:
        files = _files("unet", "diffusion_pytorch_model.safetensors", backbone.denoiser)
        if self.text_encoder:
            files |= _files("text_encoder", "model.safetensors", backbone.text_encoders[0])
        return files

    @staticmethod
    def restore(path: Path, backbone: Backbone, name: str) -> Backbone:
        if path.is_file():
            return _from_file(path, backbone)
        modules = {"denoiser": _load(type(backbone.denoiser), path, "unet", backbone.denoiser)}
        if (path / "text_encoder" / "config.json").is_file():
            modules["text_encoder"] = _load(type(backbone.text_encoders[0]), path, "text_encoder", backbone.text_encoders[0])
        return backbone.replaced(**modules)


def _files(folder: str, weights: str, module: nn.Module) -> Files:
    config = json.loads((module if hasattr(module, "to_json_string") else module.config).to_json_string())  # diffusers, transformers
    config.pop("_name_or_path", None)  # where the base lay on this machine
    if "_class_name" in config:  # a sharded module is of a class that torch made
        config["_class_name"] = config["_class_name"].removeprefix("FSDP")
    return {f"{folder}/config.json": config, f"{folder}/{weights}": Weights(module.state_dict())}


def _from_file(path: Path, backbone: Backbone) -> Backbone:
    """A whole pipeline in one file. Its configuration is the base's."""
    base = locate_base(backbone.base)
    whole = load_backbone(str(path), backbone.base_config if Path(base).is_file() else base, backbone.scheduler.config.prediction_type)
    return backbone.replaced(denoiser=whole.denoiser, text_encoder=whole.text_encoders[0])


def _load(kind: type, path: Path, folder: str, like: nn.Module) -> nn.Module:
    read_config(path / folder / "config.json")
    try:
        variant = "fp16" if all(".fp16." in file.name for file in (path / folder).glob("*.safetensors")) else None
        options = dict(variant=variant, use_safetensors=True, dtype=like.dtype, output_loading_info=True)
        module, loading = kind.from_pretrained(path, subfolder=folder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot load {path / folder}: {str(error).splitlines()[0]}") from error
    if lacking := sorted(loading["missing_keys"]):  # the libraries would leave these at random
        raise InputError(f"{path / folder} lacks weights ({lacking[0]} and {len(lacking) - 1} more): it is incomplete; use another snapshot")
    shapes = lambda m: {k: v.shape for k, v in m.state_dict().items()}
    if shapes(module) != shapes(like):
        raise InputError(f"{path / folder} is of another model than the base: name the base that it was tuned from with --model.base")
    return module
