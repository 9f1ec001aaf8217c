"""Writes the images of a blend: a PNG with its provenance for each image, its heat maps, and one
index of all images.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from dreamblend.blending.data import PromptData
from dreamblend.blending.module import Blender
from dreamblend.blending.picture import Picture
from dreamblend.errors import is_lost_process
from dreamblend.processes import first_alone, gathered
from dreamblend.storage.blend_folder import (
    Result,
    image_path,
    maps_path,
    missing,
    read_image,
    read_index,
    save_image,
    save_index,
    undrawn,
)
from dreamblend.storage.files import hold
from dreamblend.trainer import datamodule

LAST_WORDS = 5  # seconds


class BlendWriter(BasePredictionWriter):
    """Fills `OUT/images` and `OUT/maps` as the images are drawn, and `OUT/results.jsonl` at the
    end, also after an interruption.

    The PNG is the last file written for an image, and says how it was made. The images are the
    record, and the index is made from them. So a rerun draws the missing images and touches no
    existing one. If anything that changes an image differs (a setting, or overwritten weights), the
    rerun is refused before it draws, as the user may want the existing images.
    """

    def __init__(self) -> None:
        super().__init__("batch")
        self._held: ExitStack | None = None
        self.flagged: list[tuple[str, int]] = []  # pairs with an image that was left out as unsafe

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        trainer.predict_loop.return_predictions = (
            False  # the images are on disk and need not stay in memory
        )
        assert isinstance(module, Blender)  # what predicts
        first_alone(trainer, lambda: self._begin(trainer, module))

    def _begin(self, trainer: L.Trainer, module: Blender) -> None:
        """Hold the shard of the output folder until the end, and keep only the pairs that are
        missing there.

        Raises InputError if another blend writes there, and where `missing` does.
        """
        data = datamodule(trainer, PromptData)
        with hold(self.out(trainer), data.shard.start, data.shard.step) as held:
            weighting = module.options.prompt_weighting
            pairs = data.all_pairs(module.identifier, module.class_noun, weighting)
            data.pairs = missing(self.out(trainer), pairs, module.kinds, module.settings)
            self._held = held.pop_all()

    def out(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir)

    def undrawn(
        self, out: Path, module: Blender, pairs: list[tuple[str, int]]
    ) -> list[tuple[str, int]]:
        """The pairs just drawn that have no image, as it was not finite."""
        return undrawn(out, pairs, module.kinds)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        prediction: list[Picture],
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert isinstance(module, Blender)
        out = self.out(trainer)
        for picture in prediction:
            path = image_path(out, picture.prompt, picture.seed, picture.kind)
            if read_image(out, path) is not None:
                continue
            picture.save_maps(maps_path(out, path))
            result = Result(
                prompt=picture.prompt,
                seed=picture.seed,
                kind=picture.kind,
                early=module.pair.early.name,
                late=module.pair.late.name,
                settings=module.settings,
                collapse=picture.collapse,
                distance=picture.distance,
                dtype=picture.dtype,
                file=str(path.relative_to(out)),
            )
            save_image(out, picture.image, result)

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        """End the processes that this one started, as Ctrl-C would: they would wait for this one
        forever.

        If one of them was lost, they first get a moment to print why.
        """
        if isinstance(launcher := trainer.strategy.launcher, _SubprocessScriptLauncher):
            for process in launcher.procs if is_lost_process(exception) else ():
                with suppress(TimeoutExpired):
                    process.wait(LAST_WORDS)
            launcher.kill(signal.SIGKILL)
        try:
            if self._held is not None:  # in the first process, after it was accepted
                save_index(self.out(trainer), read_index(self.out(trainer)))
        finally:
            self.teardown(trainer, module, "predict")

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Blender)
        self.flagged = gathered(module.flagged)  # of all processes, which have written by then
        if trainer.is_global_zero:
            save_index(self.out(trainer), read_index(self.out(trainer)))
