"""Captions: what is said of a photo, read from files beside it, and how a draw varies it.

0.png + 0.txt, or a line of metadata.jsonl -> template -> "a sks mug, on a table" -> tags shuffled
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from dreamblend.errors import InputError
from dreamblend.storage.photos import listed, warn_once

METADATA = "metadata.jsonl"  # of a Hugging Face `imagefolder`
TEXTS = ("text", "caption")  # what its lines call a caption
CAPTIONS = ("auto", "none")


def read_captions(root: Path, photos: list[Path]) -> dict[Path, tuple[str, Path]]:
    """Photo -> its caption, as it is written, and the file that says it.

    A caption is in a text file of the photo's name (`0.txt` beside `0.png`, as kohya's trainers
    have it), or in a line {"file_name": "0.png", "text": "..."} of a metadata.jsonl, in `root` or
    in a photo's own folder. Warns of text files that no photo is called after. Raises InputError
    for a file that is empty, is not UTF-8 or not such lines, that speaks of a photo that is not
    there, or where two files speak of one photo.
    """
    found: dict[Path, tuple[str, Path]] = {}
    folders = list(dict.fromkeys([Path(root), *(photo.parent for photo in photos)]))
    for folder in folders:
        if (file := folder / METADATA).is_file():
            for photo, caption in _lines(file, {*photos}).items():
                found[_only(photo, found, file)] = caption, file
    for photo in photos:
        if (file := photo.with_suffix(".txt")).is_file():
            found[_only(photo, found, file)] = " ".join(_text(file).split()), file
    for photo, (caption, file) in found.items():
        if not caption:
            raise InputError(
                f"{file} has an empty caption for {photo.name}: write one, or remove"
                f" {'its line' if file.name == METADATA else 'the file'}"
            )
    names = {photo.with_suffix(".txt") for photo in photos}
    for folder in folders:
        texts = sorted(p for p in folder.glob("*.txt") if not p.name.startswith("."))
        if lonely := [p for p in texts if p not in names]:
            warn_once(f"{folder}: no photo is called as {listed(lonely)}, and it says nothing")
    return found


def _only(photo: Path, found: dict[Path, tuple[str, Path]], file: Path) -> Path:
    if photo in found:
        raise InputError(
            f"{found[photo][1]} and {file} both have a caption for {photo.name}: keep one of them"
        )
    return photo


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the captions in {file} are not UTF-8 text: save it as UTF-8") from error


def _lines(file: Path, photos: set[Path]) -> dict[Path, str]:
    """The captions in a metadata.jsonl."""
    captions: dict[Path, str] = {}
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        try:
            entry: Any = json.loads(line)
            name, said = entry["file_name"], [entry[key] for key in TEXTS if key in entry]
            (caption,) = said
            if not isinstance(caption, str):
                raise TypeError
            photo = file.parent / name
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f'{where} is not understood: it is {{"file_name": "0.png", "text": "..."}}'
            ) from error
        if photo not in photos:
            raise InputError(
                f"{where} is of {name}, and no photo of this name is in {file.parent}: correct the"
                " name, or remove the line"
            )
        if photo in captions:
            raise InputError(f"{where} is the second one of {name}: keep one of them")
        captions[photo] = " ".join(caption.split())
    return captions


def names(caption: str, word: str) -> bool:
    """Whether a caption has a word, or words, in any case."""
    return re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", caption.lower()) is not None


def tags(caption: str) -> list[str]:
    """The parts of a caption between its commas."""
    return [tag for part in caption.split(",") if (tag := part.strip())]


def shuffled(caption: str, identifier: str, random: Random) -> str:
    """The caption with its tags in another order; those that name the subject stay in front."""
    first = [tag for tag in tags(caption) if names(tag, identifier)]
    rest = [tag for tag in tags(caption) if not names(tag, identifier)]
    return ", ".join([*first, *random.sample(rest, len(rest))])


def sources(files: Iterable[Path]) -> str:
    """The files of captions in a message."""
    files = list(files)
    metadata = list(dict.fromkeys(str(file) for file in files if file.name == METADATA))
    texts = sum(file.name != METADATA for file in files)
    return " and ".join([f"{texts} .txt file{'s' * (texts > 1)}"] * bool(texts) + metadata)
