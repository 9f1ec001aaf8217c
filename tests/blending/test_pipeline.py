"""`DreamBlendPipeline`: it draws what `predict` draws, and is called as diffusers' pipelines are."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from families import CALL, FAMILIES, SMALL, save_family, small_bases
from safetensors.torch import save_file
from torch import Tensor

from dreamblend import DreamBlendPipeline
from dreamblend.blending.blends import CAG, Early, Late, Region
from dreamblend.blending.module import Blender
from dreamblend.errors import InputError
from dreamblend.models import load_backbone
from dreamblend.tuning import LoRA

PROMPTS = ["a sks mug on the beach", "a red sks mug in the snow"]
SUBJECT = {"identifier": "sks", "class_noun": "mug"}
FEW = ("stable_diffusion", "flux_dev")  # what differs is inside the families, which have tests of their own
EACH = [
    pytest.param(name, marks=[] if name in FEW else pytest.mark.heavy)
    for name in ("stable_diffusion", *FAMILIES)
]
QUIET = {"disable": True}


def save_lora(base: Path, file: Path, seed: int) -> Path:
    """A random LoRA of a base, as diffusers saves it: a checkpoint made elsewhere."""
    model, tuning = load_backbone(str(base)), LoRA(rank=2)
    tuning.attach(model)
    ((_, weights),) = tuning.export(model).items()
    source = torch.Generator().manual_seed(seed)
    tensors = {
        name: 0.2 * torch.randn(value.shape, generator=source)
        for name, value in weights.tensors.items()
    }
    save_file(tensors, file, metadata=weights.metadata)
    return file


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_base):
    """Family -> its base, and an early and a late LoRA of it."""
    root = tmp_path_factory.mktemp("pairs")

    @functools.cache
    def made(name: str) -> tuple[Path, Path, Path]:
        base = tiny_base if name == "stable_diffusion" else save_family(name, root)
        loras = [save_lora(base, root / f"{name}-{seed}.safetensors", seed) for seed in (1, 2)]
        return base, *loras

    return made


@pytest.fixture
def opened(pair):
    def opened(name: str = "stable_diffusion", **options) -> DreamBlendPipeline:
        base, early, late = pair(name)
        with small_bases():
            made = DreamBlendPipeline.from_pretrained(
                base, early=early, late=late, **{**SUBJECT, **options}
            )
        made.set_progress_bar_config(**QUIET)
        return made

    return opened


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ------------------------------------------------------------------------------------- as `predict`
@pytest.mark.parametrize("name", EACH)
def test_the_predict_loop_draws_the_same_to_the_bit(name, pair, opened):
    """Two prompts with two seeds: images, maps and measures of the blend and of each snapshot."""
    base, early, late = pair(name)
    with small_bases():
        blender = Blender(
            str(early),
            str(late),
            base=str(base),
            num_inference_steps=2,
            guidance_scale=3,
            **SUBJECT,
        )
        drawn = blender.predict_step([(prompt, seed) for prompt in PROMPTS for seed in (5, 6)])
    output = opened(name)(
        PROMPTS,
        num_images_per_prompt=2,
        num_inference_steps=2,
        guidance_scale=3,
        generator=seeded(5, 6, 5, 6),
        compare=True,
    )
    for kind, of_kind in (("early", output.early), ("region", output), ("late", output.late)):
        pictures = [picture for picture in drawn if picture.kind == kind]
        assert len(pictures) == len(of_kind.images) == 4
        for i, picture in enumerate(pictures):
            assert picture.image.tobytes() == of_kind.images[i].tobytes()
            assert picture.words == of_kind.words[i] and torch.equal(picture.maps, of_kind.maps[i])
            assert picture.collapse == of_kind.collapse[i]
    assert output.images[0].tobytes() != output.late.images[0].tobytes()
