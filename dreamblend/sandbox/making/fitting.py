"""One loop for every stage of the sandbox's recipe: seeded by (stage, step) alone, with a progress
bar, and continued where it was interrupted.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm


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
    loss: Callable[[int, Random, torch.Generator], Tensor],
    steps: int,
    rate: float,
    scratch: Path,
    device: str,
    seed: int = 0,
) -> None:
    """Minimise `loss(step, rng, generator)` over the model's parameters; leaves their running
    average in it.

    AdamW, a short warm-up and a cosine to nearly zero; bf16 autocast where that is faster. The
    state is kept in `scratch` every 50 steps, so an interrupted stage goes on.
    """
    done, resume = scratch / f"{name}.safetensors", scratch / f"{name}.resume.safetensors"
    if done.exists():
        model.load_state_dict(load_file(done))
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-3)

    def at(step):
        return rate * (
            min(1.0, (step + 1) / 100) * (0.5 + 0.5 * np.cos(np.pi * step / steps)) + 0.01
        )

    ema = EMAModel(parameters, decay=0.998)
    start = unpack(load_file(resume), model, ema, optimizer) if resume.exists() else 0
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = at(step)
        key = zlib.crc32(f"{name}/{seed}/{step}".encode())
        with torch.autocast(device, torch.bfloat16, enabled=bf16(device)):
            value = loss(step, Random(key), torch.Generator().manual_seed(key))
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
        if (step + 1) % 50 == 0 and step + 1 < steps:
            save(pack(model, ema, optimizer, step + 1), resume)
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
