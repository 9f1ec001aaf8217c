"""From a folder of photos to pixels, prompts and an endless, stateless stream of draws.

    folder -> list_photos -> load_photo -> to_pixels          (all photos, once)
    Draws  -> {index, flipped, prior, draw}                    (which of them each batch uses)

The batches carry indices only: three to six photos are encoded once and stay in memory with the trainer.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache, cached_property, lru_cache
from io import BytesIO
from itertools import count
from pathlib import Path
from random import Random

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, features
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from dreamblend.errors import InputError

with suppress(ImportError):  # an extra: pip install pillow-heif
    from pillow_heif import register_heif_opener

    register_heif_opener()

_BY_FORMAT = {  # endings; FORMATS are all that is read, whatever a file's name: others, such as PostScript, would start other programs
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"), "PNG": ("png",), "WEBP": ("webp",), "BMP": ("bmp",), "TIFF": ("tif", "tiff"), "GIF": ("gif",),
    "AVIF": ("avif",), "HEIF": ("heic", "heif", "hif"),
}
FORMATS = tuple(name for name in _BY_FORMAT if name not in ("AVIF", "HEIF") or name == "AVIF" and features.check("avif") or name in Image.OPEN)
ENDINGS = tuple(ending for name in FORMATS for ending in _BY_FORMAT[name])
# What somebody may take for photos, and is not read
OTHERS = {
    *_BY_FORMAT["AVIF"], *_BY_FORMAT["HEIF"], *"jp2 j2k jxl tga ppm ico svg psd xcf exr hdr".split(),
    *"raw dng cr2 cr3 crw nef nrw arw orf rw2 raf pef srw".split(), *"mp4 mov avi webm mkv".split(),
} - set(ENDINGS)
CROPS = {"center": (.5, .5), "top": (.5, 0.), "bottom": (.5, 1.), "left": (0., .5), "right": (1., .5)}  # where the square lies: shares of x and y
CUT = 1 / 3  # share of a photo that a camera's 3:2 loses to the square


# ------------------------------------------------------------------------------------------------ photos
def list_photos(folder: Path) -> list[Path]:
    """The image files of `folder`, sorted by name; hidden files, other files and subfolders are left out.

    Warns of images that cannot be read. Raises InputError where the folder is missing, is a file, or holds no image.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"The photo folder {folder} does not exist: give the folder that holds the photos.")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file and not a folder: give the folder that holds the photos.")
    files = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.is_file())
    photos = [p for p in files if p.suffix[1:].lower() in ENDINGS]
    if others := [p for p in files if p.suffix[1:].lower() in OTHERS]:
        heic = any(p.suffix[1:].lower() in _BY_FORMAT["HEIF"] for p in others)
        mend = "save them as JPEG or PNG" + " (or pip install pillow-heif, which reads HEIC)" * heic
        _warn_once(f"{folder}: {_listed(others)} cannot be read and {'are' if len(others) > 1 else 'is'} left out: {mend}")
    if not photos:
        raise InputError(f"The photo folder {folder} holds no images: put photos there that end in {', '.join(ENDINGS)}.")
    return photos


def _listed(files: list[Path]) -> str:
    return ", ".join(p.name for p in files[:10]) + f" and {len(files) - 10} more" * (len(files) > 10)


@cache
def _warn_once(message: str) -> None:
    """A folder is listed and checked at several places of a run, by every process."""
    rank_zero_warn(message)


def open_photo(path: Path) -> Image.Image:
    """The upright RGB image in `path`, at its own size: first frame, transparency over white, colours in sRGB.

    Raises InputError where the file is empty, damaged, too large to be safe, or no image.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.verify()  # checksums, which decoding ignores; it leaves the image unusable, so open again
        with Image.open(path, formats=FORMATS) as image:
            return _to_rgb(_to_srgb(ImageOps.exif_transpose(image)))
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} has too many pixels to be opened safely: replace it with a smaller copy or remove it.") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything (SyntaxError, struct.error, ...)
        raise InputError(f"{path} cannot be read as a photo ({_reason(path, error)}): replace or remove it.") from error


def _reason(path: Path, error: Exception) -> str:
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image, or not of a known format"
    return str(getattr(error, "strerror", None) or error)


def _to_srgb(image: Image.Image) -> Image.Image:
    """From the image's own colour profile, such as a phone's Display P3. A profile that cannot be used is left out, as viewers do."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return image
    try:
        return ImageCms.profileToProfile(image, BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGBA" if image.mode == "RGBA" else "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode a file can have to RGB, without the clipping and the black fringes of a bare convert("RGB")."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _narrow(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _narrow(image: Image.Image) -> Image.Image:
    """A deep grey image to 8 bits. Pillow's own conversion clips at 255, so that most 16-bit images turn white.

    "I;16" has a known range. 32-bit integers and floats do not say theirs: it is the smallest usual one that holds the
    brightest pixel (floats: 0-1; both: 0-255, 0-65535), else the brightest pixel itself.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    usual = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    top = next((t for t in usual if values.max() <= t), values.max())
    return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))


def load_photo(path: Path, size: int, crop: str = "center") -> Image.Image:
    """A square of the photo as RGB of `size` x `size` pixels: the shorter side is scaled to `size`, the rest cut off.

    `crop` says where the square lies along the longer side: one of CROPS. Warns where that enlarges the photo more than twice. Raises InputError where the file cannot be read.
    """
    image = open_photo(path)
    if 2 * min(image.size) < size:
        shape = f"{image.width} x {image.height}"
        warnings.warn(f"{path} has only {shape} pixels: enlarged to {size} it trains blur; use a larger photo or a smaller size.", stacklevel=2)
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS, centering=CROPS[crop])


# ------------------------------------------------------------------------------------------------ pixels
def to_pixels(images: list[Image.Image]) -> Tensor:
    """RGB images of one size to pixels (n, 3, height, width), float32 in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels (n, 3, height, width) to RGB images; what lies outside [-1, 1] is clamped. The inverse of `to_pixels`."""
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(i) for i in levels.permute(0, 2, 3, 1).cpu().numpy()]


def _load_pixels(photos: list[Path], size: int, crop: str = "center", batch: int = 4) -> Iterator[Tensor]:
    """Photos in batches (n, 3, size, size): a folder of thousands is never in memory as a whole."""
    for start in tqdm(range(0, len(photos), batch), desc="photos", disable=len(photos) <= 20):
        yield to_pixels([load_photo(path, size, crop) for path in photos[start : start + batch]])


# ------------------------------------------------------------------------------------------------- draws
@lru_cache(maxsize=16)
def _permutation(length: int, key: str) -> tuple[int, ...]:
    return tuple(Random(key).sample(range(length), length))


class Draws(IterableDataset):
    """An endless stream of which photos each batch uses; draw i of a rank depends on (seed, i, rank) alone.

    So a run that was interrupted continues exactly by starting at i, with no state to save. `start()` is asked for i whenever the stream is
    begun, as an epoch goes on where the one before it ended. All ranks read one common
    sequence of permutations, so each photo is used equally often, and n processes draw what one does that accumulates the
    gradients of n times as many batches. Wants num_workers=0: each worker would repeat it all.

    Yields dict(index (n,) int64, flipped (n,) bool, prior (n,) bool, draw int), n = `batch_size` instance photos followed,
    if there are priors, by as many prior images, whose index counts within the priors; `draw` counts over all ranks.
    """

    def __init__(
        self, instances: int, priors: int, batch_size: int, flip: bool, seed: int, rank: int = 0, world_size: int = 1, start: Callable[[], int] = int
    ):
        self.instances, self.priors, self.batch_size, self.flip = instances, priors, batch_size, flip
        self.seed, self.rank, self.world_size, self.start = seed, rank, world_size, start

    def __iter__(self) -> Iterator[dict[str, Tensor | int]]:
        return map(self.at, count(self.start()))

    def at(self, draw: int) -> dict[str, Tensor | int]:
        """The batch that this rank uses at `draw`."""
        number = draw * self.world_size + self.rank
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        picks = [self._pick("instance", self.instances, p) for p in positions]
        if self.priors:
            picks += [self._pick("prior", self.priors, p) for p in positions]
        index, flipped = zip(*picks)
        prior = torch.arange(len(picks)) >= self.batch_size
        return dict(index=torch.tensor(index), flipped=torch.tensor(flipped), prior=prior, draw=number)

    def _pick(self, stream: str, length: int, position: int) -> tuple[int, bool]:
        """(index, flipped) at `position` of an endless chain of permutations."""
        turn, offset = divmod(position, length)
        index = _permutation(length, f"{self.seed}/{stream}/{turn}")[offset]  # a text seeds Random alike on every machine
        return index, self.flip and Random(f"{self.seed}/{stream}/flip/{position}").random() < .5


# --------------------------------------------------------------------------------------------------- data
class SubjectData(L.LightningDataModule):
    """The photos of one subject, its prompts, and the prior images that keep its class.

    Args:
        instance_dir: Folder with the photos of the subject (3 to 6 are usual).
        class_noun: What the subject is, in a common word: mug, dog, backpack.
        identifier: Rare word that comes to name the subject.
        batch_size: Photos a process uses per draw; with prior images, as many of these are added. An optimizer step sees
            batch_size x processes x trainer.accumulate_grad_batches of them, and their mean: rate and schedule do not change with
            the number of processes, but with the product.
        flip: Mirror half of the images at random. Off by default: lettering and lopsided subjects suffer.
        prior_dir: Folder with images of the class, for prior preservation.
        prior_count: How many prior images to use, in order of their names; 0 means no prior preservation.
        prompt: Prompt of the photos; may contain {identifier} and {class_noun}.
        prior_prompt: Prompt of the prior images; may contain {class_noun}.
        crop: Where the square of a photo lies along its longer side: center, top (which keeps a portrait's head), bottom, left or right.
        seed: Seed of the order and the mirroring of the images.
    """

    def __init__(
        self, instance_dir: Path, class_noun: str, identifier: str = "sks", batch_size: int = 4, flip: bool = False,
        prior_dir: Path | None = None, prior_count: int = 0,
        prompt: str = "a {identifier} {class_noun}", prior_prompt: str = "a {class_noun}", crop: str = "center", seed: int = 0,
    ):
        super().__init__()
        self.instance_dir, self.prior_dir = Path(instance_dir), None if prior_dir is None else Path(prior_dir)
        self.class_noun, self.identifier, self.seed = class_noun, identifier, seed
        self.batch_size, self.flip, self.prior_count, self.crop = batch_size, flip, prior_count, crop
        self._prompt, self._prior_prompt = prompt, prior_prompt

    @property
    def instance_prompt(self) -> str:
        """The prompt of the photos. Raises InputError for a wrong placeholder."""
        return _fill("prompt", self._prompt, identifier=self.identifier, class_noun=self.class_noun)

    @property
    def prior_prompt(self) -> str:
        """The prompt of the prior images. Raises InputError for a wrong placeholder; {identifier} is one here."""
        return _fill("prior_prompt", self._prior_prompt, class_noun=self.class_noun)

    @cached_property
    def photos(self) -> list[Path]:
        """The instance photos, listed once, so that indices keep their meaning if files are added during a run."""
        return list_photos(self.instance_dir)

    @property
    def class_images(self) -> list[Path]:
        """The prior images in use; InputError if there are fewer than `prior_count`."""
        photos = list_photos(self.prior_dir)[: self.prior_count] if self.prior_count else []
        if len(photos) < self.prior_count:  # the draws count on all of them
            raise InputError(f"prior_dir {self.prior_dir} holds {len(photos)} images: add {self.prior_count - len(photos)} or lower prior_count.")
        return photos

    def check(self) -> None:
        """Raise InputError for the first thing that would stop a run, at the cost of reading every instance photo.

        Prior images may be made later: only `prior_pixels` needs them.
        """
        for name in ("identifier", "class_noun"):
            value = getattr(self, name)
            if not value.strip() or len(value.splitlines()) > 1:
                raise InputError(f"{name} must be a word on one line and not {value!r}.")
        for name, least in (("batch_size", 1), ("prior_count", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least} and not {getattr(self, name)}.")
        if self.prior_count and self.prior_dir is None:
            raise InputError(f"prior_count={self.prior_count} needs prior_dir: give the folder of the prior images, or set prior_count to 0.")
        if self.prior_dir is not None and self.prior_dir.exists() and not self.prior_dir.is_dir():
            raise InputError(f"prior_dir {self.prior_dir} is a file and not a folder: give the folder of the prior images.")
        if self.prior_dir is not None:
            instances, priors = self.instance_dir.resolve(), self.prior_dir.resolve()
            if instances.is_relative_to(priors) or priors.is_relative_to(instances):
                raise InputError(f"prior_dir {priors} and the photo folder {instances} must lie apart: choose another prior_dir.")
        if self.identifier not in self.instance_prompt:
            raise InputError(f"The prompt {self._prompt!r} does not name the subject: put {{identifier}} into it.")
        _ = self.prior_prompt
        if self.crop not in CROPS:
            raise InputError(f"crop is {self.crop!r}: it is one of {', '.join(CROPS)}.")
        sizes = {path: open_photo(path).size for path in self.photos}
        cut = [path for path, size in sizes.items() if 1 - min(size) / max(size) > CUT + .01]
        if cut and self.crop == "center":
            _warn_once(
                f"{self.instance_dir}: the square from the middle leaves out more than a third of {_listed(cut)}: where the subject is not in it, "
                "set data.crop to top, bottom, left or right, or cut the photos yourself"
            )

    prepare_data = check  # Lightning's name for it

    def setup(self, stage: str) -> None:
        """Raise InputError for what Lightning would do to another stream than this one."""
        if self.trainer is not None and self.trainer.overfit_batches:
            raise InputError("trainer.overfit_batches repeats its first batches, and here every step has draws of its own: leave it out")

    def instance_pixels(self, size: int) -> Iterator[Tensor]:
        """All instance photos, in batches (n, 3, size, size) in [-1, 1]. Raises InputError as `list_photos` and `load_photo` do."""
        return _load_pixels(self.photos, size, self.crop)

    def prior_pixels(self, size: int) -> Iterator[Tensor]:
        """The first `prior_count` prior images, in batches (n, 3, size, size) in [-1, 1]; InputError if there are fewer."""
        return _load_pixels(self.class_images, size)

    def train_dataloader(self) -> DataLoader:
        """Draws for this process: at every step those of that step, whatever ends an epoch, and in a resumed run, too.

        Exact for checkpoints written right after an optimizer step: between two steps of gradient accumulation Lightning
        keeps the batch count but not the gradients.
        """
        place, trainer = {}, self.trainer
        if trainer is not None:
            place = dict(rank=trainer.global_rank, world_size=trainer.world_size, start=self._next_draw)
        draws = Draws(len(self.photos), self.prior_count, self.batch_size, self.flip, self.seed, **place)
        return DataLoader(draws, batch_size=None, num_workers=0)

    def _next_draw(self) -> int:
        return self.trainer.global_step * self.trainer.accumulate_grad_batches


def digest(files: Iterable[Path]) -> str:
    """A hash of the contents of files, in their order."""
    found = hashlib.sha256()
    for path in files:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _fill(setting: str, template: str, **words: str) -> str:
    """The template with its placeholders filled. Raises InputError for any other placeholder."""
    try:
        return template.format(**words)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        allowed = " and ".join(f"{{{w}}}" for w in words)
        raise InputError(f"{setting} {template!r} has a wrong placeholder: it may contain {allowed} only.") from error
