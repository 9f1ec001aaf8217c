"""Masks: which part of a photo is the subject, and how much of the loss the rest of it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dreamblend.errors import InputError
from dreamblend.storage.photos import ENDINGS, listed, mask_beside, open_alpha, open_mask, warn_once
from dreamblend.training.framing import Size, covering, cut

ALPHA, BESIDE = "alpha", "beside"  # where masks are; or in a folder


def mask_files(photos: list[Path], root: Path, where: str) -> list[Path]:
    """The file with each photo's mask: the photo itself for `alpha`, `0.mask.png` beside `0.jpg`,
    or the image of the photo's name in a folder, which may have the folders of `root` in it.

    Warns of images in that folder that no photo is called after. Raises InputError for a mask or a
    folder that is not there.
    """
    if where == ALPHA:
        return photos
    if where == BESIDE:
        beside = [[f] if (f := mask_beside(photo)).is_file() else [] for photo in photos]
        return [_one(photo, files, where) for photo, files in zip(photos, beside)]
    folder = Path(where).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"data.mask is {where!r}, and there is no such folder: it is {ALPHA}, {BESIDE} or a"
            " folder of masks"
        )
    found = []
    for photo in photos:
        inside = folder / photo.parent.relative_to(root)
        files = [p for e in ENDINGS if (p := inside / f"{photo.stem}.{e}").is_file()]
        found.append(_one(photo, files, str(inside)))
    images = {p for f in found for p in f.parent.iterdir() if p.suffix[1:].lower() in ENDINGS}
    if unused := sorted(images - {*found}):
        warn_once(f"{folder}: no photo is called as {listed(unused)}, and it masks nothing")
    return found


def _one(photo: Path, files: list[Path], where: str) -> Path:
    if len(files) == 1:
        return files[0]
    missing = f"{photo.stem}.mask.png beside it" if where == BESIDE else f"a mask in {where}"
    there = f"has the masks {listed(files)}: keep one" if files else f"lacks {missing}: add it"
    raise InputError(f"{photo} {there}, or leave out data.mask")


def read_mask(photo: Path, file: Path, size: Size) -> Image.Image:
    """A photo's mask, grey, white where the subject is. Raises InputError where it is of another
    size (height, width) than the photo, or shows no subject.
    """
    mask = open_alpha(photo) if file == photo else open_mask(file)
    if mask is None:
        raise InputError(
            f"{photo} has no alpha channel, which data.mask {ALPHA} takes as its mask: save it as a"
            f" PNG with one, or set data.mask to {BESIDE} or a folder"
        )
    if (mask.height, mask.width) != size:
        raise InputError(
            f"the mask {file} has {mask.width} x {mask.height} pixels, and {photo.name} has"
            f" {size[1]} x {size[0]}: make it of the photo's size"
        )
    if mask.getextrema()[1] == 0:
        raise InputError(
            f"the mask of {photo.name} in {file} is black and shows no subject: paint the subject"
            " white, or remove the photo"
        )
    return mask


def covering_mask(mask: Image.Image, size: Size) -> Image.Image:
    """A mask scaled as its photo to cover an image."""
    height, width = covering((mask.height, mask.width), size)
    return mask.resize((width, height), Image.Resampling.BOX)


def weights(
    covers: Image.Image, flipped: bool, frame: list[int], background: float, pixels_a_latent: int
) -> Tensor:
    """The weights (height, width) of the loss at a photo's latents: 1 for the subject, `background`
    for the rest, and between for latents of both.

    Args:
        covers: the mask, scaled to cover the image.
        flipped: whether the image is mirrored.
        frame: what it sees of its photo, as `Backbone.framed` takes it.
        background: weight of what is not the subject.
        pixels_a_latent: a side of the pixels that one latent stands for.
    """
    top, left, height, width = frame[2:]
    whole = ImageOps.mirror(covers) if flipped else covers
    seen = cut(whole, (height, width), (top, left))
    subject = torch.from_numpy(np.array(seen, dtype=np.float32) / 255)
    share = F.avg_pool2d(subject[None], pixels_a_latent)[0]
    return background + (1 - background) * share
