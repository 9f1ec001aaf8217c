"""From a folder of photos to pixels, prompts and an endless, stateless stream of draws.

    folder -> subject_folders                                 (each has a subject)
           -> list_photos -> load_photo -> to_pixels          (all photos, once)
           -> read_captions -> SubjectData.prompts            (what is said of each)
    Draws  -> {index, flipped, prior, position, bucket, draw} (which of them each batch uses)
           -> SubjectData.told -> prompts, frames, weights    (what its rows are told)

The batches hold only indices and words: the few photos are encoded once and stay in memory. With
random crops they are cut and encoded at every draw.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dreamblend.errors import InputError
from dreamblend.storage.photos import (
    CROPS,
    CUT,
    list_photos,
    listed,
    load_photo,
    mask_beside,
    open_photo,
    photo_size,
    to_pixels,
    warn_once,
)
from dreamblend.storage.subjects import USUAL, SubjectFolder, chosen, record, subject_folders
from dreamblend.training import masks
from dreamblend.training.captions import CAPTIONS, names, read_captions, shuffled, sources, tags
from dreamblend.training.draws import Draws
from dreamblend.training.framing import (
    RANDOM,
    Size,
    bucket_sizes,
    corner,
    cover,
    covering,
    cut,
    nearest,
)

with suppress(ImportError):  # an extra: pip install pillow-heif
    from pillow_heif import register_heif_opener

    register_heif_opener()

PROMPT = "a {identifier} {class_noun}"


def _load_pixels(
    photos: list[Path], size: int | Size, crop: str = "center", batch: int = 4
) -> Iterator[Tensor]:
    """Photos in batches (n, 3, height, width), so that a large folder is never wholly in memory."""
    for start in tqdm(range(0, len(photos), batch), desc="photos", disable=len(photos) <= 20):
        yield to_pixels([load_photo(path, size, crop) for path in photos[start : start + batch]])


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
        crop: Which part of a photo is used along the side that is cut: center, top (keeps the head
            of a portrait), bottom, left or right; or random, another one at every draw, which is
            then encoded anew.
        resolution: Side in pixels of the images that are trained on; the base's own if None. A
            smaller one needs less memory and time. With buckets, the side of a square of as many
            pixels.
        seed: Seed of the order and the mirroring of the images, and of what is drawn of captions.
        captions: auto takes those in text files beside the photos and in metadata.jsonl, none
            leaves them. They may contain {identifier} and {class_noun}.
        caption_dropout: Share of the draws of photos that train without a prompt, which guidance
            leads away from (0.05 to 0.1 is usual).
        shuffle_tags: Draw the order of a caption's parts between commas anew each time; those that
            name the subject stay in front. Prompts are then encoded at every step.
        buckets: Train photos in shapes near their own, and not in squares. A batch is of one shape.
        mask: Weigh the loss by masks, white where the subject is: alpha takes the photos' alpha
            channels, beside takes `0.mask.png` for `0.jpg`, else it is a folder with an image of
            each photo's name. Class images have none.
        background_weight: Weight of the loss where a mask is black.
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
        buckets: bool = False,
        mask: str | None = None,
        background_weight: float = 0.0,
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
        self.buckets, self.mask, self.background_weight = buckets, mask, background_weight
        self.sizes: list[Size] = []  # of the buckets, once they are known
        self._bucket_of: list[int] | None = None  # of each photo

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

    # -- how much of the photos is seen
    @cached_property
    def _shapes(self) -> list[Size]:
        """Height and width of each photo."""
        return [photo_size(path) for path in self.photos]

    @cached_property
    def _class_shapes(self) -> list[Size]:
        """Those of each class image, which may not be there before training."""
        return [photo_size(path) for path in self.class_images]

    def arrange(self, resolution: int, multiple: int, pixels_a_latent: int = 8) -> None:
        """Choose the sizes that photos are trained in: one square, or the buckets near their shapes
        (`bucket_sizes`). Masks are weights of latents, each of `pixels_a_latent` a side.
        """
        self._pixels_a_latent = pixels_a_latent
        chosen = [(resolution, resolution)] * len(self.photos)
        if self.buckets:
            sizes = bucket_sizes(resolution, multiple)
            chosen = [nearest(shape, sizes) for shape in self._shapes]
            _say_once(
                "buckets: "
                + ", ".join(
                    f"{chosen.count(size)} photo{'s' * (chosen.count(size) > 1)} at"
                    f" {size[1]} x {size[0]}"
                    for size in sorted({*chosen})
                )
            )
        self.sizes = sorted({*chosen})
        self._bucket_of = [self.sizes.index(size) for size in chosen]

    def photos_in(self, bucket: int) -> list[int]:
        """The photos of a bucket."""
        assert self._bucket_of is not None, "arrange chooses them"
        return [i for i, of in enumerate(self._bucket_of) if of == bucket]

    def _frame(
        self, index: int, prior: bool, position: int, flipped: bool, size: Size
    ) -> list[int]:
        """What a row sees of its photo, as `Backbone.framed` takes it; of a mirrored photo in what
        the mirror shows.
        """
        shape, crop = (
            (self._class_shapes[index], "center") if prior else (self._shapes[index], self.crop)
        )
        top, left = corner(shape, size, crop, self._chance("crop", position))
        if flipped and crop != RANDOM:  # it is cut first, and mirrored then
            left = covering(shape, size)[1] - size[1] - left
        return [*shape, top, left, *size]

    def drawn_crop(self, index: int, flipped: bool, frame: list[int]) -> Tensor:
        """The part of a photo that a draw cuts at random: (1, 3, height, width) in [-1, 1]."""
        at, size = (frame[2], frame[3]), (frame[4], frame[5])
        image = self._covers(index, size)
        if flipped:  # before it is cut, as its corner is told
            image = ImageOps.mirror(image)
        return to_pixels([cut(image, size, at)])

    @cached_property
    def _covers(self) -> Callable[[int, Size], Image.Image]:
        """Photos scaled to cover their images; some are kept, as decoding takes long."""
        return lru_cache(256)(lambda index, size: cover(self.photos[index], size))

    # -- where the subject is
    @cached_property
    def mask_files(self) -> list[Path]:
        """The file with each photo's mask, none without masks. Raises InputError like
        `masks.mask_files`.
        """
        return (
            [] if self.mask is None else masks.mask_files(self.photos, self.instance_dir, self.mask)
        )

    def _read_mask(self, index: int) -> Image.Image:
        photo, shape = self.photos[index], self._shapes[index]
        return masks.read_mask(photo, self.mask_files[index], shape)

    @cached_property
    def _covering_masks(self) -> Callable[[int, Size], Image.Image]:
        return lru_cache(256)(lambda index, size: masks.covering_mask(self._read_mask(index), size))

    def _weights(self, index: int, prior: bool, flipped: bool, frame: list[int]) -> Tensor:
        """The weights (height, width) of the loss at the latents of a row."""
        if prior:
            return torch.ones(frame[4] // self._pixels_a_latent, frame[5] // self._pixels_a_latent)
        covers = self._covering_masks(index, (frame[4], frame[5]))
        return masks.weights(covers, flipped, frame, self.background_weight, self._pixels_a_latent)

    # -- what the model is told
    def told(self, draw: dict[str, Any]) -> dict[str, Any]:
        """A draw with the `prompts` of its rows, empty where a caption is dropped, and once the
        sizes are chosen with their `frames` (n, 6), what they see of their photos, and where there
        are masks the `weights` (n, height, width) of the loss at their latents. Each depends only
        on the seed and the row's position.
        """
        names = ("index", "prior", "position", "flipped")
        rows = list(zip(*(draw[name].tolist() for name in names)))
        of_classes = list(self.classes)
        prompts = [
            of_classes[index // self.num_class_images] if prior else self._varied(index, position)
            for index, prior, position, _ in rows
        ]
        if not self.sizes:
            return {**draw, "prompts": prompts}
        size = self.sizes[draw["bucket"]]
        frames = [
            self._frame(index, prior, position, flipped, size)
            for index, prior, position, flipped in rows
        ]
        told = {**draw, "prompts": prompts, "frames": torch.tensor(frames)}
        if self.mask is not None:
            told["weights"] = torch.stack(
                [
                    self._weights(index, prior, flipped, frame)
                    for (index, prior, _, flipped), frame in zip(rows, frames)
                ]
            )
        return told

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
            **({"buckets": True} if self.buckets else {}),
            **self._mask_settings(),
        }

    def _mask_settings(self) -> dict[str, Any]:
        if self.mask is None:
            return {}
        of = self.mask if self.mask == masks.ALPHA else digest(self.mask_files)
        return {"mask": of, "background_weight": self.background_weight}

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
        if self.crop not in (*CROPS, RANDOM):
            raise InputError(f"crop is {self.crop!r}: it is one of {', '.join((*CROPS, RANDOM))}.")
        if self.resolution is not None and self.resolution < 1:
            raise InputError(f"data.resolution is {self.resolution}: it must be above zero")
        sizes = {path: open_photo(path).size for path in self.photos}
        self._check_masks()
        lost = [path for path, size in sizes.items() if 1 - min(size) / max(size) > CUT + 0.01]
        if lost and self.crop == "center" and not self.buckets:
            warn_once(
                f"{self.instance_dir}: the square from the middle leaves out more than a third of"
                f" {listed(lost)}: where the subject is not in it, set data.crop to top, bottom,"
                " left or right, data.buckets to true, or cut the photos yourself"
            )

    prepare_data = check  # Lightning's name for it

    def _check_masks(self) -> None:
        """Raise InputError for masks that cannot be used, and where there are some that are not."""
        beside = [file for photo in self.photos if (file := mask_beside(photo)).is_file()]
        if beside and self.mask != masks.BESIDE:
            raise InputError(
                f"{beside[0].parent} holds masks ({listed(beside)}), and data.mask is"
                f" {self.mask or 'not set'}: set it to {masks.BESIDE}, or move them away"
            )
        if not 0 <= self.background_weight < 1:
            raise InputError(
                f"data.background_weight is {self.background_weight}: it is from 0 to below 1, the"
                " weight of the subject"
            )
        if self.mask is None and self.background_weight:
            raise InputError(
                "data.background_weight is set, and data.mask, which says what the background is,"
                " is not: set both or none"
            )
        for index in range(len(self.mask_files)):
            self._read_mask(index)

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

    def instance_pixels(self, size: int | Size, bucket: int | None = None) -> Iterator[Tensor]:
        """All instance photos, or those of a bucket, in batches (n, 3, height, width) in [-1, 1].
        Raises InputError like `list_photos` and `load_photo`.
        """
        within = range(len(self.photos)) if bucket is None else self.photos_in(bucket)
        return _load_pixels([self.photos[i] for i in within], size, self.crop)

    def prior_pixels(self, size: int | Size) -> Iterator[Tensor]:
        """The first `num_class_images` prior images, in batches (n, 3, height, width) in [-1, 1].
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
            buckets=self._bucket_of,
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

    def transfer_batch_to_device(
        self, batch: dict, device: torch.device, dataloader_idx: int
    ) -> dict:
        """A batch stays on the CPU. It says which rows are drawn, and to read that back from a
        GPU would wait for all that runs there.
        """
        return batch


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
