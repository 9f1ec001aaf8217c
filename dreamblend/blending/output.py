"""What a call of the pipeline returns: images as a user asks for them, the maps of their words, and
their collapse.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils.outputs import BaseOutput
from PIL import Image
from torch import Tensor

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import Drawing
from dreamblend.blending.picture import are_finite, decoded, flags, readings
from dreamblend.storage.photos import to_images

Images = list[Image.Image] | np.ndarray | Tensor


@dataclass
class DreamBlendOutput(BaseOutput):
    """What a call draws; each field has one entry for each image.

    Args:
        images: PIL images; a NumPy array (batch, height, width, 3) or a tensor (batch, 3, height,
            width) in [0, 1]; or latents (batch, channels, height, width).
        nsfw_content_detected: whether the base's safety checker takes the image for unsafe, which
            is black then; None where nothing is checked, as the base has none or latents are asked
            for.
        words: the content words of the image's prompt; none where only embeddings are given.
        maps: (words, height, width) on the grid of the attention that is read, each word's share of
            attention, averaged over the steps.
        collapse: the measures of `dreamblend.attention.collapse`; empty where there are no words.
        distance: of the maps to the reference's, for a blend that is guided; else None.
        early, late: what each snapshot draws alone, with `compare=True`. An interrupted call draws
            no late one.
    """

    images: Images
    nsfw_content_detected: list[bool] | None
    words: list[list[str]]
    maps: list[Tensor]
    collapse: list[dict[str, float]]
    distance: list[float | None]
    early: DreamBlendOutput | None = None
    late: DreamBlendOutput | None = None


def output_of(batch: Batch, drawing: Drawing, kind: str, output_type: str) -> DreamBlendOutput:
    """A drawing as a call returns it: decoded, looked at by the safety checker, and measured."""
    read = readings(batch, drawing)
    images: Images = drawing.latents
    flagged: list[bool] | None = None
    if output_type != "latent":
        pixels = decoded(batch, drawing)
        finite = are_finite(pixels, drawing)
        if not all(finite):
            warnings.warn(
                f"{finite.count(False)} of {len(finite)} images of {kind} are NaN or infinite:"
                " blend snapshots that were trained less far, lower guidance_scale, or draw in"
                " fp32",
                stacklevel=3,
            )
        pixels = pixels.nan_to_num()
        if flagged := flags(batch, to_images(pixels.cpu())):
            pixels[torch.tensor(flagged, device=pixels.device)] = -1.0  # black
        images = _images(pixels, output_type)
    return DreamBlendOutput(
        images=images,
        nsfw_content_detected=flagged,
        words=[one.words for one in read],
        maps=[one.maps for one in read],
        collapse=[one.collapse if one.words else {} for one in read],
        distance=[one.distance for one in read],
    )


def _images(pixels: Tensor, output_type: str) -> Images:
    """Pixels (batch, 3, height, width) in [-1, 1] as a user asks for them."""
    if output_type == "pil":
        return to_images(pixels.cpu())
    shares = (pixels / 2 + 0.5).clamp(0, 1)
    return shares if output_type == "pt" else shares.permute(0, 2, 3, 1).cpu().numpy()
