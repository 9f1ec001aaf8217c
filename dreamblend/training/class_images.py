"""Class images for prior preservation, drawn by the base before it is tuned (Ruiz et al., CVPR
2023).
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from dreamblend.errors import InputError
from dreamblend.models import Backbone
from dreamblend.models.safety import SafetyChecker, unsafe
from dreamblend.sampling import draw
from dreamblend.storage.files import check_writable, save_png
from dreamblend.storage.photos import list_photos

ROUNDS = 5  # in which images that are taken for unsafe are drawn again, before it is given up
SEEDS = 100_000  # between the seeds of a file in two rounds
CHUNK = "dreamblend_class_image"  # the PNG text chunk with the record of a class image


def missing_priors(folder: Path, count: int) -> list[Path]:
    """The files to draw so that `folder` holds `count` images, whoever made the existing ones."""
    check_writable(folder, "--data.class_images_dir")
    there = {p.name for p in _listed(folder)}
    free = (folder / name for i in range(count) if (name := f"{i:05d}.png") not in there)
    return [path for path, _ in zip(free, range(count - len(there)))]


def check_priors(folder: Path, prompt: str, base: str, base_hash: str) -> None:
    """Raise InputError if an image in `folder` was drawn for another prompt or by another base.
    Images without a record are the user's, and pass.
    """
    for path in _listed(folder):
        record = _record(path)
        if record and (record.get("prompt"), record.get("base_hash")) != (prompt, base_hash):
            raise InputError(
                f"{path} was drawn by {record.get('base')} ({record.get('base_hash')}) for"
                f" {record.get('prompt')!r}, and the class images of this run are of {base}"
                f" ({base_hash}) for {prompt!r}: choose another --data.class_images_dir"
            )


def draw_priors(
    backbone: Backbone,
    prompt: str,
    paths: list[Path],
    base_hash: str,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    checker: SafetyChecker | None = None,
    attempt: int = 0,
) -> None:
    """Draw class images into files named by their seeds (`00012.png` from seed 12). Each file says
    what it shows and which base drew it. One that is taken for unsafe is not written, and said.

    Args:
        backbone: the base. It may have the adapters of a run that begins: they change nothing yet,
            and must stay active to be trained afterwards.
        prompt: the prompt of every image.
        paths: the files to write.
        base_hash: the fingerprint of the base.
        num_inference_steps: denoising steps.
        guidance_scale: scale of classifier-free guidance.
        checker: the base's safety checker.
        attempt: how often these files were not written before: each has seeds of its own.
    """
    about = {
        "prompt": prompt,
        "base": backbone.base,
        "base_hash": base_hash,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
    }
    for start in tqdm(range(0, len(paths), 4), desc="class images", disable=not paths):
        batch = paths[start : start + 4]
        seeds = [int(p.stem) + attempt * SEEDS for p in batch]
        images = draw(backbone, [prompt] * len(batch), seeds, num_inference_steps, guidance_scale)
        for path, seed, image, flagged in zip(batch, seeds, images, unsafe(checker, images)):
            if flagged:
                warnings.warn(
                    f"unsafe by the base's safety checker, and not written: the class image {path}"
                    f" with seed {seed}",
                    stacklevel=2,
                )
            else:
                save_png(image, path, {CHUNK: json.dumps({**about, "seed": seed})})


def _listed(folder: Path) -> list[Path]:
    try:
        return list_photos(folder)
    except InputError:  # no images
        return []


def _record(path: Path) -> dict:
    """The record in an image's header, empty if it has none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            record = json.loads(image.info[CHUNK])
            return record if isinstance(record, dict) else {}
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        SyntaxError,
        RecursionError,
        Image.DecompressionBombError,
    ):  # Pillow raises most of them
        return {}
