"""What denoisers call their layers where they were first published, and what other tools still call
them; diffusers has names of its own.

One layer of the original may hold several of diffusers', one below the other in its rows: queries,
keys and values, say.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

# original name -> diffusers' names; * is the number of a block
_FLUX = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "double_blocks.*.img_mod.lin": "transformer_blocks.*.norm1.linear",
    "double_blocks.*.txt_mod.lin": "transformer_blocks.*.norm1_context.linear",
    "double_blocks.*.img_attn.qkv": [f"transformer_blocks.*.attn.{x}" for x in _QKV],
    "double_blocks.*.txt_attn.qkv": [f"transformer_blocks.*.attn.{x}" for x in _ADDED],
    "double_blocks.*.img_attn.proj": "transformer_blocks.*.attn.to_out.0",
    "double_blocks.*.txt_attn.proj": "transformer_blocks.*.attn.to_add_out",
    "double_blocks.*.img_mlp.0": "transformer_blocks.*.ff.net.0.proj",
    "double_blocks.*.img_mlp.2": "transformer_blocks.*.ff.net.2",
    "double_blocks.*.txt_mlp.0": "transformer_blocks.*.ff_context.net.0.proj",
    "double_blocks.*.txt_mlp.2": "transformer_blocks.*.ff_context.net.2",
    "single_blocks.*.modulation.lin": "single_transformer_blocks.*.norm.linear",
    "single_blocks.*.linear1": [
        *(f"single_transformer_blocks.*.attn.{x}" for x in _QKV),
        "single_transformer_blocks.*.proj_mlp",
    ],
    "single_blocks.*.linear2": "single_transformer_blocks.*.proj_out",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_FLUX2 = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_blocks.*.img_attn.qkv": [f"transformer_blocks.*.attn.{x}" for x in _QKV],
    "double_blocks.*.txt_attn.qkv": [f"transformer_blocks.*.attn.{x}" for x in _ADDED],
    "double_blocks.*.img_attn.proj": "transformer_blocks.*.attn.to_out.0",
    "double_blocks.*.txt_attn.proj": "transformer_blocks.*.attn.to_add_out",
    "double_blocks.*.img_mlp.0": "transformer_blocks.*.ff.linear_in",
    "double_blocks.*.img_mlp.2": "transformer_blocks.*.ff.linear_out",
    "double_blocks.*.txt_mlp.0": "transformer_blocks.*.ff_context.linear_in",
    "double_blocks.*.txt_mlp.2": "transformer_blocks.*.ff_context.linear_out",
    "single_blocks.*.linear1": "single_transformer_blocks.*.attn.to_qkv_mlp_proj",
    "single_blocks.*.linear2": "single_transformer_blocks.*.attn.to_out",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_SD3 = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "joint_blocks.*.x_block.adaLN_modulation.1": "transformer_blocks.*.norm1.linear",
    "joint_blocks.*.context_block.adaLN_modulation.1": "transformer_blocks.*.norm1_context.linear",
    "joint_blocks.*.x_block.attn.qkv": [f"transformer_blocks.*.attn.{x}" for x in _QKV],
    "joint_blocks.*.context_block.attn.qkv": [f"transformer_blocks.*.attn.{x}" for x in _ADDED],
    "joint_blocks.*.x_block.attn2.qkv": [f"transformer_blocks.*.attn2.{x}" for x in _QKV],
    "joint_blocks.*.x_block.attn.proj": "transformer_blocks.*.attn.to_out.0",
    "joint_blocks.*.context_block.attn.proj": "transformer_blocks.*.attn.to_add_out",
    "joint_blocks.*.x_block.attn2.proj": "transformer_blocks.*.attn2.to_out.0",
    "joint_blocks.*.x_block.mlp.fc1": "transformer_blocks.*.ff.net.0.proj",
    "joint_blocks.*.x_block.mlp.fc2": "transformer_blocks.*.ff.net.2",
    "joint_blocks.*.context_block.mlp.fc1": "transformer_blocks.*.ff_context.net.0.proj",
    "joint_blocks.*.context_block.mlp.fc2": "transformer_blocks.*.ff_context.net.2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_Z_IMAGE = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    **{
        f"{blocks}.*.attention.qkv": [f"{blocks}.*.attention.{x}" for x in _QKV]
        for blocks in ("layers", "noise_refiner", "context_refiner")
    },
    **{
        f"{blocks}.*.attention.out": f"{blocks}.*.attention.to_out.0"
        for blocks in ("layers", "noise_refiner", "context_refiner")
    },
}
_PIXART_ATTENTION = {
    "blocks.*.attn.qkv": [f"transformer_blocks.*.attn1.{x}" for x in _QKV],
    "blocks.*.attn.proj": "transformer_blocks.*.attn1.to_out.0",
    "blocks.*.cross_attn.q_linear": "transformer_blocks.*.attn2.to_q",
    "blocks.*.cross_attn.kv_linear": [f"transformer_blocks.*.attn2.{x}" for x in _QKV[1:]],
    "blocks.*.cross_attn.proj": "transformer_blocks.*.attn2.to_out.0",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
_PIXART = {
    **_PIXART_ATTENTION,
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "blocks.*.mlp.fc1": "transformer_blocks.*.ff.net.0.proj",
    "blocks.*.mlp.fc2": "transformer_blocks.*.ff.net.2",
}
_SANA = {
    **_PIXART_ATTENTION,
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "blocks.*.mlp.inverted_conv.conv": "transformer_blocks.*.ff.conv_inverted",
    "blocks.*.mlp.depth_conv.conv": "transformer_blocks.*.ff.conv_depth",
    "blocks.*.mlp.point_conv.conv": "transformer_blocks.*.ff.conv_point",
}
_TABLES: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX2,
    "SD3Transformer2DModel": _SD3,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "SanaTransformer2DModel": _SANA,
    "PixArtTransformer2DModel": _PIXART,
}
# diffusers' name of a layer in a block of a UNet -> the original
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


class Original(NamedTuple):
    """A layer of the original: the layers that its rows are of, from above, and whether its two
    halves have changed places.
    """

    layers: tuple[str, ...]
    swapped: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is a layer of diffusers as it is."""
        return len(self.layers) == 1 and not self.swapped

    def split(self, value: Tensor, counts: list[int]) -> dict[str, Tensor]:
        """Each layer's rows of a tensor (rows, ...) of the original, as many as `counts` says.

        Raises ValueError where the tensor has not as many.
        """
        if self.swapped:
            value = value.roll(len(value) // 2, 0)
        if len(value) != sum(counts):
            raise ValueError(f"it has {len(value)} rows and not {sum(counts)}")
        return dict(zip(self.layers, value.split(counts)))

    def join(self, values: list[Tensor]) -> Tensor:
        """The tensor (rows, ...) of the original whose rows these are: `split` undone."""
        value = torch.cat(values)
        return value.roll(len(value) // 2, 0) if self.swapped else value


def original_names(denoiser: nn.Module) -> dict[str, Original]:
    """The layers of a denoiser by their original names, where these are not diffusers' own."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.normalization import AdaLayerNormContinuous

    # those that an adapter wraps have their name too; the layers of the adapter are in no table
    there = dict(denoiser.named_modules())
    if isinstance(denoiser, UNet2DConditionModel):
        return {old: Original((new,)) for old, new in _unet(denoiser, there)}
    found = {}
    for original, names in _TABLES.get(type(denoiser).__name__, {}).items():
        names = [names] if isinstance(names, str) else names
        pattern = re.compile(re.escape(names[0]).replace(r"\*", r"(\d+)"))
        for match in filter(None, map(pattern.fullmatch, there)):
            number = "".join(match.groups())
            layers = tuple(name.replace("*", number) for name in names)
            # which diffusers splits into scale and shift, and the original into shift and scale
            norm = there[layers[0].rpartition(".")[0]]
            swapped = isinstance(norm, AdaLayerNormContinuous)
            found[original.replace("*", number)] = Original(layers, swapped)
    return found


def _unet(unet: Any, there: dict[str, nn.Module]) -> list[tuple[str, str]]:
    """The blocks of a UNet are counted one after the other, through all sizes."""
    blocks = [("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out")]
    blocks += [(f"time_embed.{2 * i}", f"time_embedding.linear_{i + 1}") for i in (0, 1)]
    blocks += [(f"label_emb.0.{2 * i}", f"add_embedding.linear_{i + 1}") for i in (0, 1)]
    count = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            blocks.append((f"input_blocks.{count}.0", f"down_blocks.{i}.resnets.{j}"))
            blocks.append((f"input_blocks.{count}.1", f"down_blocks.{i}.attentions.{j}"))
            count += 1
        if block.downsamplers:
            blocks.append((f"input_blocks.{count}.0.op", f"down_blocks.{i}.downsamplers.0.conv"))
            count += 1
    middle = ("resnets.0", "attentions.0", "resnets.1")
    blocks += [(f"middle_block.{i}", f"mid_block.{name}") for i, name in enumerate(middle)]
    count = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            blocks.append((f"output_blocks.{count}.0", f"up_blocks.{i}.resnets.{j}"))
            blocks.append((f"output_blocks.{count}.1", f"up_blocks.{i}.attentions.{j}"))
            count += 1
        place = 1 + bool(getattr(block, "attentions", None))
        blocks.append(
            (f"output_blocks.{count - 1}.{place}.conv", f"up_blocks.{i}.upsamplers.0.conv")
        )
    found = []
    for old, new in blocks:
        inside = [name for name in there if name == new or name.startswith(f"{new}.")]
        shown = {ours: theirs for theirs, ours in _RESNET.items()}
        for name in inside:
            rest = name[len(new) + 1 :]
            rest = shown.get(rest, rest)
            found.append((f"{old}.{rest}" if rest else old, name))
    return found
