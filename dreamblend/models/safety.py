"""The safety checker that comes with a base: which images it would not show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn

from dreamblend.errors import InputError
from dreamblend.models import pipelines
from dreamblend.models.trust import check_index, read_config

NAME = "safety_checker"  # of the component
OFF = (
    "set model.safety_checker to false (in Python safety_checker=False, --safety_checker false of"
    " `select`) to draw without it"
)


class SafetyChecker:
    """Wraps Stable Diffusion's, as diffusers' pipelines hold it.

    Args:
        checker: StableDiffusionSafetyChecker, or a module that is called alike.
        feature_extractor: PIL images -> what the checker's CLIP sees.
    """

    def __init__(self, checker: nn.Module, feature_extractor: Any):
        self.checker, self.feature_extractor = checker, feature_extractor
        checker.requires_grad_(False).eval()

    @torch.no_grad()
    def flags(self, images: list[Image.Image]) -> list[bool]:
        """Which of the images it takes for unsafe."""
        weights = next(self.checker.parameters())
        turns = getattr(self.checker, "_hf_hook", None)
        device = weights.device if turns is None else turns.execution_device
        seen = self.feature_extractor(images, return_tensors="pt").pixel_values
        # it blackens what it is given; what is shown is decided elsewhere
        _, flagged = self.checker(
            images=torch.zeros(len(images), 1), clip_input=seen.to(device, weights.dtype)
        )
        return [bool(flag) for flag in flagged]


def unsafe(checker: SafetyChecker | None, images: list[Image.Image]) -> list[bool]:
    """Which images a base's checker takes for unsafe; none where it has no checker."""
    return [False] * len(images) if checker is None else checker.flags(images)


def load(path: Path, variant: str | None = None) -> SafetyChecker | None:
    """That of a pipeline folder, in fp32; None where it has none. Raises InputError where its
    model_index.json names one that is not there or cannot be read.
    """
    import transformers
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    named = check_index(path / "model_index.json").get(NAME) or [None, None]
    if named[0] is None:
        return None
    config, extractor = path / NAME / "config.json", path / "feature_extractor"
    for file in (config, extractor / "preprocessor_config.json"):
        if not file.is_file():
            raise InputError(
                f"{file} is missing, and the base has a safety checker by its own"
                f" model_index.json: download the base again, or {OFF}"
            )
        read_config(file)
    checker_kind: Any = StableDiffusionSafetyChecker
    # Pillow's, whether torchvision is installed or not
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    files, variant = pipelines.weight_files(path / NAME, variant)
    if not files:
        raise InputError(
            f"{path / NAME} has no .safetensors weights, and others can run code when they are"
            f" read: download the base again, or {OFF}"
        )
    try:
        checker, loading = checker_kind.from_pretrained(
            path,
            subfolder=NAME,
            variant=variant,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        if lacking := sorted(loading["missing_keys"]):
            raise ValueError(f"it lacks {lacking[0]} and {len(lacking) - 1} more weights")
        return SafetyChecker(checker, kind.from_pretrained(extractor))
    except (OSError, TypeError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(
            f"cannot load the safety checker {path / NAME}: {pipelines.reason(error)}; download the"
            f" base again, or {OFF}"
        ) from error
