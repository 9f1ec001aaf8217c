"""DreamBooth on all weights of the denoiser (Ruiz et al., CVPR 2023), optionally of the text
encoder.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError
from torch import nn

from dreamblend.errors import InputError
from dreamblend.models import Backbone
from dreamblend.models.loading import load_parts
from dreamblend.models.noise import predicted
from dreamblend.models.pipelines import weight_files
from dreamblend.models.trust import read_config
from dreamblend.storage.snapshots import Files, Weights
from dreamblend.tuning.method import Method


class Full(Method):
    """Train every weight of the denoiser.

    Args:
        text_encoder: train the text encoder too.
    """

    name = "full"
    apart = False
    rates = {"sandbox": 5e-4, "sandbox-dit": 5e-4, "usual": 5e-6}

    def __init__(self, text_encoder: bool = False):
        self.text_encoder = text_encoder

    def attach(self, backbone: Backbone, identifier: str = "", class_noun: str = "") -> None:
        trained = self.trained(backbone)
        for module in trained.values():
            module.requires_grad_(True)
        for part in trained.keys() & backbone.idle().keys():  # no gradient would reach them
            for layer in backbone.idle()[part]:
                trained[part].get_submodule(layer).requires_grad_(False)

    def export(self, backbone: Backbone) -> Files:
        files: Files = {}
        for name, module in self.trained(backbone).items():
            files |= _files(name, module)
        return files

    @staticmethod
    def restore(
        path: Path,
        backbone: Backbone,
        name: str,
        identifier: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Backbone:
        if path.is_file():
            return _from_file(path, backbone)
        _compare(path, backbone)
        there = {
            name: module
            for name, module in backbone.parts().items()
            if name == backbone.denoiser_name or (path / name / "config.json").is_file()
        }
        return backbone.replaced(
            dtype, **{name: _load(path, name, module, dtype) for name, module in there.items()}
        )


def _files(folder: str, module: nn.Module) -> Files:
    """What the module's `save_pretrained` writes, without the path of the base on this machine."""
    from diffusers import ConfigMixin

    tensors, weights = module.state_dict(), "model.safetensors"
    if isinstance(module, ConfigMixin):  # of diffusers
        weights = "diffusion_pytorch_model.safetensors"
        config = json.loads(module.to_json_string())
        config |= {
            "_class_name": config["_class_name"].removeprefix("FSDP")
        }  # a sharded module is of a class that torch made
    else:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion

        assert isinstance(module, PreTrainedModel)  # all parts are of one library or the other
        # to the names of the base's file: transformers 5 drops `text_model.` in memory
        tensors = revert_weight_conversion(module, tensors)
        config = json.loads(module.config.to_json_string())
        config |= {
            "architectures": [type(module).__name__.removeprefix("FSDP")],
            "dtype": str(module.dtype).removeprefix("torch."),
        }
    config.pop("_name_or_path", None)
    return {f"{folder}/config.json": config, f"{folder}/{weights}": Weights(tensors)}


def _from_file(path: Path, backbone: Backbone) -> Backbone:
    """The parts that a single file holds; the others are the base's."""
    parts, whole = load_parts(path, backbone), backbone.components()
    for name, module in parts.items():
        _check_shapes(str(path), module, whole[name])
    if vae := parts.pop("vae", None):
        _warn_of_vae(path, vae, backbone)
    return backbone.replaced(**parts)


def _compare(path: Path, backbone: Backbone) -> None:
    """Compare the scheduler and the VAE of a pipeline folder with the base's, which are used."""
    file, ours = path / "scheduler" / "scheduler_config.json", backbone.training_noise().prediction
    if file.is_file() and (theirs := predicted(read_config(file))) != ours:
        raise InputError(
            f"{path} predicts {theirs}, and its base {backbone.base} {ours}: name its own base with"
            " --model.base"
        )
    if (path / "vae" / "config.json").is_file():
        _warn_of_vae(path, _load(path, "vae", backbone.vae), backbone)


def _warn_of_vae(path: Path, vae: nn.Module, backbone: Backbone) -> None:
    """Warn where a VAE is not the base's, which decodes all images. Rounding to half precision is
    no difference.
    """
    ours = backbone.vae.state_dict()
    if not all(
        torch.allclose(value.float().cpu(), ours[name].float().cpu(), rtol=1e-2, atol=1e-3)
        for name, value in vae.state_dict().items()
    ):
        warnings.warn(
            f"{path} has another VAE than {backbone.base}, and images are decoded by the base's: to"
            " use it, make it the base's",
            stacklevel=2,
        )


class _Pretrained(Protocol):
    """A class of models, as diffusers and transformers have it in common."""

    __name__: str

    def from_pretrained(
        self,
        path: Path,
        *,
        subfolder: str,
        variant: str | None,
        use_safetensors: bool,
        dtype: object,
        output_loading_info: bool,
    ) -> tuple[nn.Module, dict[str, list[str]]]: ...


def _load(path: Path, folder: str, like: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A module from a folder, of the class of `like`, and of its dtype where none is given."""
    read_config(path / folder / "config.json")
    kind = cast(_Pretrained, type(like))
    try:
        _, variant = weight_files(path / folder)
        module, loading = kind.from_pretrained(
            path,
            subfolder=folder,
            variant=variant,
            use_safetensors=True,
            dtype=dtype or like.dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot load {path / folder}: {str(error).splitlines()[0]}") from error
    if lacking := sorted(loading["missing_keys"]):  # the libraries would leave these at random
        raise InputError(
            f"{path / folder} lacks weights ({lacking[0]} and {len(lacking) - 1} more): it is"
            " incomplete; use another snapshot"
        )
    if unknown := sorted(loading["unexpected_keys"]):  # the libraries would leave these out
        raise InputError(
            f"{path / folder} holds weights that a {kind.__name__} has no place for ({unknown[0]}"
            f" and {len(unknown) - 1} more): use another snapshot"
        )

    _check_shapes(str(path / folder), module, like)
    return module


def _check_shapes(path: str, module: nn.Module, like: nn.Module) -> None:
    """Raise InputError where a module from `path` has other weights than one of the base."""

    def shapes(module: nn.Module) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in module.state_dict().items()}

    if shapes(module) != shapes(like):
        raise InputError(
            f"{path} is of another model than the base: name the base that it was tuned from with"
            " --model.base"
        )
