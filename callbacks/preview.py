"""Looks at the weights of each snapshot while training goes on; `Preview` draws a few prompts with them."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from PIL import Image

from callbacks.snapshots import SnapshotCheckpoint, averaged
from dreamblend.data import to_images, to_pixels
from dreamblend.errors import InputError
from dreamblend.files import save_png
from dreamblend.prompts import read_prompts
from dreamblend.sampling import classifier_free, initial_noise, sample
from dreamblend.tuning.sharding import is_sharded


class AtSnapshots(L.Callback):
    """Calls `look` at every snapshot step, once, while the module is what the snapshot holds, in eval mode.

    On the first process alone; where the model is sharded on all, as they compute together.
    """

    _seen = 0

    def look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        raise NotImplementedError

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        wanted = {step for callback in trainer.callbacks if isinstance(callback, SnapshotCheckpoint) for step in callback.wanted}
        if trainer.global_step in wanted and trainer.global_step != self._seen:
            self.show(trainer, module)

    def show(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._seen = trainer.global_step
        if not (trainer.is_global_zero or is_sharded(module.trained)):
            return
        training = [m.training for m in module.trained]
        with averaged(trainer, module), torch.no_grad():
            module.trained.eval()
            self.look(trainer, module)
        for m, was in zip(module.trained, training):
            m.train(was)


class Preview(AtSnapshots):
    """At every snapshot step draws `prompts` into `RUN/previews/step-NNNNNN.png`, one a column, and into TensorBoard.

    Args:
        prompts: what to draw; `{subject}` stands for identifier and class noun.
        seeds: images of each prompt, from seed 0 on.
        steps: denoising steps.
        scale: of classifier-free guidance.
    """

    def __init__(
        self, prompts: list[str] = ["a {subject}", "a {subject} on the beach", "a {subject} in the snow"], seeds: int = 2, steps: int = 20,
        scale: float = 4.,
    ):
        if seeds < 1 or steps < 1:
            raise InputError(f"Preview's seeds are {seeds} and its steps {steps}: both must be at least 1")
        self.prompts, self.seeds, self.steps, self.scale = list(prompts), seeds, steps, scale

    def look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        backbone = module.backbone
        prompts = read_prompts(self.prompts, module.data.identifier, module.data.class_noun)
        batch = [p for _ in range(self.seeds) for p in prompts]
        noise = initial_noise(backbone.latent_shape, [s for s in range(self.seeds) for _ in prompts]).to(backbone.device)
        predict = classifier_free(backbone, backbone.encode_prompts(batch), backbone.encode_prompts([""] * len(batch)), self.scale)
        images = to_images(backbone.decode(sample(predict, noise, backbone.scheduler, self.steps)).float().cpu())
        if not trainer.is_global_zero:
            return
        side = images[0].width
        sheet = Image.new("RGB", (side * len(prompts), side * self.seeds))
        for i, image in enumerate(images):
            sheet.paste(image, (i % len(prompts) * side, i // len(prompts) * side))
        save_png(sheet, Path(trainer.default_root_dir) / "previews" / f"step-{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_image"):
                logger.experiment.add_image("preview", (to_pixels([sheet])[0] + 1) / 2, trainer.global_step)
