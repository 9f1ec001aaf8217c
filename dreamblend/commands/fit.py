"""`fit`: fine-tune a base on photos of a subject."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from dreamblend.callbacks.preview import Preview
from dreamblend.callbacks.probe import Probe
from dreamblend.callbacks.resume import NAME, ResumeState
from dreamblend.callbacks.snapshots import SnapshotCheckpoint
from dreamblend.commands import loggers
from dreamblend.commands.command import Command
from dreamblend.errors import InputError
from dreamblend.storage.files import check_writable
from dreamblend.trainer import callbacks
from dreamblend.training.data import SubjectData
from dreamblend.training.module import Tuner

CLIP = 1.0  # the longest gradient where nobody says, as in diffusers' scripts


class TrainCLI(Command):
    """The command line of `fit`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--out",
            type=Path,
            default=Path("runs/latest"),
            help="folder of this run: snapshots, previews, logs, resume state",
        )
        parser.add_argument(
            "--logger",
            type=str | None,
            default=None,
            help="where curves and images go: tensorboard, wandb, csv or none",
        )
        parser.add_argument(
            "--validation.prompts",
            type=list[str] | str | None,
            default=None,
            help="what Preview draws: prompts, or a file with one a line",
        )
        parser.add_argument(
            "--validation.every",
            type=int | None,
            default=None,
            help="optimizer steps between two drawings, beside those at snapshots",
        )
        parser.add_argument(
            "--validation.probe",
            type=bool,
            default=False,
            help="measure the trade-off at every snapshot, as curves (Probe)",
        )
        parser.add_lightning_class_args(SnapshotCheckpoint, "snapshots")
        parser.add_lightning_class_args(ResumeState, "resume")
        parser.set_defaults({"trainer.gradient_clip_val": CLIP})
        parser.link_arguments("out", "trainer.default_root_dir", compute_fn=str)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: in Lightning, a checkpoint's settings would override the command line."""

    def _instantiate_trainer(
        self, config: dict[str, Any], callbacks: list[L.Callback]
    ) -> L.Trainer:
        """Train in bf16 on a GPU that computes in it, unless the settings name a precision."""
        gpu = (
            config.get("accelerator") in (None, "auto", "gpu", "cuda")
            and CUDAAccelerator.is_available()
        )
        if (
            gpu
            and torch.cuda.is_bf16_supported(including_emulation=False)
            and config.get("precision") is None
            and not config.get("plugins")
        ):
            config["precision"] = "bf16-mixed"
        if (name := self._get(self.config_init, "logger")) is not None:
            if config.get("logger") is not None:
                raise InputError("--logger and --trainer.logger both say where to log: give one")
            config["logger"] = loggers.make(name, Path(self._get(self.config_init, "out")))
        config["callbacks"] = self._validating(config.get("callbacks"))
        return super()._instantiate_trainer(config, callbacks)

    def _validating(self, callbacks: L.Callback | list[L.Callback] | None) -> list[L.Callback]:
        """The callbacks with what `--validation` asks for: a Preview that is there takes its
        prompts; what is not there is added.
        """
        found = [callbacks] if isinstance(callbacks, L.Callback) else list(callbacks or [])
        asked = self._get(self.config_init, "validation")
        given = {k: v for k in ("prompts", "every") if (v := asked[k]) is not None}
        if given:
            there = next((c for c in found if isinstance(c, Preview)), None)
            if there is None:
                found.append(Preview(**given))
            else:
                checked = Preview(**given)
                for name in given:
                    setattr(there, name, getattr(checked, name))
        if asked["probe"] and not any(isinstance(c, Probe) for c in found):
            found.append(Probe())
        return found

    def before_fit(self) -> None:
        run = Path(self.trainer.default_root_dir)
        check_writable(run)
        for callback in callbacks(self.trainer):
            if isinstance(callback, SnapshotCheckpoint):
                callback.hold(self.trainer)  # before this run reads or writes in the folder
        given = self.config_init.fit
        if given.ckpt_path is None and (run / NAME).is_file():
            # weights_only: tensors and plain values are read, nothing that could run code
            given.ckpt_path, given.weights_only = str(run / NAME), True
        check_resume(given.ckpt_path)
        if self.trainer.max_steps < 1 and not self.config.fit.trainer.max_time:
            raise InputError(
                "trainer.max_steps is not set, and the photos never run out: set it, or"
                " trainer.max_time"
            )
        if self.trainer.accumulate_grad_batches < 1:
            raise InputError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}: it"
                " must be at least 1"
            )
        if self.trainer.limit_train_batches == 0:
            raise InputError("trainer.limit_train_batches is 0, which trains nothing: leave it out")
        if (clip := self.trainer.gradient_clip_val) is not None and clip < 0:
            raise InputError(f"trainer.gradient_clip_val is {clip}: it must be zero or above")
        self.datamodule.check()
        photos = [path.name for path in self.datamodule.photos]
        rank_zero_info(
            f"training on {len(photos)} photos:"
            f" {', '.join(photos[:10])}{' ...' * (len(photos) > 10)}"
        )


def check_resume(path: str | Path | None) -> None:
    """Raise InputError if there is no checkpoint to continue from. Lightning itself checks words
    (last, best, hpc) and folders.
    """
    if path is None or path in ("last", "best", "hpc") or Path(path).is_dir():
        return
    if not Path(path).is_file():
        raise InputError(
            f"--ckpt_path {path} does not exist: name the resume state of the run to continue"
        )
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"--ckpt_path {path} is damaged or no Lightning checkpoint: name another resume state"
        )


def main() -> None:
    """Run it."""
    TrainCLI(
        Tuner,
        SubjectData,
        seed_everything_default=0,
        save_config_callback=SaveConfigCallback,
        save_config_kwargs={"overwrite": True},  # a continued run writes the same file again
        parser_kwargs={"fit": {"default_env": False}},
    )
