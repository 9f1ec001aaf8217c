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
from test_blends import full_pair, lora_pair
from tiny_runs import blend_words, command, fit

from blend import main
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import (
    CAG,
    Early,
    Late,
    Masked,
    Merge,
    Personalization,
    Region,
    Reward,
    Score,
    Similarity,
    Switch,
)
from dreamblend.blending.models import Models
from dreamblend.blending.options import Options
from dreamblend.errors import InputError
from dreamblend.models import Backbone, load_backbone, schedulers
from dreamblend.report import write_report
from dreamblend.storage.snapshots import sha256
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
    models = Models(model, model, model)
    options.check(model, 4.0)
    options.apply(models)
    return pixels(batch_of(models, name, options, steps), blend)


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


@pytest.mark.parametrize(
    "blend",
    [
        Region(),
        CAG(),
        Score(),
        Switch(),
        Merge(),
        Personalization(),
        Reward(),
        Masked(),
        Similarity(),
    ],
)
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


# ---------------------------------------------------------------------- adapters, text, autoencoder
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_clip_skip_is_diffusers_own(load, name):
    """It is of the prompt alone, the negative one has all layers."""
    model, pipe = load(name)
    model.clip_layers = 2  # of tiny encoders
    # diffusers looks for the inner module that the encoder was in earlier versions of transformers
    vars(pipe.text_encoder).setdefault("text_model", pipe.text_encoder)
    found = ours(model, name, Options(clip_skip=1, negative_prompt=NEGATIVE))
    expected = plain(pipe, name, clip_skip=1, negative_prompt=[NEGATIVE] * len(PROMPTS))
    torch.testing.assert_close(found, expected, **EXACT)
    without = ours(model, name, Options(negative_prompt=NEGATIVE))
    assert not torch.allclose(found, without, atol=1e-3)


def test_clip_skip_of_no_clip_or_too_much_of_it_is_refused(load):
    for name, said in (("sd", "2 CLIP layers.*take fewer"), ("sd3", "no CLIP layers")):
        with pytest.raises(InputError, match=said):
            Options(clip_skip=5).check(load(name)[0], 4.0)


def other_vae(pipe, folder, amount: float = 0.05):
    """The pipeline's autoencoder with other weights, saved."""
    vae = type(pipe.vae).from_config(pipe.vae.config)
    source = torch.Generator().manual_seed(5)
    weights = {
        k: v + amount * torch.randn(v.shape, generator=source)
        for k, v in pipe.vae.state_dict().items()
    }
    vae.load_state_dict(weights)
    vae.save_pretrained(folder)
    return vae


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_another_autoencoder_is_the_one_that_decodes(load, name, tmp_path):
    model, pipe = load(name)
    usual = ours(model, name, Options())
    pipe.vae = other_vae(pipe, tmp_path).eval()
    found = ours(model, name, Options(vae=str(tmp_path)))
    torch.testing.assert_close(found, plain(pipe, name), **EXACT)
    assert not torch.allclose(found, usual, atol=1e-3)


def test_an_autoencoder_that_is_none_or_of_another_family_is_refused(load, folder, tmp_path):
    model, _ = load("sd")
    with pytest.raises(InputError, match=f"cannot load model.vae {tmp_path}"):
        ours(model, "sd", Options(vae=str(tmp_path)))
    with pytest.raises(InputError, match="16 channels.*base's have 4|8 channels.*base's have 4"):
        ours(model, "sd", Options(vae=str(folder("sd3"))))


def test_a_tiled_autoencoder_is_diffusers_own(load):
    model, pipe = load("sd")
    latents = torch.randn(1, 4, 24, 16, generator=torch.Generator().manual_seed(1))
    usual = model.decode(latents)
    Options(vae_tiling=True).apply(Models(model, model, model))
    pipe.vae.enable_tiling()
    expected = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    found = model.decode(latents)
    model.vae.disable_tiling(), pipe.vae.disable_tiling()
    torch.testing.assert_close(found, expected, **EXACT)
    assert found.shape == usual.shape and not torch.allclose(found, usual, atol=1e-3)


@pytest.mark.heavy
def test_strength_scales_the_adapters_of_each_snapshot(tiny_base):
    def pair(strength=None) -> Models:
        models = lora_pair(load_backbone(str(tiny_base)))
        Options(strength=strength).apply(models)
        return models

    def of(models: Models, blend) -> torch.Tensor:
        return pixels(batch_of(models, "sd", Options()), blend)

    base = load_backbone(str(tiny_base))
    alone = of(Models(base, base, base), Late())
    torch.testing.assert_close(of(pair(0.0), Late()), alone, **EXACT)
    torch.testing.assert_close(of(pair(1.0), Region()), of(pair(), Region()), **EXACT)
    only_late = pair((0.0, 1.0))
    torch.testing.assert_close(of(only_late, Early()), alone, **EXACT)
    torch.testing.assert_close(of(only_late, Late()), of(pair(), Late()), **EXACT)
    torch.testing.assert_close(of(only_late, Merge(0.5)), of(pair((9.0, 0.5)), Late()), **EXACT)
    assert not torch.allclose(of(pair(0.5), Late()), of(pair(), Late()), atol=1e-3)


def test_strength_of_full_weights_is_refused(tiny_base):
    with pytest.raises(InputError, match="model.strength"):
        Options(strength=0.5).apply(full_pair(load_backbone(str(tiny_base))))


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


def test_what_is_set_is_recorded_and_nothing_else(run, tiny_v_base, tmp_path):
    (usual,) = drawn(run, tmp_path / "usual")
    options = {"negative_prompt": "blurry", "guidance_rescale": 0.5, "strength": 0.8}
    options |= {"clip_skip": 1, "vae_tiling": True}
    words = [w for name, value in options.items() for w in (f"--model.{name}", value)]
    (other,) = drawn(
        run, tmp_path / "other", *words, "--model.scheduler", "euler", "--model.vae", tiny_v_base
    )
    added = {k: v for k, v in other["settings"].items() if usual["settings"].get(k) != v}
    assert added.pop("scheduler").startswith("EulerDiscreteScheduler ")
    assert len(added.pop("vae")) == 32  # a hash of its weights
    assert added == options
    assert not usual["settings"].keys() & options.keys()
    assert other["sha256"] != usual["sha256"]
    assert "negative_prompt" in write_report(tmp_path / "other").read_text()


def test_a_reference_is_recorded_by_its_content(run, mug_photos, tmp_path):
    (line,) = drawn(run, tmp_path, "--model.blend", "CAG", "--reference", mug_photos / "0.png")
    assert line["settings"]["reference"] == sha256(mug_photos / "0.png")
