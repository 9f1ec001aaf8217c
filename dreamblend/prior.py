"""Class images for prior preservation, drawn by the base before it is tuned (Ruiz et al., CVPR 2023)."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from dreamblend.data import list_photos, to_images
from dreamblend.errors import InputError
from dreamblend.files import check_writable, save_png
from dreamblend.models import Backbone
from dreamblend.sampling import classifier_free, initial_noise, sample


def missing_priors(folder: Path, count: int) -> list[Path]:
    """The images to draw until `folder` holds `count`, whoever made those that are there."""
    check_writable(folder, "--data.prior_dir")
    try:
        there = {p.name for p in list_photos(folder)}
    except InputError:  # it holds none
        there = set()
    free = (folder / name for i in range(count) if (name := f"{i:05d}.png") not in there)
    return [path for path, _ in zip(free, range(count - len(there)))]


@torch.no_grad()
def draw_priors(backbone: Backbone, prompt: str, paths: list[Path], steps: int = 25, scale: float = 5.) -> None:
    """Draw class images into files named by their seeds (`00012.png` from seed 12)."""
    base = backbone.bind({}) if backbone.adapters is not None else backbone
    for start in tqdm(range(0, len(paths), 4), desc="class images", disable=not paths):
        batch = paths[start : start + 4]
        conditioned, unconditioned = base.encode_prompts([prompt] * len(batch)), base.encode_prompts([""] * len(batch))
        seeds = [int(p.stem) for p in batch]
        noise = initial_noise(base.latent_shape, seeds).to(base.device)
        z = sample(classifier_free(base, conditioned, unconditioned, scale), noise, base.scheduler, steps, seeds=seeds)
        for path, image in zip(batch, to_images(base.decode(z))):
            save_png(image, path)
