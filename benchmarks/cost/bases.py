"""What the costs are measured on: the sandbox, and Stable Diffusion 1.5 with random weights, which
has its size and needs no download.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dreamblend.models.bases import SHIPPED
from tests.families.full_size import CLIP_L, KL_VAE
from tests.families.tokenizers import clip_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Base:
    """A base, and how much of it is drawn and trained.

    Args:
        name: in the tables.
        where: the folder of results -> its name or folder; made there where it is not yet.
        size: pixels of a side; the base's own where None.
        images: that are drawn at once.
        batch: photos of a training step.
        steps: training steps between two looks at the clock.
        sampling: denoising steps; as asked for where None.
    """

    name: str
    where: Callable[[Path], str]
    size: int | None
    images: int
    batch: int
    steps: int
    sampling: int | None = None

    def folder(self, out: Path) -> Path:
        """Its pipeline's folder."""
        where = self.where(out)
        return SHIPPED[where].folder if where in SHIPPED else Path(where)


def stable_diffusion(folder: Path) -> Path:
    """A pipeline of Stable Diffusion 1.5's size, its weights random, in fp16: 2.1 GB on disk."""
    if (folder / "model_index.json").is_file():
        return folder
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    # the UNet's configuration is the default of its class but for what is written here
    pipe = diffusers.StableDiffusionPipeline(
        tokenizer=clip_tokenizer(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        vae=diffusers.AutoencoderKL(**KL_VAE, sample_size=512),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    pipe.to(dtype=torch.float16).save_pretrained(part)
    part.rename(folder)
    return folder


BASES = {
    "sandbox": Base("sandbox", lambda out: "sandbox", None, images=2, batch=4, steps=8),
    "sd15": Base(
        "Stable Diffusion 1.5, random weights",
        lambda out: str(stable_diffusion(out / "sd15")),
        256,
        images=1,
        batch=1,
        steps=1,
        sampling=5,
    ),
}
# A card has time for real sizes, and many images at once keep it busy.
ON_GPU = {
    "sandbox": replace(BASES["sandbox"], images=16),
    "sd15": replace(BASES["sd15"], size=512, images=4, batch=4, steps=8, sampling=None),
}
