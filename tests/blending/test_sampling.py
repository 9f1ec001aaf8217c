"""The denoising loop against diffusers' own pipeline, and its noise."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import CAG, Early, Late
from dreamblend.blending.models import Models
from dreamblend.models import load_backbone
from dreamblend.sampling import beginnings, classifier_free, initial_noise, sample

PROMPTS, SEEDS = ["a sks mug on the beach", "a red sks mug"], [3, 8]
DETERMINISTIC = (
    DDIMScheduler,
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
RANDOM = (EulerAncestralDiscreteScheduler, DDPMScheduler)


@pytest.fixture(scope="module", params=["tiny_base", "tiny_v_base"])
def model(request):
    return load_backbone(str(request.getfixturevalue(request.param)))


@pytest.fixture(scope="module")
def distilled(tiny_base, tmp_path_factory):
    folder = shutil.copytree(tiny_base, tmp_path_factory.mktemp("lcm") / "base")
    torch.manual_seed(2)
    UNet2DConditionModel.from_config(
        {**UNet2DConditionModel.load_config(folder / "unet"), "time_cond_proj_dim": 16}
    ).save_pretrained(folder / "unet")
    model = load_backbone(str(folder))
    model.scheduler = LCMScheduler.from_config(model.scheduler.config)
    return model


def scheduled(model, kind: type):
    options = (
        {"skip_prk_steps": True} if kind is PNDMScheduler else {}
    )  # as in every Stable Diffusion
    model.scheduler = kind.from_config(model.scheduler.config, **options)
    return model


def pipeline(model) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.parts()["text_encoder"],
        tokenizer=model.tokenizer,
        unet=model.denoiser,
        scheduler=model.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def predictor(model, scale: float = 4.0, prompts: list[str] = PROMPTS):
    return classifier_free(
        model, model.encode_prompts(prompts), model.encode_prompts([""] * len(prompts)), scale
    )


def draw(
    model,
    steps: int = 4,
    scale: float = 4.0,
    seeds: list[int] = SEEDS,
    prompts: list[str] = PROMPTS,
) -> torch.Tensor:
    return sample(
        predictor(model, scale, prompts),
        initial_noise(model.latent_shape, seeds),
        model.schedule(steps),
        seeds=seeds,
    )


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-4 of the latents' own size."""
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_latents_are_those_of_a_diffusers_pipeline(model, kind):
    expected = pipeline(scheduled(model, kind))(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=4.0,
        latents=initial_noise(model.latent_shape, SEEDS),
        output_type="latent",
    ).images
    assert_same(draw(model), expected)


@pytest.mark.parametrize("kind", [DDIMScheduler, *RANDOM])
def test_a_seed_is_a_generator_of_a_diffusers_pipeline(model, kind):
    """Initial noise and the noise that a scheduler adds come from one stream, which
    `manual_seed(seed)` begins.
    """
    sources = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = pipeline(scheduled(model, kind))(
        PROMPTS, num_inference_steps=4, guidance_scale=4.0, generator=sources, output_type="latent"
    ).images
    assert_same(draw(model), expected)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_no_guidance_is_the_prompts_own_prediction(model, scale):
    scheduled(model, DDIMScheduler)
    expected = pipeline(model)(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=scale,
        latents=initial_noise(model.latent_shape, SEEDS),
        output_type="latent",
    ).images
    assert_same(draw(model, steps=3, scale=scale), expected)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, 7.5])
def test_a_distilled_model_takes_the_scale_as_its_pipeline_gives_it(distilled, scale):
    """An LCM: one pass a step, with an embedding of the scale."""
    sources = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = pipeline(distilled)(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=scale,
        generator=sources,
        output_type="latent",
    ).images
    batches = []
    hook = distilled.denoiser.register_forward_pre_hook(
        lambda m, args: batches.append(len(args[0]))
    )
    found = draw(distilled, steps=3, scale=scale)
    hook.remove()
    assert_same(found, expected)
    assert batches == [2] * 3


def test_a_distilled_model_is_read_at_its_own_scale_and_guided(distilled):
    """Its batch has no halves: maps are of every sample, and CAG reads them with the scale that it
    draws with.
    """
    models = Models(distilled, distilled, distilled)
    batch = Batch.of(models, list(zip(PROMPTS, SEEDS)), "sks", "mug", 3, 7.5)
    with torch.no_grad():
        early = Early().draw(batch)
        assert early.maps.shape[0] == 2 and torch.equal(Late().draw(batch).latents, early.latents)
        found = CAG(1.0).draw(batch)
    assert (
        found.distance < 1e-9
    ).all()  # of one snapshot from itself: read otherwise than drawn, they would differ
    assert_same(found.latents, early.latents)


def test_a_distilled_model_without_a_word_of_guidance_predicts_as_at_scale_1(distilled):
    z, text = initial_noise(distilled.latent_shape, SEEDS), distilled.encode_prompts(PROMPTS)
    with torch.no_grad():
        plain, one, four = (
            distilled.denoise(z, torch.tensor(500), c)
            for c in (text, distilled.guided(text, 1.0), distilled.guided(text, 4.0))
        )
    assert torch.equal(plain, one) and not torch.allclose(one, four, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0])
def test_guidance_runs_the_model_once_a_step(model, scale):
    scheduled(model, DDIMScheduler)
    batches = []
    hook = model.denoiser.register_forward_pre_hook(lambda m, args: batches.append(len(args[0])))
    draw(model, steps=3, scale=scale)
    hook.remove()
    assert batches == [2 if scale <= 1 else 4] * 3


@pytest.mark.parametrize("kind", RANDOM)
def test_a_scheduler_that_adds_noise_draws_it_from_each_images_own_seed(model, kind):
    scheduled(model, kind)
    together = draw(model)
    torch.manual_seed(123)
    assert torch.equal(draw(model), together)
    for i in range(2):
        assert_same(
            draw(model, seeds=SEEDS[i : i + 1], prompts=PROMPTS[i : i + 1]), together[i : i + 1]
        )


def test_sampling_leaves_the_scheduler_and_the_noise_as_they_were(model):
    scheduler = scheduled(model, EulerDiscreteScheduler).scheduler
    before, noise = dict(scheduler.__dict__), initial_noise(model.latent_shape, SEEDS)
    kept = noise.clone()
    first = sample(predictor(model), noise, model.schedule(3))
    assert (
        torch.equal(noise, kept)
        and scheduler.__dict__.keys() == before.keys()
        and all(scheduler.__dict__[k] is v for k, v in before.items())
    )
    assert (
        torch.equal(sample(predictor(model), noise, model.schedule(3)), first)
        and not first.requires_grad
    )


@pytest.mark.parametrize(
    "kind, first",
    [
        (DDIMScheduler, [0, 1, 2, 3]),
        (EulerDiscreteScheduler, [0, 1, 2, 3]),
        (PNDMScheduler, [0, 2, 3, 4]),
        (HeunDiscreteScheduler, [0, 2, 4, 6]),
    ],
)
def test_adjust_gets_the_samplers_own_latents_at_the_calls_that_begin_a_step(model, kind, first):
    scheduled(model, kind)
    adjusted, predicted = [], []

    def adjust(z, t, step, scheduler):
        adjusted.append((step, t.item(), scheduler.scale_model_input(z, t)))
        return z

    def predict(z, t, step):
        predicted.append((step, t.item(), z))
        return predictor(model)(z, t, step)

    found = sample(predict, initial_noise(model.latent_shape, SEEDS), model.schedule(4), adjust)
    assert [step for step, *_ in predicted] == list(range(len(model.schedule(4).timesteps))) and [
        step for step, *_ in adjusted
    ] == first
    for step, t, z in adjusted:
        assert t == predicted[step][1] and torch.equal(z, predicted[step][2])
    assert torch.equal(found, draw(model))


KEEPING = (
    PNDMScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
)


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler, *KEEPING])
def test_no_move_of_adjust_is_lost(model, kind):
    """Whatever latents a scheduler keeps between calls, what is added to the latents comes out at
    the end, as it does in DDIM.
    """
    scheduled(model, kind)

    def zeros(z, t, step):
        return torch.zeros_like(z)

    noise, asked = initial_noise(model.latent_shape, SEEDS), []
    still = sample(
        zeros, noise, model.schedule(6), lambda z, t, step, _: asked.append(step) or z, seeds=SEEDS
    )
    for at in asked:
        moved = sample(
            zeros,
            noise,
            model.schedule(6),
            lambda z, t, step, _, at=at: z + 0.5 * (step == at),
            seeds=SEEDS,
        )
        assert ((moved - still).abs() > 0.01).all(), at


@pytest.mark.parametrize("options", [{}, {"skip_prk_steps": False}])
def test_what_is_added_before_any_other_call_is_lost(model, options):
    """So it would be read for nothing: PNDM goes on from the latents that it kept."""
    scheduled(model, PNDMScheduler)
    scheduler = PNDMScheduler.from_config(
        model.scheduler.config, prediction_type="epsilon", **options
    )
    scheduler.set_timesteps(6)
    first = beginnings(scheduler)
    for at in range(len(scheduler.timesteps)):
        ends = []
        for move in (0.0, 0.5):
            each, z = copy.deepcopy(scheduler), initial_noise(model.latent_shape, SEEDS)
            for i, t in enumerate(each.timesteps):
                z = z + move * (i == at)
                z = each.step(torch.zeros_like(z), t, z).prev_sample
            ends.append(z)
        assert torch.equal(*ends) == (at not in first), at


def test_adjusted_latents_are_those_that_are_denoised(model):
    scheduled(model, DDIMScheduler)
    noise = initial_noise(model.latent_shape, SEEDS)
    moved = sample(
        predictor(model),
        noise,
        model.schedule(3),
        lambda z, t, step, scheduler: z + 0.5 if step == 0 else z,
    )
    assert_same(moved, sample(predictor(model), noise + 0.5, model.schedule(3)))


def test_calls_counts_how_often_a_scheduler_asks_the_model(model):
    expected = {
        DDIMScheduler: 5,
        DPMSolverMultistepScheduler: 5,
        PNDMScheduler: 6,
        HeunDiscreteScheduler: 9,
    }
    for kind, count in expected.items():
        assert len(scheduled(model, kind).schedule(5).timesteps) == count


# -------------------------------------------------------------------------------------------- noise
def test_noise_of_a_seed_is_that_of_its_generator_wherever_it_stands():
    noise = initial_noise((4, 8, 8), [7, 2**40, 7])
    assert noise.shape == (3, 4, 8, 8)
    for row, seed in zip(noise, (7, 2**40, 7)):
        assert torch.equal(
            row, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))[0]
        )


def test_noise_neither_reads_nor_moves_the_global_stream():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    initial_noise((4, 8, 8), [1])
    assert torch.equal(torch.random.get_rng_state(), before)
