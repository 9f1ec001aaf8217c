"""How long a command takes until it trains and until it has drawn, and what its imports take of
that.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import lightning as L

from benchmarks.cost.bases import ROOT
from benchmarks.cost.clock import shown, spread
from benchmarks.tables import markdown
from benchmarks.training import Recipe, Subject, tune
from dreamblend.errors import InputError
from dreamblend.models import SANDBOX
from dreamblend.tuning import LoRA

STAMP = "first-step"
COMMANDS = {"fit": "dreamblend.commands.fit", "predict": "dreamblend.commands.predict"}
LIBRARIES = (
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "peft",
    "torchmetrics",
    "jsonargparse",
)
PLAIN = """
import sys, torch
from diffusers import DiffusionPipeline
kept = {"safety_checker": None, "torch_dtype": torch.float32}  # the files' own are not all alike
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], **kept)
pipe(sys.argv[2], num_inference_steps=1, guidance_scale=4.0).images[0].save(sys.argv[3])
"""


class Stamp(L.Callback):
    """Writes a file in the run's folder after the first step of training."""

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            (Path(trainer.default_root_dir) / STAMP).touch()


def run(command: list[object], *options: str) -> subprocess.CompletedProcess[str]:
    """A Python command in a process of its own. Raises InputError where it fails."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, *options, *map(str, command)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = (done.stderr.strip() or "no word").splitlines()[-1]
        raise InputError(f"{' '.join(map(str, command[:3]))} failed: {said}")
    return done


def to_first_step(subject: Subject, out: Path) -> float:
    """From the start of `train.py fit` to the end of its first step."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.time()
    run(
        [
            *("train.py", "fit", "--config", "configs/train_lora.yaml"),
            *("--data.instance_dir", subject.photos, "--data.class_noun", subject.class_noun),
            *("--out", out, "--trainer.max_steps", 2, "--snapshots.steps", "[2]"),
            *("--trainer.callbacks", f"[{{class_path: {Stamp.__module__}.{Stamp.__name__}}}]"),
        ]
    )
    return (out / STAMP).stat().st_mtime - began


def to_first_image(pair: Path, subject: Subject, out: Path) -> float:
    """From the start of `blend.py predict` to its first image, of one denoising step."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.time()
    run(
        [
            *("blend.py", "predict", "--config", "configs/blend.yaml", "--run", pair),
            *("--early", 1, "--late", 2, "--seeds", "0", "--out", out),
            *("--prompts", f'["{subject.prompts[0]}"]', "--model.num_inference_steps", 1),
            *("--trainer.callbacks", "[dreamblend.callbacks.BlendWriter]"),
        ]
    )
    return min(path.stat().st_mtime for path in (out / "images").rglob("*.png")) - began


def to_plain_image(subject: Subject, out: Path) -> float:
    """From the start of Python to an image of the plain pipeline, of one denoising step."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    run([SANDBOX, subject.prompts[0], out / "plain.png"], "-c", PLAIN)
    return (out / "plain.png").stat().st_mtime - began


def measure(subject: Subject, rounds: int, out: Path) -> list[dict]:
    """A row for each command, all in turn; each once before that, so that files are in memory."""
    pair = tune(
        "sandbox", Recipe("lora", lambda: LoRA(rank=16), 1e-4), subject, [1, 2], out / "run"
    )
    runs: dict[str, Callable[[], float]] = {
        "train.py fit to the end of its first step": lambda: to_first_step(subject, out / "fit"),
        "blend.py predict to its first image": lambda: to_first_image(pair, subject, out / "blend"),
        "plain diffusers to its first image": lambda: to_plain_image(subject, out / "plain"),
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, once in runs.items():
            seconds = once()
            if number:
                found[name].append(seconds)
    return [{"name": name, "seconds": spread(each)} for name, each in found.items()]


def imports(module: str) -> dict[str, float]:
    """Seconds of a module's imports by `python -X importtime`: of all, and of those of each library
    in it (with what it imports first).
    """
    said = run([f"import {module}"], "-X", "importtime", "-c").stderr
    lines = re.findall(r"import time:\s*(\d+) \|\s*(\d+) \|( *)(\S+)", said)
    took = {name: int(total) / 1e6 for _, total, _, name in lines}
    return {"all": sum(int(own) for own, *_ in lines) / 1e6} | {
        name: took[name] for name in LIBRARIES if name in took
    }


def table(rows: list[dict], imported: dict[str, dict[str, float]]) -> str:
    """In Markdown, two of them."""
    starts = [
        {"from the start of the process": r["name"], "seconds": shown(r["seconds"])} for r in rows
    ]
    names = list(dict.fromkeys(name for each in imported.values() for name in each))
    of_modules = [
        {
            "imports of": module,
            **{name: f"{each[name]:.2f}" if name in each else "" for name in names},
        }
        for module, each in imported.items()
    ]
    return f"{markdown(starts)}\n\n{markdown(of_modules)}"
