"""A pipeline folder as one file, as the first tools of Stable Diffusion wrote it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def original(folder: Path) -> dict[str, Tensor]:
    """A pipeline folder's weights under the names of the original (LDM) Stable Diffusion: what
    diffusers' single-file loader reads.
    """
    depth = json.loads((folder / "unet/config.json").read_text())["layers_per_block"] + 1
    levels = len(json.loads((folder / "vae/config.json").read_text())["block_out_channels"])
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
    }
    whole = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
    }
    whole |= {"time_embedding.linear_2": "time_embed.2"}
    found = {}
    tensors = load_file(folder / UNET)
    for name, value in tensors.items():
        stem, kind = name.rsplit(".", 1)
        if stem in whole:
            found[f"model.diffusion_model.{whole[stem]}.{kind}"] = value
            continue
        *where, part, number, rest = re.fullmatch(
            r"(?:(mid)_block|(down|up)_blocks\.(\d+))\.(\w+)\.(\d+)\.(.*)", name
        ).groups()
        side, block, number = where[0] or where[1], int(where[2] or 0), int(number)
        if part == "resnets":
            rest = re.sub("|".join(resnet), lambda m: resnet[m[0]], rest).replace(
                "conv_shortcut", "skip_connection"
            )
        if side == "mid":
            place = f"middle_block.{2 * number if part == 'resnets' else 1}"
        elif part == "downsamplers":
            place, rest = f"input_blocks.{(block + 1) * depth}.0", rest.replace("conv", "op")
        elif part == "upsamplers":
            attended = any(k.startswith(f"up_blocks.{block}.attentions.") for k in tensors)
            place = f"output_blocks.{(block + 1) * depth - 1}.{1 + attended}"
        else:
            blocks, row = ("input", 1) if side == "down" else ("output", 0)
            place = f"{blocks}_blocks.{block * depth + number + row}.{int(part == 'attentions')}"
        found[f"model.diffusion_model.{place}.{rest}"] = value

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
        found[f"first_stage_model.{name}"] = value
    for name, value in load_file(folder / TEXT).items():
        found[f"cond_stage_model.transformer.text_model.{name}"] = value
    found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(32)[
        None
    ]
    return {k: v.contiguous() for k, v in found.items()} | {
        "betas": torch.linspace(0.01, 0.1, 10)
    }  # which no part takes
