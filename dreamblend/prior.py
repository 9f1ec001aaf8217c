"""Class images for prior preservation, drawn by the base before it is tuned (Ruiz et al., CVPR 2023)."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from dreamblend.data import to_images
from dreamblend.files import save_png
from dreamblend.models import Backbone
from dreamblend.sampling import classifier_free, initial_noise, sample


@torch.no_grad()
def draw_priors(backbone: Backbone, prompt: str, folder: Path, count: int, rank: int = 0, world_size: int = 1, steps: int = 25, scale: float = 5.) -> None:
    """Draw the class images that `folder` lacks: image i from seed i, those with i % world_size == rank."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = backbone.bind({}) if backbone.adapters is not None else backbone
    paths = [folder / f"{i:05d}.png" for i in range(rank, count, world_size)]
    missing = [p for p in paths if not p.exists()]
    for start in tqdm(range(0, len(missing), 4), desc=f"class images into {folder}", disable=not missing):
        batch = missing[start : start + 4]
        conditioned, unconditioned = base.encode_prompts([prompt] * len(batch)), base.encode_prompts([""] * len(batch))
        noise = initial_noise(base.latent_shape, [int(p.stem) for p in batch]).to(base.device)
        z = sample(classifier_free(base, conditioned, unconditioned, scale), noise, base.scheduler, steps)
        for path, image in zip(batch, to_images(base.decode(z))):
            save_png(image, path)
