"""Writes what a blend draws: one PNG with its provenance an image, heat maps beside it, and one
index of all.
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
from dreamblend.processes import first_alone
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
    end, also when it is interrupted.

    A PNG is written last of an image's files and says how it was made; the images are the record,
    and the index is made from them. So a rerun draws what is missing, and nothing that is there is
    touched: where anything differs that changes an image (a setting, or weights that were
    overwritten), it is refused before it draws, as the images that are there may be wanted.
    """

    def __init__(self) -> None:
        super().__init__("batch")
        self._held: ExitStack | None = None

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        trainer.predict_loop.return_predictions = False  # what is on disk need not stay in memory
        assert isinstance(module, Blender)  # what predicts
        first_alone(trainer, lambda: self._begin(trainer, module))

    def _begin(self, trainer: L.Trainer, module: Blender) -> None:
        """Hold the shard of the output folder until the end, and leave the pairs to draw that are
        missing there.

        Raises InputError where another blend is at work there, or where `missing` does.
        """
        data = datamodule(trainer, PromptData)
        with hold(self.out(trainer), data.shard.start, data.shard.step) as held:
            pairs = data.all_pairs(module.identifier, module.class_noun)
            data.pairs = missing(self.out(trainer), pairs, module.kinds, module.settings)
            self._held = held.pop_all()

    def out(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir)

    def undrawn(
        self, out: Path, module: Blender, pairs: list[tuple[str, int]]
    ) -> list[tuple[str, int]]:
        """Those of the pairs just drawn that have no image, as it was not finite."""
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
        """The processes that this one started end with it, as they would after Ctrl-C: their share
        would wait for it.

        Where it is one of them that was lost, they first have a moment to say of what.
        """
        if isinstance(launcher := trainer.strategy.launcher, _SubprocessScriptLauncher):
            for process in launcher.procs if is_lost_process(exception) else ():
                with suppress(TimeoutExpired):
                    process.wait(LAST_WORDS)
            launcher.kill(signal.SIGKILL)
        try:
            if self._held is not None:  # by the first process, once it was not refused
                save_index(self.out(trainer), read_index(self.out(trainer)))
        finally:
            self.teardown(trainer, module, "predict")

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.strategy.barrier("images")
        if trainer.is_global_zero:
            save_index(self.out(trainer), read_index(self.out(trainer)))
