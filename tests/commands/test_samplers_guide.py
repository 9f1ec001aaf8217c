"""The guide's command for samplers and other options runs as it stands, made small, and draws what
the pipeline draws with the same options.
"""

from __future__ import annotations

import shlex

import numpy as np
import torch
from PIL import Image
from test_readme import ROOT, lines_of
from tiny_runs import QUIET, command, fit

from blend import main
from dreamblend import DreamBlendPipeline
from dreamblend.tuning import LoRA

GUIDE = ROOT / "docs" / "guide.md"


def test_the_guides_command_draws_what_the_pipeline_draws(
    tiny_base, mug_photos, tmp_path, monkeypatch
):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    rate = {"steps": [1, 2], "learning_rate": 0.03}
    fit(tiny_base, mug_photos, tmp_path / "runs/mug", LoRA(rank=4), **rate)
    (line,) = [one for one in lines_of(GUIDE) if "--model.scheduler" in one]
    options = ["--model.clip_skip 1", "--model.vae_tiling true", '--model.strength "[1, 0.8]"']
    assert all(f"`{option}" in GUIDE.read_text() for option in options)  # which it names below
    small = "--early 1 --late 2 --prompts '[\"a {subject}\"]' --model.num_inference_steps 2"
    words = shlex.split(" ".join([line, small, "--model.compare false", *options]))[2:]
    status, _, said = command(main, *words, *QUIET)
    assert status == 0, said
    pipe = DreamBlendPipeline.from_pretrained(run="runs/mug", early=1, late=2)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = "dpm++-2m-karras"
    pipe.vae.enable_tiling()
    made = pipe(
        "a {subject}",
        num_inference_steps=2,
        guidance_scale=7.5,
        negative_prompt="blurry, text",
        guidance_rescale=0.7,
        clip_skip=1,
        cross_attention_kwargs={"scale": (1, 0.8)},
        num_images_per_prompt=4,
        generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
    )
    drawn = sorted((tmp_path / "runs/mug-karras").glob("images/*/*.png"))
    assert len(drawn) == 4
    for path, image in zip(drawn, made.images):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
