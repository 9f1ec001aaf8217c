"""What a training image shows of its photo: its size, and where it lies in the photo.

A photo is scaled to cover its image, and what sticks out is cut off. Sizes are (height, width) in
pixels, corners (top, left).
"""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

from PIL import Image

from dreamblend.storage.photos import CROPS, open_photo, warn_of_blur

Size = tuple[int, int]
RANDOM = "random"  # the crop that each draw makes anew
LONGEST = 4.0  # the longer side of a bucket by its shorter one, at most


# ------------------------------------------------------------------------------------------ buckets
def bucket_sizes(resolution: int, multiple: int) -> list[Size]:
    """The sizes that photos of any shape are trained in: as many pixels as a square of this side
    or a few less, and sides that are multiples of `multiple` (as kohya's buckets, with steps of a
    sixteenth of the side).
    """
    step = multiple * max(1, round(resolution / 16 / multiple))
    square = resolution, resolution
    sizes = {square}
    for width in range(step, round(resolution * LONGEST**0.5) + 1, step):
        height = resolution**2 // width // step * step
        if max(height, width) <= LONGEST * min(height, width):
            sizes |= {(height, width), (width, height)}
    return sorted(sizes)


def nearest(photo: Size, sizes: list[Size]) -> Size:
    """The size whose shape is nearest to a photo's, so that least is cut off."""
    shape = math.log(photo[0] / photo[1])
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - shape))


# -------------------------------------------------------------------------------------------- crops
def covering(photo: Size, size: Size) -> Size:
    """The size of a photo that is scaled to cover an image, as torchvision's Resize has it for a
    square one.
    """
    (height, width), (h, w) = photo, size
    if h * width >= w * height:
        return h, max(w, int(h * width / height))
    return max(h, int(w * height / width)), w


def corner(photo: Size, size: Size, crop: str, random: Random | None = None) -> tuple[int, int]:
    """Where an image lies in the photo that covers it: as `crop` says, or for `random` anywhere in
    it, as torchvision's RandomCrop.
    """
    room = [outer - inner for outer, inner in zip(covering(photo, size), size)]
    if crop == RANDOM and random is not None:
        return random.randint(0, room[0]), random.randint(0, room[1])
    x, y = CROPS[crop]
    return round(room[0] * y), round(room[1] * x)


def cut(image: Image.Image, size: Size, at: tuple[int, int]) -> Image.Image:
    """The part of an image from the corner `at` on."""
    (height, width), (top, left) = size, at
    return image.crop((left, top, left + width, top + height))


def cover(path: Path, size: Size) -> Image.Image:
    """A photo, scaled to cover an image. Warns where that enlarges it more than twice."""
    image = open_photo(path)
    warn_of_blur(path, image, *size)
    height, width = covering((image.height, image.width), size)
    return image.resize((width, height), Image.Resampling.LANCZOS)
