"""Small snapshot folders to read, and to spoil."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from dreamblend.storage import snapshots
from dreamblend.storage.snapshots import ABOUT, About, Weights

FILES = {
    "unet/config.json": {"width": 4},
    "unet/diffusion_pytorch_model.safetensors": Weights(
        {"w": torch.arange(4.0), "n": torch.tensor(3)}
    ),
}
ABOUT_FULL = About(
    step=5,
    method="full",
    base="sandbox",
    base_hash="ab",
    identifier="sks",
    class_noun="mug",
    dtype="float32",
    seed=0,
    settings={"rate": 1e-3},
)


def write(root: Path, step: int = 5, files=FILES, **about) -> Path:
    return snapshots.write(root, replace(ABOUT_FULL, step=step, **about), files)


def edit(snapshot: Path, **changes) -> None:
    """Another snapshot.json, with a digest that fits it: a folder that was made so, not one that
    was damaged.
    """
    said = json.loads((snapshot / ABOUT).read_text()) | changes
    (snapshot / ABOUT).write_text(snapshots._text(said))
