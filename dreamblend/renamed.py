"""Renamed modules and options: the names of version 0.1.0 still work, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = {  # as configurations and scripts of version 0.1.0 name them
    "dreamblend.collapse": "dreamblend.attention.collapse",
    "dreamblend.task": "dreamblend.blending.batch",
    "dreamblend.blends": "dreamblend.blending.blends",
    "dreamblend.blender": "dreamblend.blending.module",
    "dreamblend.pair": "dreamblend.blending.models",
    "dreamblend.picture": "dreamblend.blending.picture",
    "dreamblend.prompts": "dreamblend.blending.prompts",
    "dreamblend.guidance": "dreamblend.blending.guidance",
    "dreamblend.data": "dreamblend.training.data",
    "dreamblend.objective": "dreamblend.training.objective",
    "dreamblend.prior": "dreamblend.training.class_images",
    "dreamblend.tuner": "dreamblend.training.module",
    "dreamblend.seeding": "dreamblend.training.seeding",
    "dreamblend.files": "dreamblend.storage.files",
    "dreamblend.report.folder": "dreamblend.storage.blend_folder",
    "dreamblend.hub": "dreamblend.storage.hub",
    "dreamblend.snapshots": "dreamblend.storage.snapshots",
    "dreamblend.evaluation.survey": "dreamblend.selection.survey",
    "dreamblend.evaluation.pick": "dreamblend.selection.command",
    "dreamblend.diagnosis": "dreamblend.evaluation.diagnosis",
    "dreamblend.evaluation.intervals": "dreamblend.evaluation.statistics",
    "dreamblend.models.concept": "dreamblend.models.learned_token",
    "dreamblend.sandbox.base": "dreamblend.sandbox.making.base",
    "dreamblend.sandbox.recipe": "dreamblend.sandbox.making.recipe",
    "dreamblend.sandbox.fitting": "dreamblend.sandbox.making.fitting",
    "dreamblend.sandbox.check": "dreamblend.sandbox.making.check",
}
CALLBACKS = {  # callbacks/ itself installs these, as another package may have its name too
    f"callbacks.{name}": f"dreamblend.callbacks.{name}"
    for name in ("averaging", "preview", "probe", "report", "resume", "snapshots", "writer")
}

OPTIONS = {  # of the command line, of --config files, and of the settings in snapshots and images
    "model.rate": "model.learning_rate",
    "model.text_encoder_rate": "model.text_encoder_learning_rate",
    "model.schedule": "model.lr_scheduler",
    "model.warmup": "model.lr_warmup_steps",
    "model.prior_weight": "model.prior_loss_weight",
    "model.steps": "model.num_inference_steps",
    "model.scale": "model.guidance_scale",
    "data.prior_dir": "data.class_images_dir",
    "data.prior_count": "data.num_class_images",
    "data.prior_prompt": "data.class_prompt",
    "trainer.callbacks.steps": "trainer.callbacks.num_inference_steps",
    "trainer.callbacks.scale": "trainer.callbacks.guidance_scale",
    "trainer.callbacks.init_args.steps": "trainer.callbacks.init_args.num_inference_steps",
    "trainer.callbacks.init_args.scale": "trainer.callbacks.init_args.guidance_scale",
    "steps": "num_inference_steps",
    "scale": "guidance_scale",
}


def option(name: str) -> str:
    """An option, `--model.rate` say, under its present name."""
    bare = name.removeprefix("--")
    if not name.startswith("--") or bare not in OPTIONS:
        return name
    _warn(name, f"--{OPTIONS[bare]}")
    return f"--{OPTIONS[bare]}"


def config(path: str) -> str:
    """The value of `--config` for a file: its path, or its whole text with the present names if it
    has old ones.
    """
    import yaml

    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return path  # the parser reports the error
    return (
        yaml.safe_dump(document, sort_keys=False) if _rename(document, "", f"of {path}") else path
    )


def settings(record: dict[str, Any]) -> dict[str, Any]:
    """The settings in a file of ours, under their present names. Without a warning: who reads the
    file did not write it.
    """
    now = {old.partition(".")[2] or old: new.rpartition(".")[2] for old, new in OPTIONS.items()}
    return {now.get(name, name): value for name, value in record.items()}


def _rename(node: Any, place: str, where: str) -> bool:
    """Give the keys of nested dictionaries their present names. Returns whether any was old."""
    if isinstance(node, list):
        return any([_rename(item, place, where) for item in node])
    if not isinstance(node, dict):
        return False
    changed = False
    for key in list(node):
        full = f"{place}{key}"
        changed |= _rename(node[key], f"{full}.", where)
        if full in OPTIONS:
            _warn(f"{full} {where}", OPTIONS[full])
            node[OPTIONS[full].rpartition(".")[2]] = node.pop(key)
            changed = True
    return changed


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is {new} now; the old name goes with the next version", FutureWarning, stacklevel=3
    )


class _Finder(MetaPathFinder, Loader):
    """Finds a module under its old name."""

    def __init__(self, names: dict[str, str]):
        self.names = names

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None):
        return ModuleSpec(name, _Finder(self.names)) if name in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        now = self.names[spec.name]
        _warn(spec.name, now)
        module = importlib.import_module(now)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Keep the specification under the new name. The module is loaded already."""
        module.__spec__ = self._spec


def install(names: dict[str, str] = MODULES) -> None:
    """Make the old names importable. Further calls change nothing."""
    if not any(isinstance(finder, _Finder) and finder.names is names for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(names))
