"""A LoRA by the names of kohya's trainers, which ComfyUI, A1111 and Forge read, and diffusers for
most families.

    lora_unet_<layer>.lora_down.weight, .lora_up.weight, .alpha and .dora_scale
    lora_te_, lora_te1_, lora_te2_ text_model_<layer>

Layers have the names that the model was published with, _ for every dot. Where these hold several
layers of diffusers (queries, keys and values), the factors lie in blocks on a diagonal, so that
nothing is lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreamblend.errors import InputError
from dreamblend.export.form import LoRAForm, save
from dreamblend.export.low_rank import Factors, LowRank
from dreamblend.export.what import What
from dreamblend.models import Backbone
from dreamblend.models.original_names import Original, original_names


class Kohya(LoRAForm):
    """A file with the LoRA that ComfyUI, A1111 and Forge read."""

    is_file = True

    def write(self, what: What, path: Path) -> None:
        weights = self.low_rank(what)
        if what.rank_mask:
            print("the T-LoRA is exported without its mask, and acts at all timesteps")
        save(named(weights, what.backbone), path, self.marks(what, weights))


def named(weights: LowRank, model: Backbone) -> dict[str, Tensor]:
    """The tensors of the file."""
    found: dict[str, Tensor] = {}
    for part, layers in weights.items():
        if biased := [name for name, factors in layers.items() if factors.bias is not None]:
            raise InputError(
                f"the LoRA has biases ({part}.{biased[0]}), which kohya's files cannot hold: export"
                " it with --form diffusers"
            )
        for name, factors in _named(part, layers, model).items():
            start = f"{name.replace('.', '_')}."
            found[f"{start}lora_down.weight"] = factors.down
            found[f"{start}lora_up.weight"] = factors.up
            found[f"{start}alpha"] = torch.tensor(factors.alpha)
            if factors.magnitude is not None:
                # a column, which tells outputs from inputs
                ones = [1] * (factors.down.ndim - 1)
                found[f"{start}dora_scale"] = factors.magnitude.reshape(-1, *ones)
    return found


def _named(part: str, layers: dict[str, Factors], model: Backbone) -> dict[str, Factors]:
    """The factors by the names of kohya, with dots."""
    if part in model.text_encoders:
        several = len(model.text_encoders) > 1 or model.denoiser_name != "unet"
        number = list(model.text_encoders).index(part) + 1 if several else ""
        start = f"lora_te{number}.text_model"
        return {f"{start}.{n.removeprefix('text_model.')}": f for n, f in layers.items()}
    found = {}
    originals = published_names(model.denoiser)
    left = dict(layers)
    for name, original in originals.items():
        there = [left.pop(layer, None) for layer in original.layers]
        if any(factors is not None for factors in there):
            found[f"lora_unet.{name}"] = joined(original, there, model.denoiser)
    return found | {f"lora_unet.{name}": factors for name, factors in left.items()}


def published_names(denoiser: Any) -> dict[str, Original]:
    """The layers by the names that kohya's files have for them: diffusers' in Stable Diffusion 1.x
    and 2.x, else those of the first publication.
    """
    from diffusers import UNet2DConditionModel

    unet = isinstance(denoiser, UNet2DConditionModel)
    first = unet and denoiser.config.addition_embed_type is None
    return {} if first else original_names(denoiser)


def joined(original: Original, there: list[Factors | None], denoiser: nn.Module) -> Factors:
    """The factors of an original layer, of those of the layers that its rows are of; None for one
    that is as in the base.
    """
    given = [factors for factors in there if factors is not None]
    if original.plain:
        return given[0]
    weights = [_weight(denoiser, layer) for layer in original.layers]
    scales = {factors.scale for factors in given}
    # one scale for all: that of the layers, or where they differ it goes into the factors
    scale = scales.pop() if len(scales) == 1 else 1.0
    rank = sum(factors.rank for factors in given)
    rows, begin = [], 0
    for factors, weight in zip(there, weights):
        block = given[0].up.new_zeros(len(weight), rank, *given[0].up.shape[2:])
        if factors is not None:
            own = factors.up if factors.scale == scale else factors.scale / scale * factors.up
            block[:, begin : begin + factors.rank] = own
            begin += factors.rank
        rows.append(block)
    magnitude = None
    if any(factors.magnitude is not None for factors in given):
        lengths = [
            # of a layer as in the base
            weight.float().flatten(1).norm(dim=1)
            if factors is None or factors.magnitude is None
            else factors.magnitude.flatten()
            for factors, weight in zip(there, weights)
        ]
        magnitude = original.join([length.to(given[0].up.dtype) for length in lengths])
    return Factors(
        torch.cat([factors.down for factors in given]),
        original.join(rows),
        scale * rank,
        magnitude,
    )


def _weight(denoiser: nn.Module, layer: str) -> Tensor:
    weight = denoiser.get_submodule(layer).weight
    assert isinstance(weight, Tensor)  # adapters are of layers of one weight
    return weight
