"""Measures the trade-off during training, as curves in TensorBoard."""

from __future__ import annotations

import lightning as L

from dreamblend.blending.prompts import read_prompts
from dreamblend.callbacks.snapshots import AtSnapshots
from dreamblend.errors import InputError
from dreamblend.evaluation.bench import Bench
from dreamblend.evaluation.protocols import find
from dreamblend.selection.probes import PROBES, SEEDS
from dreamblend.training.module import Tuner, tuner
from dreamblend.tuning.sharding import is_sharded


class Probe(AtSnapshots):
    """Draws probe prompts before the first step and at every snapshot step, and logs their measures
    as `probe/...`: subject and prompt fidelity, diversity, how similar the class has become to the
    subject (prior), and collapse (overlap, context_mass).

    Args:
        prompts: a text file with one prompt per line, or the prompts. `{subject}` stands for
            identifier and class noun.
        seeds: how many images of each prompt. Diversity needs two.
        num_inference_steps: denoising steps.
        guidance_scale: scale of classifier-free guidance (7.5 is usual for Stable Diffusion).
        judges: the protocol that scores. `auto` is the sandbox's for the sandbox, else dreambooth.
    """

    def __init__(
        self,
        prompts: list[str] | str = list(PROBES[:3]),
        seeds: int = 2,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
        judges: str = "auto",
    ):
        if seeds < 1 or num_inference_steps < 1:
            raise InputError(
                f"Probe's seeds are {seeds} and its num_inference_steps {num_inference_steps}: both"
                " must be at least 1"
            )
        self.prompts = prompts
        self.seeds = seeds
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.judges = judges
        self._bench: Bench | None = None

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Load the judges, so that an error of theirs comes before training. If the model is
        sharded, all processes draw and score.
        """
        if not trainer.loggers:
            raise InputError(
                "callbacks.Probe logs curves, and trainer.logger is off: leave it on, or take"
                " Probe out"
            )
        tuned = tuner(module)
        if trainer.is_global_zero or is_sharded(tuned.trained):
            data, protocol = tuned.data, find(self.judges, tuned.base)
            prompts = read_prompts(self.prompts, data.identifier, data.class_noun)
            seeds = list(range(SEEDS[0], SEEDS[0] + self.seeds))
            self._bench = Bench(
                data.subject_photos,
                data.identifier,
                data.class_noun,
                prompts,
                seeds,
                self.num_inference_steps,
                self.guidance_scale,
                protocol=protocol,
                device=module.device,
            )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step == 0:  # the curves begin here
            self.show(trainer, tuner(module))

    def look(self, trainer: L.Trainer, module: Tuner) -> None:
        assert self._bench is not None, "on_fit_start makes it in every process that looks"
        measured = self._bench.measured(module.backbone)
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"probe/{name}": value for name, value in measured.items() if value is not None},
                trainer.global_step,
            )
