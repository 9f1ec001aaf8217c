"""The denoising loop against diffusers' own pipeline, and its noise."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler,
    PNDMScheduler, StableDiffusionPipeline, UniPCMultistepScheduler,
)

from dreamblend.models import load_backbone
from dreamblend.sampling import calls, classifier_free, initial_noise, sample

PROMPTS, SEEDS = ["a sks mug on the beach", "a red sks mug"], [3, 8]
DETERMINISTIC = (
    DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
)
RANDOM = (EulerAncestralDiscreteScheduler, DDPMScheduler)


@pytest.fixture(scope="module", params=["tiny_base", "tiny_v_base"])
def model(request):
    return load_backbone(str(request.getfixturevalue(request.param)))


def scheduled(model, kind: type):
    options = {"skip_prk_steps": True} if kind is PNDMScheduler else {}  # as in every Stable Diffusion
    model.scheduler = kind.from_config(model.scheduler.config, **options)
    return model


def pipeline(model) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=model.vae, text_encoder=model.text_encoders[0], tokenizer=model.tokenizer, unet=model.denoiser, scheduler=model.scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def predictor(model, scale: float = 4., prompts: list[str] = PROMPTS):
    return classifier_free(model, model.encode_prompts(prompts), model.encode_prompts([""] * len(prompts)), scale)


def draw(model, steps: int = 4, scale: float = 4., seeds: list[int] = SEEDS, prompts: list[str] = PROMPTS) -> torch.Tensor:
    return sample(predictor(model, scale, prompts), initial_noise(model.latent_shape, seeds), model.scheduler, steps, seeds=seeds)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-4 of the latents' own size."""
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("kind", DETERMINISTIC)
def test_latents_are_those_of_a_diffusers_pipeline(model, kind):
    expected = pipeline(scheduled(model, kind))(
        PROMPTS, num_inference_steps=4, guidance_scale=4., latents=initial_noise(model.latent_shape, SEEDS), output_type="latent"
    ).images
    assert_same(draw(model), expected)


@pytest.mark.parametrize("kind", [DDIMScheduler, *RANDOM])
def test_a_seed_is_a_generator_of_a_diffusers_pipeline(model, kind):
    """Initial noise and the noise that a scheduler adds come from one stream, which `manual_seed(seed)` begins."""
    sources = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = pipeline(scheduled(model, kind))(PROMPTS, num_inference_steps=4, guidance_scale=4., generator=sources, output_type="latent").images
    assert_same(draw(model), expected)


def test_no_guidance_is_the_prompts_own_prediction(model):
    scheduled(model, DDIMScheduler)
    expected = pipeline(model)(
        PROMPTS, num_inference_steps=3, guidance_scale=1., latents=initial_noise(model.latent_shape, SEEDS), output_type="latent"
    ).images
    assert_same(draw(model, steps=3, scale=1.), expected)


@pytest.mark.parametrize("scale", [1., 4.])
def test_guidance_runs_the_model_once_a_step(model, scale):
    scheduled(model, DDIMScheduler)
    batches = []
    hook = model.denoiser.register_forward_pre_hook(lambda m, args: batches.append(len(args[0])))
    draw(model, steps=3, scale=scale)
    hook.remove()
    assert batches == [2 if scale == 1 else 4] * 3


@pytest.mark.parametrize("kind", RANDOM)
def test_a_scheduler_that_adds_noise_draws_it_from_each_images_own_seed(model, kind):
    scheduled(model, kind)
    together = draw(model)
    torch.manual_seed(123)
    assert torch.equal(draw(model), together)
    for i in range(2):
        assert_same(draw(model, seeds=SEEDS[i : i + 1], prompts=PROMPTS[i : i + 1]), together[i : i + 1])


def test_sampling_leaves_the_scheduler_and_the_noise_as_they_were(model):
    scheduler = scheduled(model, EulerDiscreteScheduler).scheduler
    before, noise = dict(scheduler.__dict__), initial_noise(model.latent_shape, SEEDS)
    kept = noise.clone()
    first = sample(predictor(model), noise, scheduler, 3)
    assert torch.equal(noise, kept) and scheduler.__dict__.keys() == before.keys() and all(scheduler.__dict__[k] is v for k, v in before.items())
    assert torch.equal(sample(predictor(model), noise, scheduler, 3), first) and not first.requires_grad


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, HeunDiscreteScheduler])
def test_adjust_gets_the_samplers_own_latents_at_every_call_of_the_model(model, kind):
    scheduled(model, kind)
    adjusted, predicted = [], []

    def adjust(z, t, step, scheduler):
        adjusted.append((step, t.item(), scheduler.scale_model_input(z, t)))
        return z

    def predict(z, t, step):
        predicted.append((step, t.item(), z))
        return predictor(model)(z, t, step)

    found = sample(predict, initial_noise(model.latent_shape, SEEDS), model.scheduler, 4, adjust)
    assert len(predicted) == len(adjusted) == calls(model.scheduler, 4)
    for (step, t, z), (its_step, its_t, its_z), number in zip(adjusted, predicted, range(100)):
        assert step == its_step == number and t == its_t and torch.equal(z, its_z)
    assert torch.equal(found, draw(model))


def test_adjusted_latents_are_those_that_are_denoised(model):
    scheduled(model, DDIMScheduler)
    noise = initial_noise(model.latent_shape, SEEDS)
    moved = sample(predictor(model), noise, model.scheduler, 3, lambda z, t, step, scheduler: z + .5 if step == 0 else z)
    assert_same(moved, sample(predictor(model), noise + .5, model.scheduler, 3))


def test_calls_counts_how_often_a_scheduler_asks_the_model(model):
    expected = {DDIMScheduler: 5, DPMSolverMultistepScheduler: 5, PNDMScheduler: 6, HeunDiscreteScheduler: 9}
    for kind, count in expected.items():
        assert calls(scheduled(model, kind).scheduler, 5) == count


# ---------------------------------------------------------------------------------------------------------- noise
def test_noise_of_a_seed_is_that_of_its_generator_wherever_it_stands():
    noise = initial_noise((4, 8, 8), [7, 2**40, 7])
    assert noise.shape == (3, 4, 8, 8)
    for row, seed in zip(noise, (7, 2**40, 7)):
        assert torch.equal(row, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))[0])


def test_noise_neither_reads_nor_moves_the_global_stream():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    initial_noise((4, 8, 8), [1])
    assert torch.equal(torch.random.get_rng_state(), before)
