"""Tiny random models in Stable Diffusion's real layout, and photos to tune them on."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # files of tests run side by side
# Some processors else round products by where in memory the weights lie: in a file, or not.
os.environ.setdefault("MKL_CBWR", "AVX2")

import pytest
import torch

from dreamblend.sandbox import world

REAL_PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "dreambooth" / "dataset"


def save_tiny_base(folder: Path, prediction: str = "epsilon", seed: int = 0) -> Path:
    """A random Stable Diffusion pipeline folder: 32-pixel images, 8 x 8 latents, sites at 8 x 8 and
    4 x 4.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from dreamblend.models import SANDBOX

    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(SANDBOX / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_v_base(tmp_path_factory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("v-base"), "v_prediction", seed=1)


@pytest.fixture(scope="session")
def mug_photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mug")
    for i, photo in enumerate(world.photos("teal_mug")):
        photo.save(folder / f"{i}.png")
    return folder
