"""What tests of several folders share: training runs of a few steps on tiny bases, what plain
diffusers predicts, and the command lines of train.py and blend.py.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from dreamblend.callbacks import SnapshotCheckpoint
from dreamblend.models import Backbone
from dreamblend.storage.snapshots import folder
from dreamblend.training.data import SubjectData
from dreamblend.training.module import Tuner
from dreamblend.tuning import Full, Method

PROMPTS = ["a sks mug", "a red cube in the snow"]  # that `predict` is asked for
BLENDED = ["a sks mug", "a sks mug on the beach"]  # that blends draw


def fit(
    base: Path,
    photos: Path,
    out: Path,
    tuning: Method | None = None,
    *,
    steps: list[int] = [2],
    max_steps: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    callbacks: tuple = (),
    data: dict | None = None,
    trainer: dict | None = None,
    ckpt_path: Path | None = None,
    learning_rate: float = 1e-2,
    **model,
) -> Tuner:
    """Train into `out`; the module as it is after the last step."""
    L.seed_everything(seed, verbose=False)
    module = Tuner(str(base), tuning=tuning or Full(), learning_rate=learning_rate, **model)
    runner = L.Trainer(
        default_root_dir=out,
        max_steps=max_steps or max(steps),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            SnapshotCheckpoint(list(steps), **({"dtype": dtype} if dtype else {})),
            *callbacks,
        ],
        **{"accelerator": "cpu", "logger": False, **(trainer or {})},
    )
    runner.fit(
        module,
        datamodule=SubjectData(
            photos, seed=seed, **{"class_noun": "mug", "batch_size": 1, **(data or {})}
        ),
        ckpt_path=ckpt_path,
    )
    return module


def step(out: Path, number: int) -> Path:
    return folder(out / "snapshots", number)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def probe(channels: int = 4, side: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(
        len(PROMPTS), channels, side, side, generator=torch.Generator().manual_seed(7)
    ), torch.tensor([10, 700])


@torch.no_grad()
def predict(backbone: Backbone) -> Tensor:
    """What a backbone predicts for fixed latents, steps and prompts."""
    return backbone.denoise(*probe(), backbone.encode_prompts(PROMPTS)).float()


@torch.no_grad()
def plain_predict(pipe) -> Tensor:
    """The same from the modules of a diffusers pipeline, with nothing of ours."""
    tokens = pipe.tokenizer(
        PROMPTS,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    return pipe.unet(*probe(), pipe.text_encoder(tokens)[0]).sample.float()


def plain_pipeline(base: Path):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(
        base, safety_checker=None, requires_safety_checker=False
    )


# ------------------------------------------------------------------------------------ command lines
QUIET = (
    "--trainer.accelerator",
    "cpu",
    "--trainer.logger",
    "false",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
)


def fit_words(
    base: Path, photos: Path, out: Path, *more: object, config: Path | None = None
) -> list[object]:
    """train.py's words: two steps of one photo each, both kept. Of a word that comes twice the
    later one counts.
    """
    return [
        "fit",
        *(("--config", config) if config else ()),
        "--model.base",
        base,
        "--data.instance_dir",
        photos,
        "--data.class_noun",
        "mug",
        "--data.batch_size",
        1,
        "--out",
        out,
        "--snapshots.steps",
        "[1,2]",
        "--trainer.max_steps",
        2,
        *QUIET,
        *more,
    ]


def blend_words(
    run: Path,
    out: Path,
    *more: object,
    late: int = 2,
    prompts: list[str] = BLENDED,
    config: Path | None = None,
) -> list[object]:
    """blend.py's words: step 1 and a later one, two seeds of each prompt, two denoising steps. Of a
    word that comes twice the later one counts.
    """
    return [
        "predict",
        *(("--config", config) if config else ()),
        "--run",
        run,
        "--early",
        1,
        "--late",
        late,
        "--prompts",
        json.dumps(prompts),
        "--seeds",
        "0-1",
        "--out",
        out,
        "--model.num_inference_steps",
        2,
        *QUIET,
        "--trainer.enable_checkpointing",
        "false",
        *more,
    ]


def command(main: Callable[[], None], *words: object) -> tuple[int, str, str]:
    """Run an entry point in this process: its exit status, and what it printed to stdout and
    stderr.
    """
    argv, handler, out, err = sys.argv, signal.getsignal(signal.SIGINT), StringIO(), StringIO()
    sys.argv = [main.__module__ + ".py", *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C from the first one on
    return status, out.getvalue(), err.getvalue()


def succeeding(main: Callable[[], None], *words: object) -> str:
    """Run an entry point in this process, which must end well: what it printed."""
    status, said, err = command(main, *words)
    assert status == 0, err
    return said


class Send(L.Callback):
    """A signal to this process while it trains on a batch."""

    def __init__(self, number: int, batch: int, times: int = 1):
        self.number, self.batch, self.times = number, batch, times

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.batch:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
                time.sleep(0.01)
