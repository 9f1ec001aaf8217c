"""One loop for every stage of the sandbox's recipe: seeded by (stage, step) alone, fed by worker
processes, with a progress bar, and continued where it was interrupted.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

_SAVED_EVERY = 60.0  # seconds

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """Where a stage runs: the folder of its state, its device, and the processes that draw its
    scenes.
    """

    scratch: Path
    device: str
    workers: int = 0


class _Steps(Dataset[Batch]):
    """The batch of each step, by its number."""

    def __init__(self, name: str, steps: int, batch: Callable[[int, Random], Batch]):
        self.name, self.steps, self.batch = name, steps, batch

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        return self.batch(step, Random(f"{self.name}/{step}"))


def pack(
    model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer, step: int
) -> dict[str, Tensor]:
    """Everything a stage needs to continue, as one flat dictionary of tensors."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"ema.{i}": p for i, p in enumerate(ema.shadow_params)}
    state |= {
        f"adam.{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()
    }
    return {k: v.detach().contiguous().clone() for k, v in state.items()} | {
        "step": torch.tensor(step)
    }


def unpack(
    state: dict[str, Tensor], model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer
) -> int:
    """Put such a state back; gives the step that it was of."""
    model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    for i, p in enumerate(ema.shadow_params):
        p.copy_(state[f"ema.{i}"])
    adam: dict[int, dict[str, Tensor]] = {}
    for k, v in state.items():
        if k.startswith("adam."):
            _, number, name = k.split(".")
            adam.setdefault(int(number), {})[name] = v
    optimizer.load_state_dict(
        {"state": adam, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    step = int(state["step"])
    ema.optimization_step = step
    return step


def fit(
    name: str,
    model: nn.Module,
    batch: Callable[[int, Random], Batch],
    loss: Callable[[Batch, torch.Generator], Tensor],
    steps: int,
    rate: float,
    run: Run,
) -> None:
    """Minimise `loss(batch(step, rng), generator)` over the model's parameters; leaves their
    running average in it. `batch` may run in another process; `generator` is of the device.

    AdamW, a short warm-up and a cosine to nearly zero; bf16 autocast where that is faster. The
    state is kept once a minute, so an interrupted stage goes on.
    """
    done, resume = run.scratch / f"{name}.safetensors", run.scratch / f"{name}.resume.safetensors"
    if done.exists():
        model.load_state_dict(load_file(done))
        return
    cuda = run.device != "cpu"
    if cuda:  # small models wait for launches: TF32 takes fewer of them than a cast to bf16
        torch.set_float32_matmul_precision("high")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-3, fused=True)

    def at(step):
        return rate * (
            min(1.0, (step + 1) / 100) * (0.5 + 0.5 * np.cos(np.pi * step / steps)) + 0.01
        )

    ema = EMAModel(parameters, decay=0.998, foreach=True)
    start = unpack(load_file(resume), model, ema, optimizer) if resume.exists() else 0
    options: dict[str, Any] = {"prefetch_factor": 4} if run.workers else {}
    loader = DataLoader(
        _Steps(name, steps, batch),
        batch_size=None,
        sampler=range(start, steps),
        num_workers=run.workers,
        pin_memory=cuda,
        **options,
    )
    bar = tqdm(loader, initial=start, total=steps, desc=name, mininterval=2)
    saved = time.monotonic()
    for step, some in enumerate(bar, start):
        for group in optimizer.param_groups:
            group["lr"] = at(step)
        key = zlib.crc32(f"{name}/{step}".encode())
        generator = torch.Generator(run.device).manual_seed(key)
        some = {k: v.to(run.device, non_blocking=True) for k, v in some.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=not cuda and bf16(run.device)):
            value = loss(some, generator)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
        if time.monotonic() - saved > _SAVED_EVERY and step + 1 < steps:
            save(pack(model, ema, optimizer, step + 1), resume)
            saved = time.monotonic()
    ema.copy_to(parameters)
    save({k: v.contiguous().clone() for k, v in model.state_dict().items()}, done)
    resume.unlink(missing_ok=True)


def bf16(device: str) -> bool:
    """Whether bf16 is faster than fp32. On a CPU only tile instructions make it so: AVX-512's own
    take twice fp32's time in a product of matrices, as measured.
    """
    return device != "cpu" or torch.cpu._is_amx_tile_supported()


def save(state: dict[str, Tensor], path: Path) -> None:
    """Write weights whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in state.items()}, temporary)
    os.replace(temporary, path)
