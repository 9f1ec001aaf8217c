"""What test_processes.py looks at, made by forked processes in torchrun's environment, so that the
libraries are imported once: `python tests/processes.py BASE PHOTOS OUT`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline  # noqa: F401  so that no process imports it again
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import save_file
from tiny_runs import blend_words, command, fit

from blend import main
from dreamblend.callbacks import Preview, Probe, ResumeState
from dreamblend.tuning import Full, LoRA
from tests.robustness.forked import torchrun

PROMPTS = ["a sks mug", "a sks mug on the beach near a tree", "sks"]
BLENDS = {"1-8": (1, 8), "2-3": (2, 3), "3-1": (3, 1)}  # processes, batch size


def together(processes: int, work: Callable[[int], None]) -> list[int]:
    """Run `work(rank)` in as many processes; their exit statuses."""

    def begin(rank: int, environment: dict[str, str]) -> None:
        torch.set_num_threads(1)
        os.environ.update(environment)
        work(rank)

    started = [
        multiprocessing.get_context("fork").Process(target=begin, args=of)
        for of in enumerate(torchrun(processes))
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
    return [process.exitcode for process in started]


class Ahead(ResumeState):
    """By the clock of the second process alone a state is due. Each process leaves the steps of its
    states in OUT/states-RANK.
    """

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1:
            self._due = 0.0

    def save(self, trainer):
        super().save(trainer)
        with open(Path(trainer.default_root_dir) / f"states-{trainer.global_rank}", "a") as file:
            file.write(f"{trainer.global_step} ")


def train(
    base: Path,
    photos: Path,
    out: Path,
    processes: int,
    tuning,
    *,
    total: int = 4,
    strategy="ddp",
    prior: Path | None = None,
    callbacks: tuple = (),
    logger=False,
    data: dict | None = None,
    **model,
) -> None:
    """Two steps of `total` batches each, whoever draws them; every process leaves its weights in
    `out`/rank-N.safetensors.
    """

    def work(rank: int) -> None:
        trainer = {
            "devices": processes,
            "accumulate_grad_batches": total // processes,
            "logger": logger,
        }
        trainer |= {"strategy": strategy} if processes > 1 else {}
        priors = {"class_images_dir": prior, "num_class_images": 3} if prior else {}
        module = fit(
            base,
            photos,
            out,
            tuning,
            steps=[1, 2],
            learning_rate=1e-3,
            data=priors | (data or {}),
            trainer=trainer,
            callbacks=callbacks,
            **model,
        )
        weights = {
            k: p.detach().contiguous()
            for k, p in module.named_parameters()
            if p.requires_grad and not hasattr(p, "full_tensor")
        }
        save_file(weights, out / f"rank-{rank}.safetensors")

    statuses = together(processes, work)
    assert statuses == [0] * processes, (out, statuses)


def blend(run: Path, out: Path, processes: int, batch_size: int, *more: object) -> list[int]:
    def work(rank: int) -> None:
        words = blend_words(
            run,
            out,
            "--data.batch_size",
            batch_size,
            "--trainer.devices",
            processes,
            *more,
            prompts=PROMPTS,
        )
        status, said, err = command(main, *words)
        print(f"{out} rank {rank}:", status, said if status else "", err, file=sys.stderr)
        sys.exit(status)

    return together(processes, work)


def sharded() -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


if __name__ == "__main__":
    base, photos, out = map(Path, sys.argv[1:])

    def full():
        return Full(text_encoder=True)

    train(base, photos, out / "two", 2, full(), prior=out / "prior")
    train(base, photos, out / "again", 2, full(), prior=out / "prior")
    train(base, photos, out / "one", 1, full(), prior=out / "prior")
    looks = (
        Preview(seeds=1, num_inference_steps=2),
        Probe(["a {subject} on the beach"], seeds=2, num_inference_steps=2, judges="sandbox"),
        ResumeState(every=1),
    )
    logger = CSVLogger(out / "sharded-log")
    train(
        base,
        photos,
        out / "sharded",
        2,
        full(),
        prior=out / "sharded-prior",
        strategy=sharded(),
        callbacks=looks,
        logger=logger,
    )
    train(base, photos, out / "lora-two", 2, LoRA(rank=2, dropout=0.2), callbacks=(Ahead(),))
    train(base, photos, out / "lora-one", 1, LoRA(rank=2, dropout=0.2))
    for name, (processes, batch_size) in BLENDS.items():
        blend(out / "one", out / "blends" / name, processes, batch_size)
    blend(out / "one", out / "few", 3, 2, "--seeds", 0, "--prompts", '["a sks mug", "sks"]')
