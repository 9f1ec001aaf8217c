"""What the files of another trainer's run say of its base and its subject: their metadata, and the
settings and cards beside them, none of which must be there.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from dreamblend.storage import foreign

DIFFUSERS = "diffusers' scripts"
KOHYA = "kohya sd-scripts or musubi-tuner"
AI_TOOLKIT = "ai-toolkit"
ONE_TRAINER = "OneTrainer"
SIMPLE_TUNER = "SimpleTuner"
DIFFUSION_PIPE = "diffusion-pipe"

_LONGEST = 2**24  # bytes of a file of settings


@dataclass(frozen=True)
class Facts:
    """What a run's files say of it; None, or nothing, where they do not."""

    base: str | None = None  # a hub id, or a path that exists
    identifier: str | None = None
    class_noun: str | None = None
    photos: Path | None = None  # that exist
    max_steps: int | None = None
    hints: tuple[str, ...] = ()  # of what cannot be used as it stands


def weights_file(path: Path) -> Path | None:
    """The file of a checkpoint that says most: a LoRA, or the denoiser."""
    if path.is_file():
        return path
    for name in (foreign.LORA, foreign.PEFT):
        if (path / name).is_file():
            return path / name
    for denoiser in foreign.DENOISERS:
        for file in sorted((path / denoiser).glob("*.safetensors")):
            return file
    return None


def said_step(metadata: dict[str, str]) -> int | None:
    """The optimizer step in a file's metadata."""
    said = str(metadata.get("ss_steps") or _first(_loads(metadata.get("training_info")), "step"))
    return int(said) if said.isdecimal() else None


def read_facts(trainer: str, folder: Path, last: list[tuple[Path, dict[str, str]]]) -> Facts:
    """What a run's last checkpoints, each with its metadata, and the settings beside them say."""
    clues = [clue for path, said in last for clue in _CLUES[trainer](folder, path, said)]
    clues += [clue for path, said in last for clue in _of_any(path, said)]
    bases = [str(value) for key, value in clues if key == "base" and value]
    denoisers = [value for key, value in clues if key == "denoiser" and value]
    subjects = [_subject(str(value)) for key, value in clues if key == "subject" and value]
    photos = [Path(str(value)).expanduser() for key, value in clues if key == "photos" and value]
    steps = [int(value) for key, value in clues if key == "steps" and str(value).isdecimal()]
    texts = dict.fromkeys(str(value) for key, value in clues if key == "subject" and value)
    known = [subject for subject in subjects if subject[0]]
    one = known[0] if len(set(known)) == 1 or trainer != KOHYA and known else (None, None)
    usable = [base for base in bases if _is_base(base)]
    hints = []
    if bases and not usable:
        hints.append(f"its base was called {bases[0]}")
    elif denoisers and not bases:
        hints.append(f"it was trained on the denoiser {denoisers[0]}")
    if texts and None in one:
        hints.append(f"it was trained on {', '.join(map(repr, list(texts)[:3]))}")
    return Facts(
        base=usable[0] if usable else None,
        identifier=one[0],
        class_noun=one[1],
        photos=next((path for path in photos if path.is_dir()), None),
        max_steps=steps[0] if steps else None,
        hints=tuple(hints),
    )


def _is_base(name: str) -> bool:
    """Whether a name can be loaded: a path that exists, or a hub id."""
    if os.path.exists(os.path.expanduser(name)):
        return True
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.startswith(".")


def _subject(text: str) -> tuple[str | None, str | None]:
    """Identifier and class noun in `a photo of sks dog`, `sks dog` or `sks`; (None, None) where
    that is not clear.
    """
    words = re.sub(r".*\bof\b", "", text.strip().rstrip("."), flags=re.IGNORECASE).split()
    if words and words[0].lower() in ("a", "an", "the"):
        words = words[1:]
    if not 1 <= len(words) <= 3:
        return None, None
    return words[0], " ".join(words[1:]) or None


Clues = Iterator[tuple[str, Any]]  # base, denoiser, subject, photos or steps -> what is said of it


def _of_any(path: Path, metadata: dict[str, str]) -> Clues:
    """What peft, diffusers and the model's own card say."""
    file = weights_file(path)
    if file is not None and file.name == foreign.PEFT:
        yield "base", read_json(file.with_name(foreign.PEFT_CONFIG)).get("base_model_name_or_path")
    yield "base", _first(_loads(metadata.get("lora_adapter_metadata")), "base_model_name_or_path")
    for denoiser in foreign.DENOISERS:
        yield "base", read_json(path / denoiser / "config.json").get("_name_or_path")
    yield "base", read_json(path / "model_index.json").get("_name_or_path")
    yield "subject", metadata.get("modelspec.trigger_phrase")


def _of_card(folder: Path) -> Clues:
    card = _text(folder / "README.md").split("---")
    said = _yaml(card[1]) if len(card) > 2 else {}
    yield "base", _first(said, "base_model")
    yield "subject", _first(said, "instance_prompt")


def _of_diffusers(folder: Path, path: Path, metadata: dict[str, str]) -> Clues:
    """The settings that accelerate logs with TensorBoard, and the card."""
    for file in sorted(folder.glob("logs/**/hparams.yml")):
        said = _yaml(_text(file))
        yield "base", _first(said, "pretrained_model_name_or_path")
        yield "subject", _first(said, "instance_prompt")
        yield "photos", _first(said, "instance_data_dir")
        yield "steps", _first(said, "max_train_steps")
    yield from _of_card(folder)


def _of_simple_tuner(folder: Path, path: Path, metadata: dict[str, str]) -> Clues:
    for place in (path, folder):
        said = {k.lstrip("-"): v for k, v in read_json(place / "simpletuner_config.json").items()}
        yield "base", said.get("pretrained_model_name_or_path")
        yield "subject", said.get("instance_prompt")
        yield "steps", said.get("max_train_steps")
        data = _loads(_text(Path(str(said.get("data_backend_config") or "/nowhere"))))
        for backend in data if isinstance(data, list) else []:
            if isinstance(backend, dict) and backend.get("dataset_type", "image") == "image":
                yield "photos", backend.get("instance_data_dir")
                yield "subject", backend.get("instance_prompt")
    yield from _of_card(folder)


def _of_kohya(folder: Path, path: Path, metadata: dict[str, str]) -> Clues:
    """`ss_datasets` has the subject's words; without it the folders are named by them."""
    yield "base", metadata.get("ss_sd_model_name")
    yield "steps", metadata.get("ss_max_train_steps")
    data = _loads(metadata.get("ss_datasets"))
    tokens = [
        subset.get("class_tokens")
        for dataset in (data if isinstance(data, list) else [])
        for subset in dataset.get("subsets") or []
        if isinstance(subset, dict) and not subset.get("is_reg")
    ]
    folders = _loads(metadata.get("ss_dataset_dirs")) or _loads(metadata.get("ss_tag_frequency"))
    named = [re.fullmatch(r"\d+_(.+)", key) for key in folders or ()]
    yield from (("subject", text) for text in tokens if text)
    if not any(tokens):
        yield from (("subject", match[1].replace("_", " ")) for match in named if match)


def _of_ai_toolkit(folder: Path, path: Path, metadata: dict[str, str]) -> Clues:
    said = _yaml(_text(folder / "config.yaml"))
    yield "base", _first(said, "name_or_path")
    yield "subject", _first(said, "trigger_word")
    yield "photos", _first(said, "folder_path")
    yield "steps", _first(said, "steps")
    for name in _loads(metadata.get("ss_tag_frequency")) or ():
        yield "subject", re.sub(r"^\d+_", "", name)


def _of_one_trainer(folder: Path, path: Path, metadata: dict[str, str]) -> Clues:
    said = _loads(metadata.get("ot_config")) or {}
    yield "base", _first(said, "base_model_name")
    yield "photos", _first(_first(said, "concepts"), "path")


def _of_diffusion_pipe(folder: Path, path: Path, metadata: dict[str, str]) -> Clues:
    """The settings are copied to every checkpoint; those of the photos stay where they are. Newer
    families are trained on files of parts, of which none is a base.
    """
    for file in sorted((path if path.is_dir() else path.parent).glob("*.toml")):
        said = _toml(file)
        yield "base", _first(said, "diffusers_path") or _first(said, "checkpoint_path")
        yield "denoiser", _first(said, "diffusion_model") or _first(said, "transformer_path")
        yield "photos", _first(_toml(Path(str(said.get("dataset") or "/nowhere"))), "path")


_CLUES = {
    DIFFUSERS: _of_diffusers,
    SIMPLE_TUNER: _of_simple_tuner,
    KOHYA: _of_kohya,
    AI_TOOLKIT: _of_ai_toolkit,
    ONE_TRAINER: _of_one_trainer,
    DIFFUSION_PIPE: _of_diffusion_pipe,
}


# -------------------------------------------------------- files of settings, none of which must be
def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a checkpoint's file says; nothing where it has none."""
    file = weights_file(path)
    if file is None:
        return {}
    try:
        with safe_open(file, framework="pt") as header:
            return header.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8") if file.stat().st_size < _LONGEST else ""
    except (OSError, UnicodeDecodeError, ValueError):
        return ""


def _loads(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        return None


def read_json(file: Path) -> dict[str, Any]:
    """The settings in a file; none where it cannot be read."""
    said = _loads(_text(file))
    return said if isinstance(said, dict) else {}


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(file))
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}


def _first(tree: Any, key: str, depth: int = 8) -> Any:
    """The first value of a key in nested settings: text or a number, or a list of settings."""
    if depth and isinstance(tree, dict):
        if tree.get(key) not in (None, "", {}):
            return tree[key]
        return next((v for x in tree.values() if (v := _first(x, key, depth - 1))), None)
    if depth and isinstance(tree, list):
        return next((v for x in tree if (v := _first(x, key, depth - 1))), None)
    return None
