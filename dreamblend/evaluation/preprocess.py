"""What an image goes through before a judge sees it. Published numbers depend on it.

Images are pixels (n, 3, height, width) in [-1, 1], or a list of (3, height, width) of any sizes:
real photos have many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

Pixels = Tensor | Sequence[Tensor]


class Channels(TypedDict):
    """The mean and the standard deviation that normalise each channel in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Channels(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
OPENAI = Channels(  # CLIP's own
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)
_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, which preprocessor_config.json uses


@dataclass(frozen=True)
class Preprocess:
    """Resize the shorter side to `resize`, cut `crop` x `crop` from the centre, normalise. Without
    `crop`, squash to a square.
    """

    resize: int
    crop: int | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: str = "bicubic"

    def __call__(self, images: Pixels, device: str | torch.device = "cpu") -> Tensor:
        """Images in [-1, 1] to (n, 3, side, side) as the encoder wants them."""
        if isinstance(images, Tensor):
            square = self._square(images.to(device))
        else:
            square = torch.cat([self._square(image[None].to(device)) for image in images])
        mean, std = (
            torch.tensor(v, device=square.device).view(3, 1, 1) for v in (self.mean, self.std)
        )
        return ((square + 1) / 2 - mean) / std

    def _square(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        scale = self.resize / min(height, width)
        # Truncated, as torchvision and transformers do.
        size = (
            (int(height * scale + 1e-6), int(width * scale + 1e-6))
            if self.crop
            else (self.resize, self.resize)
        )
        if size != (
            height,
            width,
        ):  # antialias: the filter widens when it shrinks, as PIL's; bicubic can overshoot
            images = F.interpolate(
                images.float(), size, mode=self.resample, antialias=True, align_corners=False
            ).clamp(-1, 1)
        if self.crop:
            top, left = (round((side - self.crop) / 2) for side in size)
            images = images[:, :, top : top + self.crop, left : left + self.crop]
        return images.float()

    @property
    def side(self) -> int:
        return self.crop or self.resize


def own_preprocess(name: str, side: int, family: str) -> Preprocess:
    """The preprocessing in a model's preprocessor_config.json; the usual one of its family, at
    `side` pixels, where there is none.
    """
    from transformers import ImageProcessingMixin

    usual = OPENAI if family == "clip" else IMAGENET
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return Preprocess(side, side, **usual)

    def number(size: Any) -> int:
        if isinstance(size, int):  # all three spellings are in use
            return size
        return size.get("shortest_edge") or size.get("height")

    resize = number(settings.get("size", side))
    squash = not settings.get("do_center_crop", family == "clip")
    crop = None if squash else number(settings.get("crop_size", resize))
    mean = settings.get("image_mean") or usual["mean"]
    std = settings.get("image_std") or usual["std"]
    resample = _FILTERS.get(settings.get("resample", 3), "bicubic")
    return Preprocess(resize, crop, tuple(mean), tuple(std), resample)
