"""From a folder of photos to pixels, prompts and an endless, stateless stream of draws.

    folder -> list_photos -> load_photo -> to_pixels          (all photos, once)
    Draws  -> {index, flipped, prior, draw}                    (which of them each batch uses)

The batches carry indices only: three to six photos are encoded once and stay in memory with the
trainer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from itertools import count
from pathlib import Path
from random import Random

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from dreamblend.errors import InputError
from dreamblend.storage.photos import (
    CROPS,
    CUT,
    list_photos,
    listed,
    load_photo,
    open_photo,
    to_pixels,
    warn_once,
)

with suppress(ImportError):  # an extra: pip install pillow-heif
    from pillow_heif import register_heif_opener

    register_heif_opener()


def _load_pixels(
    photos: list[Path], size: int, crop: str = "center", batch: int = 4
) -> Iterator[Tensor]:
    """Photos in batches (n, 3, size, size): a folder of thousands is never in memory as a whole."""
    for start in tqdm(range(0, len(photos), batch), desc="photos", disable=len(photos) <= 20):
        yield to_pixels([load_photo(path, size, crop) for path in photos[start : start + batch]])


# -------------------------------------------------------------------------------------------- draws
@lru_cache(maxsize=16)
def _permutation(length: int, key: str) -> tuple[int, ...]:
    return tuple(Random(key).sample(range(length), length))


class Draws(IterableDataset):
    """An endless stream of which photos each batch uses; draw i of a rank depends on (seed, i,
    rank) alone.

    So a run that was interrupted continues exactly by starting at i, with no state to save.
    `start()` is asked for i whenever the stream is begun, as an epoch goes on where the one before
    it ended. All ranks read one common sequence of permutations, so each photo is used equally
    often, and n processes draw what one does that accumulates the gradients of n times as many
    batches. Wants num_workers=0: each worker would repeat it all.

    Yields dict(index (n,) int64, flipped (n,) bool, prior (n,) bool, draw int), n = `batch_size`
    instance photos followed, if there are priors, by as many prior images, whose index counts
    within the priors; `draw` counts over all ranks.
    """

    def __init__(
        self,
        instances: int,
        priors: int,
        batch_size: int,
        flip: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: Callable[[], int] = int,
    ):
        self.instances = instances
        self.priors = priors
        self.batch_size = batch_size
        self.flip = flip
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
        return dict(
            index=torch.tensor(index), flipped=torch.tensor(flipped), prior=prior, draw=number
        )

    def _pick(self, stream: str, length: int, position: int) -> tuple[int, bool]:
        """(index, flipped) at `position` of an endless chain of permutations."""
        lap, offset = divmod(position, length)
        index = _permutation(length, f"{self.seed}/{stream}/{lap}")[
            offset
        ]  # a text seeds Random alike on every machine
        return index, self.flip and Random(f"{self.seed}/{stream}/flip/{position}").random() < 0.5


# --------------------------------------------------------------------------------------------- data
class SubjectData(L.LightningDataModule):
    """The photos of one subject, its prompts, and the prior images that keep its class.

    Args:
        instance_dir: Folder with the photos of the subject (3 to 6 are usual).
        class_noun: What the subject is, in a common word: mug, dog, backpack.
        identifier: Rare word that comes to name the subject.
        batch_size: Photos a process uses per draw; with prior images, as many of these are added.
            An optimizer step sees batch_size x processes x trainer.accumulate_grad_batches of them,
            and their mean: rate and schedule do not change with the number of processes, but with
            the product.
        flip: Mirror half of the images at random. Off by default: lettering and lopsided subjects
            suffer.
        class_images_dir: Folder with images of the class, for prior preservation.
        num_class_images: How many prior images to use, in order of their names; 0 means no prior
            preservation.
        prompt: Prompt of the photos; may contain {identifier} and {class_noun}.
        class_prompt: Prompt of the prior images; may contain {class_noun}.
        crop: Where the square of a photo lies along its longer side: center, top (which keeps a
            portrait's head), bottom, left or right.
        seed: Seed of the order and the mirroring of the images.
    """

    def __init__(
        self,
        instance_dir: Path,
        class_noun: str,
        identifier: str = "sks",
        batch_size: int = 4,
        flip: bool = False,
        class_images_dir: Path | None = None,
        num_class_images: int = 0,
        prompt: str = "a {identifier} {class_noun}",
        class_prompt: str = "a {class_noun}",
        crop: str = "center",
        seed: int = 0,
    ):
        super().__init__()
        self.instance_dir = Path(instance_dir)
        self.class_images_dir = None if class_images_dir is None else Path(class_images_dir)
        self.class_noun, self.identifier, self.seed = class_noun, identifier, seed
        self.batch_size = batch_size
        self.flip = flip
        self.num_class_images = num_class_images
        self.crop = crop
        self._prompt, self._class_prompt = prompt, class_prompt

    @property
    def instance_prompt(self) -> str:
        """The prompt of the photos. Raises InputError for a wrong placeholder."""
        return _fill("prompt", self._prompt, identifier=self.identifier, class_noun=self.class_noun)

    @property
    def class_prompt(self) -> str:
        """The prompt of the prior images. Raises InputError for a wrong placeholder; {identifier}
        is one here.
        """
        return _fill("class_prompt", self._class_prompt, class_noun=self.class_noun)

    @cached_property
    def photos(self) -> list[Path]:
        """The instance photos, listed once, so that indices keep their meaning if files are added
        during a run.
        """
        return list_photos(self.instance_dir)

    @property
    def class_images_folder(self) -> Path:
        """`class_images_dir` of a run with class images. Raises InputError where it is not set."""
        if self.class_images_dir is None:
            raise InputError(
                f"num_class_images={self.num_class_images} needs class_images_dir: give the folder"
                " of the prior images, or set num_class_images to 0."
            )
        return self.class_images_dir

    @property
    def class_images(self) -> list[Path]:
        """The prior images in use; InputError if there are fewer than `num_class_images`."""
        photos = (
            list_photos(self.class_images_folder)[: self.num_class_images]
            if self.num_class_images
            else []
        )
        if len(photos) < self.num_class_images:  # the draws count on all of them
            raise InputError(
                f"class_images_dir {self.class_images_dir} holds {len(photos)} images: add"
                f" {self.num_class_images - len(photos)} or lower num_class_images."
            )
        return photos

    def check(self) -> None:
        """Raise InputError for the first thing that would stop a run, at the cost of reading every
        instance photo.

        Prior images may be made later: only `prior_pixels` needs them.
        """
        for name in ("identifier", "class_noun"):
            value = getattr(self, name)
            if not value.strip() or len(value.splitlines()) > 1:
                raise InputError(f"{name} must be a word on one line and not {value!r}.")
        for name, least in (("batch_size", 1), ("num_class_images", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least} and not {getattr(self, name)}.")
        if self.num_class_images:
            _ = self.class_images_folder
        if (
            self.class_images_dir is not None
            and self.class_images_dir.exists()
            and not self.class_images_dir.is_dir()
        ):
            raise InputError(
                f"class_images_dir {self.class_images_dir} is a file and not a folder: give the"
                " folder of the prior images."
            )
        if self.class_images_dir is not None:
            instances, priors = self.instance_dir.resolve(), self.class_images_dir.resolve()
            if instances.is_relative_to(priors) or priors.is_relative_to(instances):
                raise InputError(
                    f"class_images_dir {priors} and the photo folder {instances} must lie apart:"
                    " choose another class_images_dir."
                )
        if self.identifier not in self.instance_prompt:
            raise InputError(
                f"The prompt {self._prompt!r} does not name the subject: put {{identifier}}"
                " into it."
            )
        _ = self.class_prompt
        if self.crop not in CROPS:
            raise InputError(f"crop is {self.crop!r}: it is one of {', '.join(CROPS)}.")
        sizes = {path: open_photo(path).size for path in self.photos}
        cut = [path for path, size in sizes.items() if 1 - min(size) / max(size) > CUT + 0.01]
        if cut and self.crop == "center":
            warn_once(
                f"{self.instance_dir}: the square from the middle leaves out more than a third of"
                f" {listed(cut)}: where the subject is not in it, set data.crop to top, bottom,"
                " left or right, or cut the photos yourself"
            )

    prepare_data = check  # Lightning's name for it

    def setup(self, stage: str) -> None:
        """Raise InputError for what Lightning would do to another stream than this one."""
        if getattr(self.trainer, "overfit_batches", 0):
            raise InputError(
                "trainer.overfit_batches repeats its first batches, and here every step has draws"
                " of its own: leave it out"
            )

    def instance_pixels(self, size: int) -> Iterator[Tensor]:
        """All instance photos, in batches (n, 3, size, size) in [-1, 1]. Raises InputError as
        `list_photos` and `load_photo` do.
        """
        return _load_pixels(self.photos, size, self.crop)

    def prior_pixels(self, size: int) -> Iterator[Tensor]:
        """The first `num_class_images` prior images, in batches (n, 3, size, size) in [-1, 1];
        InputError if there are fewer.
        """
        return _load_pixels(self.class_images, size)

    def train_dataloader(self) -> DataLoader:
        """Draws for this process: at every step those of that step, whatever ends an epoch, and in
        a resumed run, too.

        Exact for checkpoints written right after an optimizer step: between two steps of gradient
        accumulation Lightning keeps the batch count but not the gradients.
        """
        stream = partial(
            Draws,
            len(self.photos),
            self.num_class_images,
            self.batch_size,
            self.flip,
            self.seed,
        )
        trainer = self.trainer
        if trainer is None:
            draws = stream()
        else:
            draws = stream(
                trainer.global_rank,
                trainer.world_size,
                lambda: trainer.global_step * trainer.accumulate_grad_batches,
            )
        return DataLoader(draws, batch_size=None, num_workers=0)


def digest(files: Iterable[Path]) -> str:
    """A hash of the contents of files, in their order."""
    content = hashlib.sha256()
    for path in files:
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def _fill(setting: str, template: str, **words: str) -> str:
    """The template with its placeholders filled. Raises InputError for any other placeholder."""
    try:
        return template.format(**words)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        allowed = " and ".join(f"{{{w}}}" for w in words)
        raise InputError(
            f"{setting} {template!r} has a wrong placeholder: it may contain {allowed} only."
        ) from error
