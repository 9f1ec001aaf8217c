"""Photos of any kind to RGB images and pixels: which files of a folder are photos, upright, in
sRGB, cropped to a square.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from dreamblend.errors import InputError
from dreamblend.processes import rank_zero_warn

Opened = TypeVar("Opened")

# The endings of each format. Only FORMATS are read, whatever a file's name: other formats, such as
# PostScript, would start other programs.
_BY_FORMAT = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "GIF": ("gif",),
    "AVIF": ("avif",),
    "HEIF": ("heic", "heif", "hif"),
}
FORMATS = tuple(
    name
    for name in _BY_FORMAT
    if name not in ("AVIF", "HEIF")
    or name == "AVIF"
    and features.check("avif")
    or name in Image.OPEN
)
ENDINGS = tuple(ending for name in FORMATS for ending in _BY_FORMAT[name])
# endings of files that may be meant as photos, and are not read
OTHERS = {
    *_BY_FORMAT["AVIF"],
    *_BY_FORMAT["HEIF"],
    *"jp2 j2k jxl tga ppm ico svg psd xcf exr hdr".split(),
    *"raw dng cr2 cr3 crw nef nrw arw orf rw2 raf pef srw".split(),
    *"mp4 mov avi webm mkv".split(),
} - set(ENDINGS)
CROPS = {
    "center": (0.5, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
}  # where the square lies: shares of x and y
CUT = 1 / 3  # share of a photo that a camera's 3:2 loses to the square


# ------------------------------------------------------------------------------------------- photos
def list_photos(folder: Path) -> list[Path]:
    """The image files of `folder`, sorted by name; hidden files, other files, masks beside their
    photos and subfolders are left out.

    Warns of images that cannot be read. Raises InputError where the folder is missing, is a file,
    or holds no image.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(
            f"The photo folder {folder} does not exist: give the folder that holds the photos."
        )
    if not folder.is_dir():
        raise InputError(
            f"{folder} is a file and not a folder: give the folder that holds the photos."
        )
    files = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.is_file())
    photos = [p for p in files if p.suffix[1:].lower() in ENDINGS]
    masks = {mask_beside(photo) for photo in photos}
    photos = [p for p in photos if p not in masks]
    if others := [p for p in files if p.suffix[1:].lower() in OTHERS]:
        heic = any(p.suffix[1:].lower() in _BY_FORMAT["HEIF"] for p in others)
        mend = "save them as JPEG or PNG" + " (or pip install pillow-heif, which reads HEIC)" * heic
        warn_once(
            f"{folder}: {listed(others)} cannot be read and {'are' if len(others) > 1 else 'is'}"
            f" left out: {mend}"
        )
    if not photos:
        raise InputError(
            f"The photo folder {folder} holds no images: put photos there that end in"
            f" {', '.join(ENDINGS)}."
        )
    return photos


def mask_beside(photo: Path) -> Path:
    """Where the mask of a photo lies that is beside it."""
    return photo.with_name(f"{photo.stem}.mask.png")


def has_photos(folder: Path) -> bool:
    """Whether images lie in a folder, itself."""
    return folder.is_dir() and any(
        p.suffix[1:].lower() in ENDINGS and not p.name.startswith(".") and p.is_file()
        for p in folder.iterdir()
    )


def listed(files: list[Path]) -> str:
    """The names of files in a message: the first ten."""
    return ", ".join(p.name for p in files[:10]) + f" and {len(files) - 10} more" * (
        len(files) > 10
    )


@cache
def warn_once(message: str) -> None:
    """A folder is listed and checked at several places of a run, by every process."""
    rank_zero_warn(message)


def open_photo(path: Path) -> Image.Image:
    """The upright RGB image in `path`, at its own size: first frame, transparency over white,
    colours in sRGB.

    Raises InputError where the file is empty, damaged, too large to be safe, or no image.
    """
    return _opened(path, as_photo)


def as_photo(image: Image.Image) -> Image.Image:
    """An image in RGB, transparency over white, colours in sRGB."""
    return _to_rgb(_to_srgb(image))


def open_mask(path: Path) -> Image.Image:
    """The upright grey image in `path`, transparency over black. Raises InputError as
    `open_photo`.
    """
    return _opened(path, _to_grey)


def open_alpha(path: Path) -> Image.Image | None:
    """How opaque the pixels of the upright image in `path` are; None for an image without
    transparency. Raises InputError as `open_photo`.
    """

    def read(image: Image.Image) -> Image.Image | None:
        return image.convert("RGBA").getchannel("A") if image.has_transparency_data else None

    return _opened(path, read)


def _opened(path: Path, read: Callable[[Image.Image], Opened]) -> Opened:
    """What `read` makes of the upright image in a file."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            # checksums, which decoding ignores; it leaves the image unusable, so open again
            image.verify()
        with Image.open(path, formats=FORMATS) as image:
            return read(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path} has too many pixels to be opened safely: replace it with a smaller copy or"
            " remove it."
        ) from error
    except (
        Exception
        # a damaged file makes Pillow's decoders raise nearly anything (SyntaxError, struct.error,
        # ...)
    ) as error:
        raise InputError(
            f"{path} cannot be read as a photo ({_reason(path, error)}): replace or remove it."
        ) from error


def _reason(path: Path, error: Exception) -> str:
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or not of a known format"
    return str(getattr(error, "strerror", None) or error)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert from the colour profile of the image, such as a phone's Display P3. A profile that
    cannot be used is ignored, as viewers do.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return image
    try:
        # None comes back only of a conversion in place
        converted = ImageCms.profileToProfile(
            image,
            BytesIO(profile),
            ImageCms.createProfile("sRGB"),
            outputMode="RGBA" if image.mode == "RGBA" else "RGB",
        )
        return converted or image
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode a file can have to RGB, without the clipping and the black fringes of a bare
    convert("RGB").
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _narrow(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _narrow(image).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("L")
    return image.convert("L")


def _narrow(image: Image.Image) -> Image.Image:
    """A deep grey image to 8 bits. Pillow's conversion clips at 255, so that most 16-bit images
    become white.

    "I;16" has a known range. 32-bit integers and floats do not say theirs: it is the smallest usual
    one that holds the brightest pixel (floats: 0-1; both: 0-255, 0-65535), else the brightest pixel
    itself.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    usual = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    top = next((t for t in usual if values.max() <= t), values.max())
    return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))


def load_photo(path: Path, size: int | tuple[int, int], crop: str = "center") -> Image.Image:
    """A part of the photo as RGB of `size` pixels, the side of a square or (height, width): scaled
    to cover it, the rest cut off.

    `crop` says where the part lies along the side that is cut: one of CROPS. Warns where that
    enlarges the photo more than twice. Raises InputError where the file cannot be read.
    """
    image = open_photo(path)
    height, width = (size, size) if isinstance(size, int) else size
    warn_of_blur(path, image, height, width)
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=CROPS[crop])


def warn_of_blur(path: Path, image: Image.Image, height: int, width: int) -> None:
    """Warn where covering so many pixels enlarges a photo more than twice."""
    if 2 * image.height < height or 2 * image.width < width:
        shape = f"{image.width} x {image.height}"
        wanted = str(width) if width == height else f"{width} x {height}"
        warnings.warn(
            f"{path} has only {shape} pixels: enlarged to {wanted} it trains blur; use a larger"
            " photo or a smaller size.",
            stacklevel=3,
        )


def photo_size(path: Path) -> tuple[int, int]:
    """Height and width of the upright image in a file that can be opened, from its header."""
    with Image.open(path, formats=FORMATS) as image:
        lying = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (image.width, image.height) if lying else (image.height, image.width)


# ------------------------------------------------------------------------------------------- pixels
def to_pixels(images: list[Image.Image]) -> Tensor:
    """RGB images of one size to pixels (n, 3, height, width), float32 in [-1, 1]."""
    return (
        torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (n, 3, height, width), clamped to [-1, 1], to RGB images: undoes `to_pixels`."""
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(i) for i in levels.permute(0, 2, 3, 1).cpu().numpy()]
