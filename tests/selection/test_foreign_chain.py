"""The run of each trainer through all that a user does with it: `select` picks its pair, `predict`
draws it, and `export` takes it away.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import foreign_runs
import numpy as np
import pytest
import single_files
import torch
from families import SMALL, save_family, small_bases
from foreign_runs import lora
from PIL import Image
from tiny_runs import QUIET, command, plain_pipeline, succeeding

from blend import main
from dreamblend import DreamBlendPipeline
from dreamblend.models import load_backbone
from dreamblend.storage.blend_folder import read_index
from dreamblend.storage.runs import open_run

STRENGTHS = (0.02, 0.3)  # of the early and the late checkpoint's LoRA
DRAWING = ("--seeds", 7, "--prompts", '["a picture of a {subject} on the moon"]')
FLAT = "kohya, diffusers' layers"
# trainer, family of its model, how it spells the family's layers, what its files do not say
CHAINS = [
    ("diffusers_full", "tiny", None, ()),
    ("diffusers_lora", "tiny", "diffusers", ()),
    ("kohya", "sdxl", "kohya", ("base", "photos")),
    ("musubi", "z_image", FLAT, ("base", "identifier", "class_noun", "photos")),
    ("ai_toolkit", "flux_dev", "diffusers", ()),
    ("one_trainer", "tiny", FLAT, ("identifier", "class_noun")),
    ("simple_tuner", "sd3", "diffusers", ()),
    ("diffusion_pipe", "sdxl", FLAT, ("identifier", "class_noun")),
]
FEW = ("one_trainer",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_base):
    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: tiny_base if name == "tiny" else save_family(name, root))


ran = functools.partial(succeeding, main)


def predicted(out: Path, *words: object) -> dict[str, np.ndarray]:
    """The images of a pair by their kind."""
    steps = ("--model.num_inference_steps", 2, "--model.guidance_scale", 4)
    ran("predict", "--out", out, *DRAWING, *steps, *QUIET, *words)
    found = {}
    for result in read_index(out):
        with Image.open(out / result.file) as image:
            found[result.kind] = np.asarray(image).astype(int)
    return found


def written(trainer: str, spelling: str | None, base: Path, photos: Path, out: Path) -> Path:
    """Two checkpoints of a trainer's run."""
    if spelling is None:
        pipe = plain_pipeline(base)
        return foreign_runs.diffusers_full(out, pipe, [10, 20], str(base), photos)
    model = load_backbone(str(base))
    loras = [lora(model, spelling, strength) for strength in STRENGTHS]
    if trainer in ("kohya", "musubi"):
        return getattr(foreign_runs, trainer)(out, loras, base="base.safetensors")
    more = {"model": base.name} if trainer == "diffusion_pipe" else {}
    return getattr(foreign_runs, trainer)(out, loras, str(base), photos, **more)


@pytest.mark.parametrize(
    "trainer, family, spelling, unsaid",
    [pytest.param(*chain, marks=[pytest.mark.heavy] * (chain[0] not in FEW)) for chain in CHAINS],
)
def test_the_run_of_a_trainer_goes_from_select_to_export(
    trainer, family, spelling, unsaid, folder, mug_photos, tmp_path
):
    """The photos are those of a subject that the late checkpoint has learned: what it draws."""
    base, photos = folder(family), tmp_path / "photos"
    shutil.copytree(mug_photos, photos)
    run = written(trainer, spelling, base, photos, tmp_path / "run")
    early, late = open_run(run).snapshots
    told = {"base": base, "identifier": "sks", "class_noun": "mug", "photos": photos}
    told = {name: told[name] for name in unsaid}
    of_model = [w for n in told if n != "photos" for w in (f"--model.{n}", told[n])]
    with small_bases():
        named = (*of_model, "--early", early, "--late", late)
        drawn = predicted(tmp_path / "named", "--run", run, *named)
        for photo in photos.iterdir():
            Image.fromarray(drawn["late"].astype(np.uint8)).save(photo)
        select = ("select", "--run", run, "--judges", "sandbox", "--num_inference_steps", 2)
        if told:
            status, _, err = command(main, *select)
            assert status == 2 and all(f"--{name}" in err for name in told)
        ran(*select, *DRAWING, *(w for n in told for w in (f"--{n}", told[n])))
        # what the files say, or select was told, is asked for no more
        again = predicted(tmp_path / "picked", "--run", run)
        assert again.keys() == {"early", "region", "late"}
        assert all(np.array_equal(image, drawn[kind]) for kind, image in again.items())
        form = "pipeline" if spelling is None else "diffusers"
        ran("export", "--run", run, "--form", form, "--out", tmp_path / "pair")
        pair = [w for n in ("early", "late") for w in (f"--{n}", tmp_path / "pair" / n)]
        config = ("--config", tmp_path / "pair" / "predict.yaml")
        exported = predicted(tmp_path / "exported", *config, *pair)
    picked = json.loads((open_run(run).results / "pair.json").read_text())
    assert (picked["early"], picked["late"]) == (early, late)
    assert drawn["late"].shape[:2] == (SMALL, SMALL) or family == "tiny"
    assert np.abs(drawn["late"] - drawn["early"]).max() > 8
    for kind, image in exported.items():
        assert np.abs(image - drawn[kind]).max() <= 1


@pytest.mark.heavy
def test_a_full_run_of_diffusion_pipe_is_drawn(folder, mug_photos, tmp_path):
    base, models = folder("sd3"), []
    model, generator = load_backbone(str(base)), torch.Generator().manual_seed(1)
    for _ in range(2):
        with torch.no_grad():
            for weight in model.denoiser.parameters():
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
        models.append({k: v.clone() for k, v in single_files.denoiser(model.denoiser).items()})
    wanted = model.pipe(
        "a picture of a sks mug on the moon",
        **{"height": SMALL, "width": SMALL, "num_inference_steps": 2, "guidance_scale": 4},
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    run = foreign_runs.diffusion_pipe(
        tmp_path / "run", models, str(base), mug_photos, "sd3", full=True
    )
    pair = ("--early", 1, "--late", 2, "--model.identifier", "sks", "--model.class_noun", "mug")
    with small_bases():
        drawn = predicted(tmp_path / "drawn", "--run", run, *pair)
    assert np.abs(drawn["late"] - np.asarray(wanted)).max() <= 2
    assert np.abs(drawn["late"] - drawn["early"]).max() > 8


def test_in_python_the_files_of_a_run_say_the_base(tiny_base, mug_photos, tmp_path):
    run = written("one_trainer", FLAT, tiny_base, mug_photos, tmp_path)
    early, late = open_run(run).snapshots
    pipe = DreamBlendPipeline.from_pretrained(
        run=run, early=early, late=late, identifier="sks", class_noun="mug"
    )
    assert pipe.models.base.base == str(tiny_base)
