"""Finds the family of a base, and loads it."""

from __future__ import annotations

from pathlib import Path

from dreamblend.errors import InputError
from dreamblend.models.backbone import Backbone
from dreamblend.models.bases import SHIPPED


def locate_base(base: str) -> str:
    """What the loaders take for a base as the user names it: `sandbox`, a hub id, a folder, or a
    .safetensors file.

    Raises InputError for paths that cannot be a base, before anything large is read.
    """
    from dreamblend.models import stable_diffusion

    path = Path(base).expanduser()
    if base in SHIPPED:
        return str(SHIPPED[base].folder)
    if path.is_dir():
        stable_diffusion.check_folder(path)
        return str(path)
    if path.suffix.lower() in {".ckpt", ".pt", ".bin", ".pth"}:
        raise InputError(
            f"{base} is a pickle, which can run code when it is read: convert it to .safetensors"
            " first"
        )
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise InputError(
                f"{base} is not a .safetensors file: name a hub id, a pipeline folder or a"
                " .safetensors file"
            )
        stable_diffusion.check_file(path)
        return str(path)
    if path.is_absolute() or base.startswith((".", "~")) or base.count("/") != 1:
        raise InputError(
            f"base {base!r} does not exist: name `sandbox`, a hub id (owner/name), a pipeline"
            " folder or a .safetensors file"
        )
    return base


def load_backbone(base: str, config: str | None = None, prediction: str | None = None) -> Backbone:
    """Load a base, in fp32 on the CPU, all weights frozen.

    Args:
        base: as the user names it.
        config: for a single file, the hub id or folder of its configuration where diffusers cannot
            tell it.
        prediction: what the denoiser predicts, epsilon or v_prediction; what the base says of
            itself where None.
    """
    from dreamblend.models import stable_diffusion

    backbone = stable_diffusion.load(locate_base(base), config, prediction)
    backbone.base, backbone.base_config = base, config
    return backbone
