"""From a folder of photos to pixels, prompts and an endless, stateless stream of draws.

    folder -> subject_folders                                 (each has a subject)
           -> list_photos -> load_photo -> to_pixels          (all photos, once)
           -> read_captions -> SubjectData.prompts            (what is said of each)
    Draws  -> {index, flipped, prior, position, draw}         (which of them each batch uses)
           -> SubjectData.told -> prompts                     (what its rows are told)

The batches hold only indices and words: the few photos are encoded once and stay in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
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
from dreamblend.storage.subjects import USUAL, SubjectFolder, chosen, record, subject_folders
from dreamblend.training.captions import CAPTIONS, names, read_captions, shuffled, sources, tags

with suppress(ImportError):  # an extra: pip install pillow-heif
    from pillow_heif import register_heif_opener

    register_heif_opener()

PROMPT = "a {identifier} {class_noun}"


def _load_pixels(
    photos: list[Path], size: int, crop: str = "center", batch: int = 4
) -> Iterator[Tensor]:
    """Photos in batches (n, 3, size, size), so that a large folder is never wholly in memory."""
    for start in tqdm(range(0, len(photos), batch), desc="photos", disable=len(photos) <= 20):
        yield to_pixels([load_photo(path, size, crop) for path in photos[start : start + batch]])


# -------------------------------------------------------------------------------------------- draws
@lru_cache(maxsize=16)
def _permutation(length: int, key: str) -> tuple[int, ...]:
    return tuple(Random(key).sample(range(length), length))


class Draws(IterableDataset):
    """An endless stream of the photos that each batch uses. Draw i of a rank depends only on (seed,
    i, rank).

    So an interrupted run continues exactly by starting at i, without a saved state. Each iteration
    calls `start()` for its first i, as an epoch goes on where the previous one ended. All ranks
    read one common sequence of permutations, so each photo is used equally often (or `repeats`
    times as often), and n processes draw the same as one process that accumulates the gradients of
    n times as many batches. Use it
    with num_workers=0, as each worker would repeat the whole stream.

    Yields dict(index (n,) int64, flipped (n,) bool, prior (n,) bool, position (n,) int64, draw
    int). The first `batch_size` entries are instance photos. If there are prior images, as many of
    them follow, and their index counts within the prior images. `draw` and `position` (of a row in
    its stream of photos or of prior images) count over all ranks.
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
        repeats: Sequence[int] | None = None,
    ):
        self.instances = instances
        # each as often as it is drawn where another is drawn once
        self.photos = [i for i, n in enumerate(repeats or [1] * instances) for _ in range(n)]
        self.priors = priors
        self.batch_size = batch_size
        self.flip = flip
        self.seed, self.rank, self.world_size, self.start = seed, rank, world_size, start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.at, count(self.start()))

    def at(self, draw: int) -> dict[str, Any]:
        """The batch that this rank uses at `draw`."""
        number = draw * self.world_size + self.rank
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        picks = [self._pick("instance", len(self.photos), p) for p in positions]
        picks = [(self.photos[place], flipped) for place, flipped in picks]
        if self.priors:
            picks += [self._pick("prior", self.priors, p) for p in positions]
        index, flipped = zip(*picks)
        prior = torch.arange(len(picks)) >= self.batch_size
        return dict(
            index=torch.tensor(index),
            flipped=torch.tensor(flipped),
            prior=prior,
            position=torch.tensor(positions).repeat(len(picks) // self.batch_size),
            draw=number,
        )

    def _pick(self, stream: str, length: int, position: int) -> tuple[int, bool]:
        """(index, flipped) at `position` of an endless chain of permutations."""
        lap, offset = divmod(position, length)
        # a text seeds Random the same way on every machine
        index = _permutation(length, f"{self.seed}/{stream}/{lap}")[offset]
        return index, self.flip and Random(f"{self.seed}/{stream}/flip/{position}").random() < 0.5


# --------------------------------------------------------------------------------------------- data
class SubjectData(L.LightningDataModule):
    """The photos of one subject or several, what is said of them, and the prior images of their
    classes.

    Args:
        instance_dir: Folder with the photos of the subject (3 to 6 are usual), or with a folder for
            each subject, as kohya's trainers have them: `10_sks dog` says how often its photos are
            drawn, the identifier and the class noun.
        class_noun: What the subject is, in a common word: mug, dog, backpack. Where folders say it,
            it chooses the subject that previews and measures draw; the first one where None.
        identifier: Rare word that names the subject after training; sks where None, or as the
            folders say it.
        batch_size: Photos that a process uses per draw. With prior images, as many of them are
            added. An optimizer step takes the mean over batch_size x processes x
            trainer.accumulate_grad_batches photos: if this product changes, the learning rate may
            have to change too.
        flip: Mirror half of the images at random. Off by default, as it harms lettering and
            asymmetric subjects.
        class_images_dir: Folder with images of the class, for prior preservation. Where there are
            several classes, with a folder for each.
        num_class_images: How many prior images to use of each class, in the order of their names. 0
            turns prior preservation off.
        prompt: Prompt of the photos without a caption. It may contain {identifier} and
            {class_noun}.
        class_prompt: Prompt of the prior images. It may contain {class_noun}.
        crop: Which square of a photo is used along its longer side: center, top (keeps the head of
            a portrait), bottom, left or right.
        resolution: Side in pixels of the images that are trained on; the base's own if None. A
            smaller one needs less memory and time.
        seed: Seed of the order and the mirroring of the images, and of what is drawn of captions.
        captions: auto takes those in text files beside the photos and in metadata.jsonl, none
            leaves them. They may contain {identifier} and {class_noun}.
        caption_dropout: Share of the draws of photos that train without a prompt, which guidance
            leads away from (0.05 to 0.1 is usual).
        shuffle_tags: Draw the order of a caption's parts between commas anew each time; those that
            name the subject stay in front. Prompts are then encoded at every step.
    """

    def __init__(
        self,
        instance_dir: Path,
        class_noun: str | None = None,
        identifier: str | None = None,
        batch_size: int = 4,
        flip: bool = False,
        class_images_dir: Path | None = None,
        num_class_images: int = 0,
        prompt: str = PROMPT,
        class_prompt: str = "a {class_noun}",
        crop: str = "center",
        resolution: int | None = None,
        seed: int = 0,
        captions: str = "auto",
        caption_dropout: float = 0.0,
        shuffle_tags: bool = False,
    ):
        super().__init__()
        self.instance_dir = Path(instance_dir)
        self.class_images_dir = None if class_images_dir is None else Path(class_images_dir)
        self._class_noun, self._identifier, self.seed = class_noun, identifier, seed
        self.batch_size = batch_size
        self.flip = flip
        self.num_class_images = num_class_images
        self.crop, self.resolution = crop, resolution
        self._prompt, self._class_prompt = prompt, class_prompt
        self._captions = captions
        self.caption_dropout, self.shuffle_tags = caption_dropout, shuffle_tags

    # -- subjects
    @cached_property
    def folders(self) -> list[SubjectFolder]:
        """The folders of photos, each with its subject: those in `instance_dir`, or itself."""
        one = SubjectFolder(
            self.instance_dir,
            USUAL if self._identifier is None else self._identifier,
            self._class_noun or "",
        )
        return subject_folders(self.instance_dir) or [one]

    @cached_property
    def _subject(self) -> dict[str, Any]:
        """The subject that is drawn and measured during the run."""
        subjects = record(self.folders)
        subject = chosen(subjects, self._identifier, self._class_noun)
        if subject is None:
            known = ", ".join(f"'{s['identifier']} {s['class_noun']}'" for s in subjects)
            given = " ".join(filter(None, (self._identifier, self._class_noun)))
            raise InputError(
                f"data.identifier and data.class_noun say '{given}', and the folders in"
                f" {self.instance_dir} have {known}: name one of these, or leave both out"
            )
        return subject

    @property
    def identifier(self) -> str:
        return self._subject["identifier"]

    @property
    def class_noun(self) -> str:
        return self._subject["class_noun"]

    @property
    def subject_photos(self) -> list[Path]:
        """The photos of the subject that is drawn and measured during the run."""
        return [
            photo
            for photo, folder in zip(self.photos, self._folder_of)
            if (folder.identifier, folder.class_noun) == (self.identifier, self.class_noun)
        ]

    # -- photos and what is said of them
    @cached_property
    def photos(self) -> list[Path]:
        """The instance photos. They are listed once, so that an index means the same photo if files
        are added during a run.
        """
        return [photo for folder in self.folders for photo in list_photos(folder.path)]

    @cached_property
    def _folder_of(self) -> list[SubjectFolder]:
        """The folder of each photo."""
        of = {folder.path: folder for folder in self.folders}
        return [of[photo.parent] for photo in self.photos]

    @property
    def instance_prompt(self) -> str:
        """The prompt of the photos. Raises InputError for a wrong placeholder."""
        return self._prompt_of(self.identifier, self.class_noun)

    def _prompt_of(self, identifier: str, class_noun: str) -> str:
        return _fill("prompt", self._prompt, identifier=identifier, class_noun=class_noun)

    @cached_property
    def captions(self) -> dict[Path, tuple[str, Path]]:
        """Photo -> its caption with the words filled in, and the file that says it; only of photos
        that have one. Raises InputError like `read_captions`, and for a wrong placeholder.
        """
        if self._captions == "none":
            return {}
        found, filled = read_captions(self.instance_dir, self.photos), {}
        for photo, folder in zip(self.photos, self._folder_of):
            if photo in found:
                caption, file = found[photo]
                words = {"identifier": folder.identifier, "class_noun": folder.class_noun}
                where = f"the caption of {photo.name} in {file}:"
                filled[photo] = _fill(where, caption, **words), file
        return filled

    @cached_property
    def prompts(self) -> list[str]:
        """What is said of each photo: its caption, or the prompt of those without."""
        return [
            (
                self.captions[photo][0]
                if photo in self.captions
                else self._prompt_of(folder.identifier, folder.class_noun)
            )
            for photo, folder in zip(self.photos, self._folder_of)
        ]

    def told(self, draw: dict[str, Any]) -> dict[str, Any]:
        """A draw with the `prompts` of its rows; empty where a caption is dropped. Each depends
        only on the seed and the row's position.
        """
        of_classes = list(self.classes)
        prompts = [
            of_classes[index // self.num_class_images] if prior else self._varied(index, position)
            for index, prior, position in zip(
                *(draw[name].tolist() for name in ("index", "prior", "position"))
            )
        ]
        return {**draw, "prompts": prompts}

    def _varied(self, index: int, position: int) -> str:
        """A photo's prompt as it is told at a position of the stream."""
        if self._chance("dropout", position).random() < self.caption_dropout:
            return ""
        prompt, of = self.prompts[index], self._folder_of[index]
        if not self.shuffle_tags:
            return prompt
        return shuffled(prompt, of.identifier, self._chance("tags", position))

    def _chance(self, of: str, position: int) -> Random:
        return Random(f"{self.seed}/instance/{of}/{position}")

    @property
    def settings(self) -> dict[str, Any]:
        """What of captions and photos the weights depend on beside today's settings: only what is
        set, so that records without it stay as they are.
        """
        several = self.folders[0].path != self.instance_dir
        return {
            **({"subjects": record(self.folders)} if several else {}),
            **({"captions": text_digest(self.prompts)} if self.captions else {}),
            **({"caption_dropout": self.caption_dropout} if self.caption_dropout else {}),
            **({"shuffle_tags": True} if self.shuffle_tags else {}),
        }

    # -- class images
    @cached_property
    def classes(self) -> dict[str, Path]:
        """Class prompt -> the folder of its class images: `class_images_dir`, or one of the class
        noun's name in it where there are several prompts. Empty without class images. Raises
        InputError for a wrong placeholder, which {identifier} is here.
        """
        if not self.num_class_images:
            return {}
        nouns = dict.fromkeys(folder.class_noun for folder in self.folders)
        prompts = {self._class_prompt_of(noun): noun for noun in nouns}
        root = self.class_images_folder
        return {p: root / noun if len(prompts) > 1 else root for p, noun in prompts.items()}

    @property
    def class_prompt(self) -> str:
        """The prompt of the prior images of the subject that is drawn and measured. Raises
        InputError for a wrong placeholder, which {identifier} is here.
        """
        return self._class_prompt_of(self.class_noun)

    def _class_prompt_of(self, class_noun: str) -> str:
        return _fill("class_prompt", self._class_prompt, class_noun=class_noun)

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
        """The prior images in use, class by class. Raises InputError if there are fewer than
        `num_class_images` of one.
        """
        images = []
        for folder in self.classes.values():
            photos = list_photos(folder)[: self.num_class_images]
            if len(photos) < self.num_class_images:  # the draws use all of them
                raise InputError(
                    f"class_images_dir {folder} holds {len(photos)} images: add"
                    f" {self.num_class_images - len(photos)} or lower num_class_images."
                )
            images += photos
        return images

    def check(self) -> None:
        """Raise InputError for the first problem that would stop a run. This opens every instance
        photo.

        Prior images may be made later: only `prior_pixels` needs them.
        """
        if not self.folders[0].class_noun and self._class_noun is None:
            raise InputError(
                "data.class_noun is not given: say what the subject is, in a common word"
            )
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
        self._check_captions()
        if self.crop not in CROPS:
            raise InputError(f"crop is {self.crop!r}: it is one of {', '.join(CROPS)}.")
        if self.resolution is not None and self.resolution < 1:
            raise InputError(f"data.resolution is {self.resolution}: it must be above zero")
        sizes = {path: open_photo(path).size for path in self.photos}
        cut = [path for path, size in sizes.items() if 1 - min(size) / max(size) > CUT + 0.01]
        if cut and self.crop == "center":
            warn_once(
                f"{self.instance_dir}: the square from the middle leaves out more than a third of"
                f" {listed(cut)}: where the subject is not in it, set data.crop to top, bottom,"
                " left or right, or cut the photos yourself"
            )

    prepare_data = check  # Lightning's name for it

    def _check_captions(self) -> None:
        """Say which captions there are. Raise InputError for settings that do nothing with them."""
        if self._captions not in CAPTIONS:
            raise InputError(
                f"data.captions is {self._captions!r}: it is one of {', '.join(CAPTIONS)}"
            )
        if not 0 <= self.caption_dropout < 1:
            raise InputError(
                f"data.caption_dropout is {self.caption_dropout}: it is a share of the draws, from"
                " 0 to below 1"
            )
        bare = [photo for photo in self.photos if photo not in self.captions]
        if not bare and self._prompt != PROMPT:
            raise InputError(
                f"data.prompt {self._prompt!r} is for photos without a caption, and all of them"
                " have one: leave it out, or set data.captions to none"
            )
        if self.shuffle_tags and all(len(tags(prompt)) < 2 for prompt in self.prompts):
            raise InputError(
                "data.shuffle_tags has nothing to shuffle: no caption has parts between commas"
            )
        if not self.captions:
            return
        files = sources(file for _, file in self.captions.values())
        _say_once(
            f"{len(self.captions)} of {len(self.photos)} photos have a caption, from {files}"
            f" (data.captions none leaves them){'; the others have data.prompt' * bool(bare)}"
        )
        for folder in self.folders:
            nameless = [
                photo
                for photo, (caption, _) in self.captions.items()
                if photo.parent == folder.path and not names(caption, folder.identifier)
            ]
            if nameless:
                warn_once(
                    f"{folder.path}: the captions of {listed(nameless)} do not name the subject"
                    f" {folder.identifier!r}, which these photos then do not teach: put"
                    " {identifier} {class_noun} into them"
                )

    def setup(self, stage: str) -> None:
        """Raise InputError for a trainer setting that does not work with this stream."""
        if getattr(self.trainer, "overfit_batches", 0):
            raise InputError(
                "trainer.overfit_batches repeats its first batches, and here every step has draws"
                " of its own: leave it out"
            )

    def instance_pixels(self, size: int) -> Iterator[Tensor]:
        """All instance photos, in batches (n, 3, size, size) in [-1, 1]. Raises InputError like
        `list_photos` and `load_photo`.
        """
        return _load_pixels(self.photos, size, self.crop)

    def prior_pixels(self, size: int) -> Iterator[Tensor]:
        """The first `num_class_images` prior images, in batches (n, 3, size, size) in [-1, 1].
        Raises InputError if there are fewer.
        """
        return _load_pixels(self.class_images, size)

    def train_dataloader(self) -> DataLoader:
        """The draws of this process. Each step gets its draws wherever an epoch ends, also in a
        resumed run.

        This is exact for checkpoints written right after an optimizer step. Within gradient
        accumulation, Lightning saves the batch count but not the gradients.
        """
        stream = partial(
            Draws,
            len(self.photos),
            self.num_class_images * len(self.classes),
            self.batch_size,
            self.flip,
            self.seed,
            repeats=[folder.repeats for folder in self._folder_of],
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
        told: Any = self.told  # without batches of its own, a loader gives it one draw
        return DataLoader(draws, batch_size=None, num_workers=0, collate_fn=told)


@lru_cache
def _say_once(message: str) -> None:
    rank_zero_info(message)


def text_digest(texts: list[str]) -> str:
    """A hash of texts, in the given order."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def digest(files: Iterable[Path]) -> str:
    """A hash of the contents of files, in the given order."""
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
