"""Draws a few prompts with the weights of each snapshot during training."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from dreamblend.blending.prompts import named, read_prompts
from dreamblend.callbacks.snapshots import AtSnapshots
from dreamblend.errors import InputError
from dreamblend.models.safety import SafetyChecker, unsafe
from dreamblend.sampling import draw
from dreamblend.storage.files import save_png
from dreamblend.storage.photos import to_pixels
from dreamblend.training.module import Tuner, tuner


class Preview(AtSnapshots):
    """Draws `prompts` at every snapshot step, into `RUN/previews/step-NNNNNN.png` (one column for
    each prompt) and into TensorBoard or W&B. What the base's own safety checker takes for unsafe is
    left white.

    Args:
        prompts: what to draw, or a text file with one prompt a line. `{subject}` stands for
            identifier and class noun.
        seeds: how many images of each prompt, from seed 0 on.
        num_inference_steps: denoising steps.
        guidance_scale: scale of classifier-free guidance.
        every: draw at every so many optimizer steps too.
    """

    def __init__(
        self,
        prompts: list[str] | str = [
            "a {subject}",
            "a {subject} on the beach",
            "a {subject} in the snow",
        ],
        seeds: int = 2,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
        every: int | None = None,
    ):
        if every is not None and every < 1:
            raise InputError(f"Preview's every is {every}: it is a number of optimizer steps")
        if seeds < 1 or num_inference_steps < 1:
            raise InputError(
                f"Preview's seeds are {seeds} and its num_inference_steps {num_inference_steps}:"
                " both must be at least 1"
            )
        self.prompts, self.seeds, self.num_inference_steps, self.guidance_scale = (
            prompts if isinstance(prompts, str) else list(prompts),
            seeds,
            num_inference_steps,
            guidance_scale,
        )

        self.every, self._drawn = every, 0  # the step of the last drawing
        self._checker: SafetyChecker | None = None

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Load the base's safety checker, so that an error of its comes before training."""
        if trainer.is_global_zero:
            self._checker = tuner(module).load_checker()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        if self.every and trainer.global_step % self.every == 0:
            self.show(trainer, tuner(module))

    def show(self, trainer: L.Trainer, module: Tuner) -> None:
        if trainer.global_step == self._drawn:
            return  # a step has several batches, and may have a snapshot too
        self._drawn = trainer.global_step
        super().show(trainer, module)

    def look(self, trainer: L.Trainer, module: Tuner) -> None:
        prompts = read_prompts(self.prompts, module.data.identifier, module.data.class_noun)
        seeds = [seed for seed in range(self.seeds) for _ in prompts]
        images = draw(
            module.backbone,
            prompts * self.seeds,
            seeds,
            self.num_inference_steps,
            self.guidance_scale,
        )
        if not trainer.is_global_zero:
            return
        side, flagged = images[0].width, unsafe(self._checker, images)
        sheet = Image.new("RGB", (side * len(prompts), side * self.seeds), "white")
        for i, image in enumerate(images):
            if not flagged[i]:
                sheet.paste(image, (i % len(prompts) * side, i // len(prompts) * side))
        if any(flagged):
            drawn = list(zip(prompts * self.seeds, seeds))
            warnings.warn(
                f"unsafe by the base's safety checker, and left out of the preview of step"
                f" {trainer.global_step}: {named([p for p, bad in zip(drawn, flagged) if bad])}",
                stacklevel=2,
            )
        save_png(
            sheet,
            Path(trainer.default_root_dir) / "previews" / f"step-{trainer.global_step:06d}.png",
        )
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("preview", [sheet], trainer.global_step)
                continue
            add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
            if add_image is not None:  # TensorBoard's takes images
                add_image("preview", (to_pixels([sheet])[0] + 1) / 2, trainer.global_step)
