"""Model families behind one interface. `load_backbone` finds the family of a base."""

from __future__ import annotations

import json
from pathlib import Path

from dreamblend.errors import InputError
from dreamblend.models.backbone import Backbone, Conditioning, Span

__all__ = ["Backbone", "Conditioning", "Span", "load_backbone", "locate_base"]

SANDBOX = Path(__file__).parents[1] / "sandbox" / "weights" / "base"


def locate_base(base: str) -> str:
    """What the loaders take for a base as the user names it: `sandbox`, a hub id, a folder, or a .safetensors file.

    Raises InputError for paths that cannot be a base, before anything large is read.
    """
    path = Path(base).expanduser()
    if base == "sandbox":
        return str(SANDBOX)
    if path.suffix in {".ckpt", ".pt", ".bin", ".pth"}:
        raise InputError(f"{base} is a pickle, which can run code when it is read: convert it to .safetensors first")
    if path.is_dir():
        index = path / "model_index.json"
        if not index.is_file():
            raise InputError(f"{base} is not a diffusers pipeline folder: it has no model_index.json")
        family = json.loads(index.read_text()).get("_class_name", "")
        if not family.startswith("StableDiffusion") or "XL" in family or "3" in family:
            raise InputError(f"{base} holds a {family}: the families that can be loaded are Stable Diffusion 1.x and 2.x")
        return str(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"{base} is not a .safetensors file: name a hub id, a pipeline folder or a .safetensors file")
        return str(path)
    if path.is_absolute() or base.startswith((".", "~")) or base.count("/") != 1:
        raise InputError(f"base {base!r} does not exist: name `sandbox`, a hub id (owner/name), a pipeline folder or a .safetensors file")
    return base


def load_backbone(base: str, config: str | None = None) -> Backbone:
    """Load a base, in fp32 on the CPU, all weights frozen."""
    from dreamblend.models import stable_diffusion

    backbone = stable_diffusion.load(locate_base(base), config)
    backbone.base = base
    return backbone
