"""A whole pipeline folder, which diffusers' `from_pretrained` reads."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from dreamblend.errors import InputError
from dreamblend.export.form import Form
from dreamblend.export.what import What
from dreamblend.models.learned_token import LearnedToken
from dreamblend.models.loading import locate_base
from dreamblend.models.trust import check_index
from dreamblend.storage.files import save_text
from dreamblend.storage.snapshots import DTYPES

INDEX = "model_index.json"


class Pipeline(Form):
    """A pipeline folder with the trained weights in the place of the base's; adapters are added to
    them, and a learned word is in the vocabulary.
    """

    def check(self, what: What) -> None:
        what.check_model()
        if self.rank is not None:
            raise InputError(
                "--rank is the rank of a LoRA, and this form has none: leave it out, or choose"
                " --form diffusers or kohya"
            )

    def write(self, what: What, path: Path) -> None:
        model = what.model(DTYPES[self.dtype] if self.dtype else None)
        pipe = model.pipe
        if model.concept is not None:
            teach(pipe, model.concept)
            print(f"prompts call the learned word {model.concept.placeholder}")
        pipe.save_pretrained(path)
        base = Path(locate_base(what.base_name))
        if base.is_dir():
            _add_unused(base, path)


def teach(pipe: Any, word: LearnedToken) -> None:
    """Put a learned word into copies of a pipeline's vocabulary and text encoder."""
    for part in ("tokenizer", "text_encoder"):
        setattr(pipe, part, copy.deepcopy(getattr(pipe, part)))
    pipe.load_textual_inversion({word.placeholder: word.vectors.detach()})


def _add_unused(base: Path, path: Path) -> None:
    """Add those parts of a base's folder that are not loaded here, such as a safety checker."""
    theirs, ours = check_index(base / INDEX), check_index(path / INDEX)
    unused = {
        name: named
        for name, named in theirs.items()
        if isinstance(named, list)
        and named[0] is not None
        and ours.get(name, [None])[0] is None
        and (base / name).is_dir()
    }
    if not unused:
        return
    for name in unused:
        shutil.copytree(base / name, path / name)
    if "safety_checker" in unused:
        unused["requires_safety_checker"] = theirs.get("requires_safety_checker", True)
    save_text(json.dumps(ours | unused, indent=2, sort_keys=True) + "\n", path / INDEX)
