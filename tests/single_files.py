"""Models as one file, under the names of their first publication, as other tools keep them: what
diffusers' single-file loaders read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamblend.models.original_names import original_names

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"

_BLOCK = r"^transformer_blocks\.(\d+)\."
# diffusers' names of weights that are of no linear layer -> the original ones
_OTHERS = {
    "FluxTransformer2DModel": {
        _BLOCK + r"attn\.norm_([qk])\.weight": r"double_blocks.\1.img_attn.norm.\2_norm.scale",
        _BLOCK + r"attn\.norm_added_([qk])\.weight": (
            r"double_blocks.\1.txt_attn.norm.\2_norm.scale"
        ),
        r"^single_transformer_blocks\.(\d+)\.attn\.norm_([qk])\.weight": (
            r"single_blocks.\1.norm.\2_norm.scale"
        ),
        r"\.q_norm\.scale": ".query_norm.scale",
        r"\.k_norm\.scale": ".key_norm.scale",
    },
    "SD3Transformer2DModel": {
        _BLOCK + r"(attn2?)\.norm_([qk])\.": r"joint_blocks.\1.x_block.\2.ln_\3.",
        _BLOCK + r"attn\.norm_added_([qk])\.": r"joint_blocks.\1.context_block.attn.ln_\2.",
        r"pos_embed\.pos_embed": "pos_embed",
    },
    "ZImageTransformer2DModel": {r"attention\.norm_([qk])\.": r"attention.\1_norm."},
    "SanaTransformer2DModel": {
        r"^scale_shift_table": "final_layer.scale_shift_table",
        _BLOCK + "scale_shift_table": r"blocks.\1.scale_shift_table",
        "caption_norm": "attention_y_norm",
    },
}
_OTHERS["Flux2Transformer2DModel"] = _OTHERS["FluxTransformer2DModel"]
# what the originals hold beside, which diffusers makes or leaves out
_BESIDE = {"SanaTransformer2DModel": ("pos_embed", "y_embedder.y_embedding")}


def original(folder: Path) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion folder under the names of the original (LDM)."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    found = denoiser(unet, "model.diffusion_model.")
    found |= {f"first_stage_model.{name}": value for name, value in vae(folder).items()}
    for name, value in load_file(folder / TEXT).items():
        found[f"cond_stage_model.transformer.text_model.{name}"] = value
    found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(32)[
        None
    ]
    return {k: v.contiguous() for k, v in found.items()} | {
        "betas": torch.linspace(0.01, 0.1, 10)
    }  # which no part takes


def denoiser(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a denoiser of diffusers under their original names."""
    state, found = dict(module.state_dict()), {}
    for name, old in original_names(module).items():
        for kind in ("weight", "bias"):
            own = [state.pop(f"{layer}.{kind}", None) for layer in old.layers]
            if own[0] is not None:
                value = torch.cat(own)
                found[f"{name}.{kind}"] = (
                    value.roll(len(value) // 2, 0) if old.swapped else value
                ).clone()
    for name, value in state.items():
        for pattern, new in _OTHERS.get(type(module).__name__, {}).items():
            name = re.sub(pattern, new, name)
        found[name] = value.clone()
    found |= {name: torch.zeros(1) for name in _BESIDE.get(type(module).__name__, ())}
    return {f"{prefix}{name}": value for name, value in found.items()}


def vae(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder's autoencoder (AutoencoderKL)."""
    levels = len(json.loads((folder / "vae/config.json").read_text())["block_out_channels"])
    found = {}
    attention = {
        "group_norm.": "norm.",
        "to_q.": "q.",
        "to_k.": "k.",
        "to_v.": "v.",
        "to_out.0.": "proj_out.",
    }
    for name, value in load_file(folder / VAE).items():
        name = re.sub(
            r"mid_block\.resnets\.(\d)",
            lambda m: f"mid.block_{int(m[1]) + 1}",
            name.replace("conv_norm_out", "norm_out"),
        )
        name = re.sub(
            r"up_blocks\.(\d+)",
            lambda m: f"up.{levels - 1 - int(m[1])}",
            name.replace("down_blocks", "down"),
        ).replace("resnets", "block")
        name = (
            name.replace("downsamplers.0", "downsample")
            .replace("upsamplers.0", "upsample")
            .replace("conv_shortcut", "nin_shortcut")
        )
        if "mid_block.attentions.0" in name:
            name = re.sub(
                "group_norm\\.|to_[qkv]\\.|to_out\\.0\\.",
                lambda m: attention[m[0]],
                name.replace("mid_block.attentions.0", "mid.attn_1"),
            )
            value = value[..., None, None] if value.ndim == 2 else value  # they were convolutions
        found[name] = value
    return found


def open_clip(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a text encoder as OpenCLIP has them: queries, keys and values are one."""
    state = {k.removeprefix("text_model."): v for k, v in module.state_dict().items()}
    found = {
        "text_projection": state.pop("text_projection.weight").T,
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
    }
    short = {
        "encoder.layers.": "transformer.resblocks.",
        "final_layer_norm": "ln_final",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for name in list(state):
        if ".q_proj." in name:
            own = [state.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
            state[name] = torch.cat(own)
    for name, value in state.items():
        for ours, theirs in short.items():
            name = name.replace(ours, theirs)
        found[name] = value
    return {name: value.contiguous() for name, value in found.items()}
