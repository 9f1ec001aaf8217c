"""Names that moved: those of the version before still work, with a warning, until the next one."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {  # as configurations and scripts of version 0.1.0 name them
    "dreamblend.collapse": "dreamblend.attention.collapse",
    "dreamblend.task": "dreamblend.blending.batch",
    "dreamblend.blends": "dreamblend.blending.blends",
    "dreamblend.blender": "dreamblend.blending.module",
    "dreamblend.pair": "dreamblend.blending.pair",
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
CALLBACKS = {  # below a name that another package may have too: so callbacks/ itself installs them
    f"callbacks.{name}": f"dreamblend.callbacks.{name}"
    for name in ("averaging", "preview", "probe", "report", "resume", "snapshots", "writer")
}


class _Finder(MetaPathFinder, Loader):
    """Finds a module under its old name."""

    def __init__(self, names: dict[str, str]):
        self.names = names

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None):
        return ModuleSpec(name, _Finder(self.names)) if name in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        now = self.names[spec.name]
        warnings.warn(
            f"{spec.name} is {now} now; the old name goes with the next version",
            FutureWarning,
            stacklevel=2,
        )
        module = importlib.import_module(now)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It is loaded already, and keeps the specification under its new name."""
        module.__spec__ = self._spec


def install(names: dict[str, str] = MODULES) -> None:
    """Let the old names be imported. Once is enough."""
    if not any(isinstance(finder, _Finder) and finder.names is names for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(names))
