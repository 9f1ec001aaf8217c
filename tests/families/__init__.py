"""Tiny random pipelines in the real layout of the families that people fine-tune."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dreamblend.models import Backbone, load_backbone

from . import cross, joint

FAMILIES = {
    "sdxl": cross.sdxl,
    "sd3": joint.sd3,
    "flux_dev": joint.flux_dev,
    "flux_schnell": joint.flux_schnell,
    "flux2": joint.flux2,
    "klein_base": joint.klein_base,
    "klein": joint.klein,
    "qwen_image": joint.qwen_image,
    "z_image": joint.z_image,
    "z_image_turbo": joint.z_image_turbo,
    "sana": cross.sana,
    "pixart_sigma": cross.pixart_sigma,
}
# not to be trained, and the word that says why
UNTRAINABLE = {"flux_schnell": "schnell", "klein": "distilled"}
SMALL = 64  # pixels, as the tiny autoencoders take them
CALL = {  # what a family's own pipeline is given beside prompts, size and steps
    "flux_schnell": {"guidance_scale": 0.0},
    "klein": {"guidance_scale": 1.0},
    "z_image_turbo": {"guidance_scale": 0.0},
    "sana": {"use_resolution_binning": False, "clean_caption": False},
    "pixart_sigma": {"use_resolution_binning": False, "clean_caption": False},
}


def save_family(name: str, root: Path) -> Path:
    """The folder `root/name` with the family's tiny pipeline, as diffusers saves it; built once."""
    folder = root / name
    if not folder.exists():
        FAMILIES[name]().save_pretrained(folder)
    return folder


def shrunk(model: Backbone) -> Backbone:
    """The model with a small size of its own: the pipelines of most families say 1024 pixels."""
    side = SMALL // model.pixels_a_latent
    model.latent_shape, model.size = (model.latent_shape[0], side, side), SMALL
    return model


@contextmanager
def small_bases() -> Iterator[None]:
    """Runs and their blends load bases whose own size is small."""

    import pytest  # a machine that only makes the pipelines may lack it

    def load(*args, **options) -> Backbone:
        return shrunk(load_backbone(*args, **options))

    with pytest.MonkeyPatch.context() as patch:
        for module in ("blending.models", "training.module"):
            patch.setattr(f"dreamblend.{module}.load_backbone", load)
        yield


def draw(
    pipeline,
    name: str,
    prompts: list[str],
    height: int = 64,
    width: int = 64,
    output_type: str = "pt",
    **call,
) -> torch.Tensor:
    """Two steps of the family's own pipeline. The noise of a picture follows from its prompt, so it
    is the same alone and in a batch. Returns (batch, 3, height, width), or the pipeline's latents.
    """
    if name == "qwen_image":  # guided only with a negative prompt
        call.setdefault("negative_prompt", [""] * len(prompts))
    call = CALL.get(name, {}) | call
    seeds = [sum(prompt.encode()) for prompt in prompts]
    return pipeline(
        prompt=list(prompts),  # Z-Image writes its template into the list that it is given
        height=height,
        width=width,
        num_inference_steps=2,
        output_type=output_type,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **call,
    ).images
