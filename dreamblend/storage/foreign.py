"""Checkpoints made elsewhere: the content of another tool's file or folder, by its layout and the
names of its tensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError, safe_open

from dreamblend.errors import InputError
from dreamblend.models import pipelines

LORA = "pytorch_lora_weights.safetensors"
CUSTOM = "pytorch_custom_diffusion_weights.safetensors"
WORD = "learned_embeds.safetensors"
PEFT, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DENOISERS = ("unet", "transformer")  # what pipelines of diffusers call them
PARTS = (*DENOISERS, "text_encoder", "text_encoder_2")  # what a snapshot may hold
PICKLES = {".ckpt", ".pt", ".bin", ".pth"}


def method_of(path: Path) -> str:
    """The method of a checkpoint made elsewhere, by its layout."""
    if path.is_file():
        if path.suffix.lower() in PICKLES:
            raise InputError(
                f"{path} is a pickle, which can run code when it is read: convert it first, where"
                " it cannot do harm, by diffusers' `from_single_file` and `save_pretrained`, or"
                " for a LoRA by `load_lora_weights` and `save_lora_weights`"
            )
        return _method(path)
    there = [name for name in (LORA, CUSTOM, WORD) if (path / name).is_file()]
    adapters = [
        folder
        for folder in (path, *(path / part for part in PARTS))
        if (folder / PEFT_CONFIG).is_file()
    ]
    there += [str(folder.relative_to(path) / PEFT) for folder in adapters[:1]]
    if len(there) > 1:
        raise InputError(
            f"{path} holds {there[0]} and {there[1]}, and one snapshot is loaded at a time: name"
            " the file to load"
        )
    for folder in adapters:
        if not (folder / PEFT).is_file():
            raise InputError(
                f"{folder} is a peft adapter without {PEFT}: save it again with"
                " safe_serialization=True, as pickles are not read"
            )
    if adapters and (
        whole := [
            folder
            for folder in (path / part for part in PARTS)
            if (folder / "config.json").is_file()
        ]
    ):
        raise InputError(
            f"{path} holds a peft adapter and all weights of {whole[0]}: one snapshot is loaded at"
            " a time; move one of them to another folder"
        )
    if there:
        return _method(path / there[0])
    for denoiser in DENOISERS:
        if (path / denoiser / "config.json").is_file():
            if not list((path / denoiser).glob("*.safetensors")):
                raise InputError(
                    f"{path / denoiser} has no .safetensors weights: save it with"
                    " safe_serialization=True"
                )
            return "full"
    _unknown(path)


def _unknown(path: Path) -> NoReturn:
    folders = (
        "a run's step-NNNNNN folder, a diffusers checkpoint or pipeline folder, a peft adapter"
    )
    files = "a LoRA, a learned word or a whole model"
    raise InputError(
        f"{path} is no snapshot: it should be {folders}, or a .safetensors file of {files}"
    )


# Adapters that are no LoRA, by what LyCORIS, kohya and peft call their tensors.
_OTHER_ADAPTERS = {
    r"\.hada_": "a LoHa adapter (Hadamard products, LyCORIS)",
    r"\.lokr_": "a LoKr adapter (Kronecker products, LyCORIS)",
    r"\.lora_mid": "a LoCon adapter with a middle factor (Tucker decomposition, LyCORIS)",
    r"\.(oft_|boft_)": "an OFT adapter (orthogonal fine-tuning)",
    r"\.[ab][12]\.weight$": "a GLoRA adapter (LyCORIS)",
    r"\.(ia3_|on_input$)": "an (IA)^3 adapter",
    r"\.(diff|diff_b|w_norm|b_norm)$": "a file of whole differences (LyCORIS)",
    r"\.vera_": "a VeRA adapter",
}


def _method(path: Path) -> str:
    """The method of a safetensors file, by the names of its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error})") from error
    if any(key.startswith("model.diffusion_model.") and "lora" not in key for key in shapes):
        return "full"  # of a kind that may not be known
    for name, kind in _OTHER_ADAPTERS.items():
        if any(re.search(name, key) for key in shapes):
            raise InputError(
                f"{path} is {kind}, and of adapters only LoRA, LoCon and DoRA can be read: merge it"
                " into its base with the tool that made it, and name the merged checkpoint"
            )
    if any("lora" in key for key in shapes):
        return "t-lora" if '"t_lora.' in metadata.get("lora_adapter_metadata", "") else "lora"
    if any("_custom_diffusion" in key for key in shapes):
        return "custom-diffusion"
    if (
        shapes.keys() & {"clip_l", "clip_g", "emb_params"}
        or len(shapes) == 1
        and all(map(_is_word, shapes, shapes.values()))
    ):
        return "textual-inversion"
    if pipelines.kind_of(pipelines.shapes_of(path)) != "v1":  # as diffusers calls the unknown
        return "full"  # a denoiser alone
    _unknown(path)


def _is_word(key: str, shape: list[int]) -> bool:
    """Whether a tensor may be a word's vectors, (channels,) or (n, channels), under the word as its
    name.
    """
    return bool(re.fullmatch(r"<.+>", key)) or (
        "." not in key and len(shape) in (1, 2) and shape[-1] > 1
    )
