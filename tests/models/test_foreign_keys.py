"""Each trainer's run of a tiny model of a family that it trains: its keys all act, and as much as
their numbers say.
"""

from __future__ import annotations

import foreign_runs
import pytest
import torch
from families import save_family
from foreign_runs import lora

from dreamblend.models import Backbone, load_backbone
from dreamblend.sampling import initial_noise
from dreamblend.storage.runs import open_run
from dreamblend.tuning import restore

# the trainer, the family, how it spells the family's layers
RUNS = [
    ("kohya", "sdxl", "kohya"),
    ("kohya", "flux_dev", "kohya"),
    ("musubi", "qwen_image", "kohya, diffusers' layers"),
    ("musubi", "z_image", "kohya, diffusers' layers"),
    ("musubi", "klein_base", "kohya"),
    ("ai_toolkit", "flux_dev", "diffusers"),
    ("ai_toolkit", "z_image", "comfyui, diffusers' layers"),
    ("ai_toolkit", "flux2", "comfyui"),
    ("one_trainer", "sdxl", "kohya, diffusers' layers"),
    ("one_trainer", "sdxl", "comfyui, alphas"),
    ("one_trainer", "flux_dev", "mixture"),
    ("one_trainer", "sd3", "original"),
    ("one_trainer", "z_image", "dotted"),
    ("simple_tuner", "sd3", "diffusers"),
    ("diffusion_pipe", "flux_dev", "diffusers"),
    ("diffusion_pipe", "sdxl", "kohya, diffusers' layers"),
    ("diffusion_pipe", "z_image", "comfyui"),
    ("diffusers_lora", "sana", "diffusers"),
]
FEW = [("diffusion_pipe", "z_image"), ("musubi", "qwen_image")]


@torch.no_grad()
def predicted(model: Backbone) -> torch.Tensor:
    z = initial_noise((model.latent_shape[0], *model.latent_size(64, 64)), [1])
    t = model.training_noise().timestep(torch.tensor([500]))
    return model.denoise(z, t, model.encode_prompts(["a photo of sks mug"]))


@pytest.mark.parametrize(
    "trainer, family, spelling",
    [pytest.param(*run, marks=[] if run[:2] in FEW else pytest.mark.heavy) for run in RUNS],
)
def test_the_checkpoints_of_a_run_act_in_their_order(
    trainer, family, spelling, tmp_path, mug_photos
):
    base = str(save_family(family, tmp_path))
    model = load_backbone(base)
    loras = [lora(model, spelling, strength) for strength in (0.0, 0.05, 0.2)]
    write = getattr(foreign_runs, trainer)
    known = {"base": base, **({} if trainer in ("kohya", "musubi") else {"photos": mug_photos})}
    if trainer == "diffusion_pipe":
        known["model"] = {"flux_dev": "flux"}.get(family, family)
    folder = write(tmp_path / "run", loras, **known)
    run = open_run(folder)
    in_parts = (trainer, family) == ("diffusion_pipe", "z_image")
    assert run.base == (None if in_parts else base) and len(run.snapshots) == 3
    plain, moved = predicted(model), []
    for snapshot in run.snapshots.values():
        view = restore(snapshot, model, "late", "sks")
        moved.append((predicted(view) - plain).abs().max().item())
        model.forget("late")
    assert moved[0] == pytest.approx(0, abs=1e-5) and moved[0] < moved[1] < moved[2]
