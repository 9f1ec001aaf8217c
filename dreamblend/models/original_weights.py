"""The weights of models under the names of their first publication, as one file has them that other
tools and diffusers' single-file loaders read.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from dreamblend.models.original_names import original_names

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


def denoiser(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Of a denoiser of diffusers."""
    state, found = dict(module.state_dict()), {}
    for name, old in original_names(module).items():
        for kind in ("weight", "bias"):
            own = [state.pop(f"{layer}.{kind}", None) for layer in old.layers]
            if there := [value for value in own if value is not None]:
                found[f"{name}.{kind}"] = old.join(there)
    for name, value in state.items():
        for pattern, new in _OTHERS.get(type(module).__name__, {}).items():
            name = re.sub(pattern, new, name)
        found[name] = value
    found |= {name: torch.zeros(1) for name in _BESIDE.get(type(module).__name__, ())}
    return {f"{prefix}{name}": value for name, value in found.items()}


_ATTENTION = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}


def autoencoder(module: nn.Module) -> dict[str, Tensor]:
    """Of an AutoencoderKL."""
    state = module.state_dict()
    levels = len({name.split(".")[2] for name in state if name.startswith("decoder.up_blocks.")})
    found = {}
    for name, value in state.items():
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
                r"group_norm\.|to_[qkv]\.|to_out\.0\.",
                lambda m: _ATTENTION[m[0]],
                name.replace("mid_block.attentions.0", "mid.attn_1"),
            )
            value = value[..., None, None] if value.ndim == 2 else value  # they were convolutions
        found[name] = value
    return found


def clip(module: nn.Module) -> dict[str, Tensor]:
    """Of a CLIP text encoder as OpenAI's, in transformers' own names."""
    state = {
        f"text_model.{k.removeprefix('text_model.')}": v for k, v in module.state_dict().items()
    }
    length = len(state["text_model.embeddings.position_embedding.weight"])
    # older versions have it in their files, and some tools look for it
    state["text_model.embeddings.position_ids"] = torch.arange(length)[None]
    return state


_OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "final_layer_norm": "ln_final",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip(module: nn.Module) -> dict[str, Tensor]:
    """Of a CLIP text encoder as OpenCLIP's, where queries, keys and values are one."""
    state = {k.removeprefix("text_model."): v for k, v in module.state_dict().items()}
    found = {
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
    }
    state.pop("embeddings.position_ids", None)
    if (projection := state.pop("text_projection.weight", None)) is not None:
        found["text_projection"] = projection.T
    for name in list(state):
        if ".q_proj." in name:
            own = [state.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
            name = name.replace("self_attn.q_proj.", "attn.in_proj_")
            state[name] = torch.cat(own)
    for name, value in state.items():
        for ours, theirs in _OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        found[name] = value
    return found
