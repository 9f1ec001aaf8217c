"""What LoRA files call layers and the tensors of an adapter.

    diffusers    unet.<layer>.lora_A.weight or .lora.down.weight,
                 text_encoder.<layer>.lora_linear_layer.down.weight,
                 <attention>.processor.to_q_lora.down.weight
    kohya        lora_unet_<layer>.lora_down.weight, .alpha and .dora_scale, lora_te_<layer>,
                 with _ for every dot; LyCORIS, musubi, ai-toolkit (SD 1.x, SDXL) and
                 diffusion-pipe (SDXL) likewise, and OneTrainer, lora_transformer_<layer> too
    ComfyUI      diffusion_model.<layer>.lora_A.weight, text_encoders.clip_l.transformer.<layer>;
                 ai-toolkit likewise, whose DoRA has .magnitude, and OneTrainer with .alpha, or
                 without the beginning
    XLabs        double_blocks.<n>.processor.qkv_lora1.down.weight, of FLUX.1
    peft         base_model.model.<layer>.lora_A.weight, and adapter_config.json beside;
                 trainers with such names (fal's) may leave that out

A layer has diffusers' name, or that of the model's first publication (`models/original_names.py`),
where queries, keys and values may be one.

diffusers' converters of these names drop DoRA's magnitudes and the alphas of single layers
(`_convert_non_diffusers_lora_to_diffusers`, `get_peft_kwargs` of 0.42), or know one width of a
model, so here a name is looked up among the layers themselves.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

from dreamblend.models.original_names import Original, original_names
from dreamblend.storage.foreign import DENOISERS

PEFT_PREFIX = "base_model.model."  # of every name in a file that peft wrote

# role of a tensor in its layer's adapter -> peft's name of it; `alpha` is in peft's configuration
PEFT_NAMES = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
}
_ROLE = re.compile(
    r"(?P<layer>.+?)\.(?:"
    r"(?P<A>(?:lora_A|lora_A\.default|lora_down|lora\.down|lora_linear_layer\.down|down)\.weight)|"
    r"(?P<B>(?:lora_B|lora_B\.default|lora_up|lora\.up|lora_linear_layer\.up|up)\.weight)|"
    r"(?P<bias>(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up)\.bias)|"
    r"(?P<magnitude>lora_magnitude_vector(?:\.weight)?|dora_scale|magnitude)|"
    r"(?P<alpha>alpha)|(?P<embedding_A>lora_embedding_A)|(?P<embedding_B>lora_embedding_B))"
)
# how kohya's names of layers begin
_FLAT = {
    "unet": ("lora_unet_", "lycoris_unet_", "lycoris_"),
    "transformer": ("lora_unet_", "lora_transformer_", "lycoris_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lycoris_te_"),
    "text_encoder_2": ("lora_te2_",),
}
# how ComfyUI's do
_DOTTED = {
    **{denoiser: ("diffusion_model.", "model.diffusion_model.") for denoiser in DENOISERS},
    "text_encoder": ("text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
    "text_encoder_2": ("text_encoders.clip_g.transformer.",),
}
# XLabs' names of FLUX.1's processors -> the original's layers, of which they are
_XLABS = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
}
_ATTENTION = ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj", "out_proj")


class TensorName(NamedTuple):
    """What the name of a tensor in a file says: the file's name of the layer, and the role."""

    layer: str
    role: str


def parse(key: str) -> TensorName | None:
    """The parts of a tensor's name; None where it is no name of an adapter's tensor."""
    match = _ROLE.fullmatch(key.removeprefix(PEFT_PREFIX).replace(".processor.", "."))
    if match is None:
        return None
    roles = [role for role, text in match.groupdict().items() if text and role != "layer"]
    return TensorName(match["layer"], roles[0])


def spellings(modules: dict[str, nn.Module]) -> dict[str, tuple[str, Original]]:
    """What files call a layer -> the name of its module, and the layers in it that it is of."""
    spelled: dict[str, tuple[str, Original]] = {}
    for part, module in modules.items():
        layers = original_names(module) if part in DENOISERS else {}
        named = list(layers.items())
        named += [
            (f"double_blocks.{match[1]}.{xlabs}", original)
            for name, original in layers.items()
            for xlabs, inside in _XLABS.items()
            if (match := re.fullmatch(rf"double_blocks\.(\d+)\.{re.escape(inside)}", name))
        ]
        named += [
            (name, Original((layer,)))
            for layer, _ in module.named_modules()
            # not those of an adapter that is there already
            if layer and ".base_layer" not in layer and ".lora_" not in layer
            for name in _names(part, layer)
        ]
        for name, original in named:
            flat = name.replace(".", "_")
            for start in ("", f"{part}.", *_DOTTED.get(part, ())):
                spelled[start + name] = part, original
            for start in _FLAT.get(part, ()):
                spelled[start + flat] = part, original
    return spelled


def _names(part: str, layer: str) -> list[str]:
    """The names of a layer in files of diffusers, through its versions."""
    # older versions of transformers have `text_model.`, and all files
    plain = layer.removeprefix("text_model.")
    names = [plain, *([f"text_model.{plain}"] if part.startswith("text_encoder") else [])]
    attention, _, last = plain.rpartition(".")
    if last in _ATTENTION:
        short = last.removeprefix("to_").removesuffix("_proj")
        names += [f"{name.rpartition('.')[0]}.to_{short}_lora" for name in names]
    elif plain.endswith(".to_out.0"):
        names.append(f"{attention}_lora")
    return names
