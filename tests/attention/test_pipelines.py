"""`record` on whole pipelines of diffusers: their family's sites, and the prompt's own rows."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from families import CALL, FAMILIES, draw, save_family

from dreamblend.attention import record
from dreamblend.models import load_backbone
from dreamblend.sampling import scaled

FEW = ("qwen_image", "z_image")  # two predictions, the prompt first; the README has a batch of two
EACH = [pytest.param(name, marks=[] if name in FEW else pytest.mark.heavy) for name in FAMILIES]


@pytest.mark.parametrize("name", EACH)
def test_the_prompts_maps_are_those_of_the_model_and_the_pipeline_stays_as_it_is(name, tmp_path):
    """Of the first step: noise and prompt are known there. What the denoiser sees is the
    prompt's own rows, whichever way the pipeline guides.
    """
    base = save_family(name, tmp_path)
    pipe, model = diffusers.DiffusionPipeline.from_pretrained(base), load_backbone(str(base))
    pipe.set_progress_bar_config(disable=True)
    prompt, denoiser = "a mug on the beach", getattr(pipe, model.denoiser_name)
    denoiser.train().requires_grad_()
    call = {"guidance_scale": 3.5} if name == "flux2" else {}  # as our own conditioning is told
    before = draw(pipe, name, [prompt], output_type="latent", **call)
    guided = model.predicts_twice(CALL.get(name, {}).get("guidance_scale", 4.0))
    own = guided or name == "qwen_image"
    steps: list[dict] = []

    def keep(*_):
        steps.append(dict(maps))
        return {}

    with record(pipe, size=(64, 64), conditional_only=own) as maps:
        call["callback" if name == "pixart_sigma" else "callback_on_step_end"] = keep
        after = draw(pipe, name, [prompt], output_type="latent", **call)
    assert torch.equal(before, after)
    assert denoiser.training and all(p.requires_grad for p in denoiser.parameters())
    assert "cache_context" not in vars(denoiser)
    size = model.latent_size(64, 64)
    sites = model.sites(model.default_grid(size), size)
    assert list(steps[0]) == list(sites)
    noise = torch.randn(
        (1, model.latent_shape[0], *size),
        generator=torch.Generator().manual_seed(sum(prompt.encode())),
    )
    schedule = model.schedule(2, size)
    z, t = noise * getattr(schedule, "init_noise_sigma", 1.0), schedule.timesteps[0]
    words = model.encode_prompts([prompt])
    with torch.no_grad(), record(model.denoiser, sites) as ours:
        model.denoise(scaled(schedule, z, t), t, words)
    for site, wanted in ours.items():
        count = min(wanted.shape[3], steps[0][site].shape[3])  # they may be padded apart
        assert steps[0][site].shape[0] == 1
        torch.testing.assert_close(
            steps[0][site][..., :count], wanted[..., :count], atol=1e-4, rtol=1e-3
        )


def test_a_module_alone_must_have_its_sites_named(tiny_base: Path):
    with pytest.raises(TypeError, match="only a pipeline knows"), record(torch.nn.Linear(1, 1)):
        pass
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    with record(pipe, ["mid_block.*"]) as maps:
        pipe("a mug", num_inference_steps=1)
    assert maps and all(site.startswith("mid_block") for site in maps)
