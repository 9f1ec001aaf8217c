"""Models as one file, under the names of their first publication, as other tools keep them: what
diffusers' single-file loaders read.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from dreamblend.models import original_weights

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def original(folder: Path) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion folder under the names of the original (LDM)."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    text = original_weights.clip(CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"))
    found = denoiser(unet, "model.diffusion_model.")
    found |= {f"first_stage_model.{name}": value for name, value in vae(folder).items()}
    found |= {f"cond_stage_model.transformer.{name}": value for name, value in text.items()}
    # the last is of no part
    return copies(found) | {"betas": torch.linspace(0.01, 0.1, 10)}


def denoiser(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a denoiser of diffusers under their original names."""
    return copies(original_weights.denoiser(module, prefix))


def vae(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder's autoencoder (AutoencoderKL)."""
    module = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    return copies(original_weights.autoencoder(module))


def open_clip(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a text encoder as OpenCLIP has them."""
    return copies(original_weights.open_clip(module))


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """That can be saved and changed."""
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}
