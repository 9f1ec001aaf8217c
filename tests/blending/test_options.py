"""The options of a drawing: each is what diffusers' own pipelines make of it, and is recorded where
it is set.
"""

from __future__ import annotations

import functools
import json

import diffusers
import pytest
import torch
from families import CALL, save_family
from test_blends import full_pair
from tiny_runs import blend_words, command, fit

from blend import main
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import CAG, Late, Merge, Region, Score, Switch
from dreamblend.blending.options import Options
from dreamblend.blending.pair import Models
from dreamblend.errors import InputError
from dreamblend.models import Backbone, load_backbone, schedulers
from dreamblend.report import write_report
from dreamblend.tuning import LoRA

PROMPTS = ["a photo of sks mug in the snow", "a red sks mug"]
SEEDS = [3, 8]
NEGATIVE = "blurry, a red house"
EXACT = dict(atol=1e-4, rtol=1e-4)
QUICK = ("sd", "sdxl", "sd3")
SLOW = ("qwen_image", "z_image", "sana", "pixart_sigma")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_base):
    root = tmp_path_factory.mktemp("families")
    return lambda name: tiny_base if name == "sd" else save_family(name, root)


@pytest.fixture(scope="module")
def load(folder):
    """A family's model and pipeline, by its name. The pipeline has the scheduler it came with."""

    @functools.cache
    def read(name: str) -> tuple[Backbone, diffusers.DiffusionPipeline]:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder(name))
        pipe.set_progress_bar_config(disable=True)
        return load_backbone(str(folder(name))), pipe

    def fresh(name: str) -> tuple[Backbone, diffusers.DiffusionPipeline]:
        model, pipe = read(name)
        return model.bind({}), type(pipe)(**pipe.components)

    return fresh


def size_of(name: str) -> int:
    return 32 if name == "sd" else 64


def plain(pipe, name: str, steps: int = 3, **call) -> torch.Tensor:
    """Images (batch, 3, height, width) in [0, 1], as the pipeline itself draws them."""
    call = {"guidance_scale": 4.0, **CALL.get(name, {}), **call}
    if name == "qwen_image":
        call["true_cfg_scale"] = call.pop("guidance_scale")
    return pipe(
        prompt=list(PROMPTS),
        height=size_of(name),
        width=size_of(name),
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
        **call,
    ).images


def ours(model: Backbone, name: str, options: Options, steps: int = 3, blend=Late()):
    """The same, as a blend of the model with itself draws them."""
    options.check(model, 4.0)
    options.apply(model)
    return pixels(batch_of(Models(model, model, model), name, options, steps), blend)


def batch_of(models: Models, name: str, options: Options, steps: int = 3) -> Batch:
    side = size_of(name)
    return Batch.of(
        models,
        list(zip(PROMPTS, SEEDS)),
        "sks",
        "mug",
        steps,
        4.0,
        size=(side, side),
        negative_prompt=options.negative_prompt,
        guidance_rescale=options.guidance_rescale,
    )


@torch.no_grad()
def pixels(batch: Batch, blend) -> torch.Tensor:
    images = batch.late.decode(blend.draw(batch).latents)
    return (images / 2 + 0.5).clamp(0, 1)


# ---------------------------------------------------------------------------------------- samplers
@pytest.mark.parametrize(
    "name, scheduler, kind, options",
    [
        ("sd", "euler", "EulerDiscreteScheduler", {}),
        ("sd", "euler-a", "EulerAncestralDiscreteScheduler", {}),
        ("sd", "heun-karras", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("sd", "dpm++-2m", "DPMSolverMultistepScheduler", {}),
        ("sd", "dpm++-2m-karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        (
            *("sd", "dpm++-sde", "DPMSolverSinglestepScheduler"),
            {"algorithm_type": "sde-dpmsolver++"},
        ),
        ("sdxl", "ddim", "DDIMScheduler", {"clip_sample": False}),
        ("sdxl", "unipc", "UniPCMultistepScheduler", {}),
        ("sd3", "heun", "FlowMatchHeunDiscreteScheduler", {}),
        (
            *("sd3", "unipc", "UniPCMultistepScheduler"),
            {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
        ),
        (
            *("sd3", "dpm++-2m", "DPMSolverMultistepScheduler"),
            {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
        ),
    ],
)
def test_a_sampler_by_name_draws_what_diffusers_draws_with_it(load, name, scheduler, kind, options):
    model, pipe = load(name)
    own = pipe.scheduler.config
    pipe.scheduler = getattr(diffusers, kind).from_config(own, **options)
    found = ours(model, name, Options(scheduler=scheduler))
    torch.testing.assert_close(found, plain(pipe, name), **EXACT)


@pytest.mark.parametrize("name", ["euler", "unipc", "dpm++-2m", "dpm++-sde"])
def test_a_flow_that_shifts_by_the_size_of_its_images_takes_other_samplers(load, name):
    model, _ = load("qwen_image")
    found = ours(model, "qwen_image", Options(scheduler=name))
    assert found.isfinite().all() and found.std() > 0.01


@pytest.mark.parametrize(
    "base, name, said",
    [
        ("sd3", "ddim", "is a flow: take one of euler, heun, dpm"),
        ("sd3", "dpm++-2m-karras", "is a flow"),
        ("qwen_image", "heun", "cannot shift"),
        ("sd", "lms", "needs SciPy"),
    ],
)
def test_a_sampler_that_a_base_cannot_take_is_refused(load, base, name, said):
    model, _ = load(base)
    if name == "lms":
        try:
            import scipy  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("SciPy is here")
    with pytest.raises(InputError, match=said):
        schedulers.named(name, model.scheduler, base)


def test_a_name_of_no_sampler_is_refused_with_those_that_there_are():
    with pytest.raises(InputError, match=r"'euler_a'.*euler, .*dpm\+\+-2m-karras"):
        Options(scheduler="euler_a")


# ------------------------------------------------------------------------------- negative, rescale
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.heavy) for name in SLOW)]
)
def test_a_negative_prompt_is_diffusers_own(load, name):
    model, pipe = load(name)
    found = ours(model, name, Options(negative_prompt=NEGATIVE))
    expected = plain(pipe, name, negative_prompt=[NEGATIVE] * len(PROMPTS))
    torch.testing.assert_close(found, expected, **EXACT)
    assert not torch.allclose(found, ours(model, name, Options()), atol=1e-3)


def test_a_negative_prompt_of_no_words_is_not_the_zeros_that_sdxl_takes_for_none(load):
    model, pipe = load("sdxl")
    found = ours(model, "sdxl", Options(negative_prompt=""))
    torch.testing.assert_close(found, plain(pipe, "sdxl", negative_prompt=["", ""]), **EXACT)
    assert not torch.allclose(found, ours(model, "sdxl", Options()), atol=1e-3)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_rescaled_guidance_is_diffusers_own(load, name):
    model, pipe = load(name)
    found = ours(model, name, Options(guidance_rescale=0.7))
    torch.testing.assert_close(found, plain(pipe, name, guidance_rescale=0.7), **EXACT)
    assert not torch.allclose(found, ours(model, name, Options()), atol=1e-3)


@pytest.mark.parametrize("blend", [Region(), CAG(), Score(), Switch(), Merge()])
@pytest.mark.parametrize(
    "options", [Options(negative_prompt=NEGATIVE), Options(guidance_rescale=1)]
)
def test_every_blend_takes_them(tiny_base, blend, options):
    models = full_pair(load_backbone(str(tiny_base)))
    with_it, without = (pixels(batch_of(models, "sd", o), blend) for o in (options, Options()))
    assert (with_it - without).abs().amax((1, 2, 3)).min() > 1e-3


def test_both_predictions_are_rescaled_before_score_mixes_them(tiny_base):
    """So at its ends it is one snapshot alone."""
    models = full_pair(load_backbone(str(tiny_base)))
    batch = batch_of(models, "sd", Options(guidance_rescale=0.8))
    torch.testing.assert_close(pixels(batch, Score(1.0)), pixels(batch, Late()), **EXACT)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(negative_prompt="blurry"), "model.negative_prompt"),
        (dict(guidance_rescale=0.5), "model.guidance_rescale"),
    ],
)
def test_what_has_no_effect_without_guidance_is_refused(load, options, said):
    model, _ = load("sd")
    with pytest.raises(InputError, match=rf"{said}.*guidance_scale is 1.0"):
        Options(**options).check(model, 1.0)
    distilled = model.bind({})
    distilled.distilled = True
    with pytest.raises(InputError, match=f"{said}.*distilled"):
        Options(**options).check(distilled, 4.0)


def test_a_share_of_rescaling_is_one():
    with pytest.raises(InputError, match="guidance_rescale is 1.5"):
        Options(guidance_rescale=1.5)


# -------------------------------------------------------------------------------- the command line
@pytest.fixture(scope="module")
def run(tiny_base, mug_photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    fit(tiny_base, mug_photos, out, LoRA(rank=4), steps=[1, 3], learning_rate=3e-2)
    return out


def drawn(run, out, *more) -> list[dict]:
    """The lines of results.jsonl that `predict` writes."""
    one = ("--seeds", 0, "--prompts", '["a sks mug"]', "--model.compare", "false")
    status, _, err = command(main, *blend_words(run, out, *one, *more, late=3))
    assert status == 0, err
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_what_is_set_is_recorded_and_nothing_else(run, tmp_path):
    (usual,) = drawn(run, tmp_path / "usual")
    options = {"negative_prompt": "blurry", "guidance_rescale": 0.5}
    words = [w for name, value in options.items() for w in (f"--model.{name}", value)]
    (other,) = drawn(run, tmp_path / "other", *words, "--model.scheduler", "euler")
    added = {k: v for k, v in other["settings"].items() if usual["settings"].get(k) != v}
    assert added.pop("scheduler").startswith("EulerDiscreteScheduler ")
    assert added == options
    assert not usual["settings"].keys() & options.keys()
    assert other["sha256"] != usual["sha256"]
    assert "negative_prompt" in write_report(tmp_path / "other").read_text()
