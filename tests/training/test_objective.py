"""Noising, target and loss weights: against their definitions and diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from dreamblend.models.noise import noise_of
from dreamblend.training import objective

T = torch.tensor([0, 1, 250, 500, 900, 999])


def scheduler_of(prediction: str):
    if prediction == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction,
    )


@pytest.fixture(params=objective.PREDICTIONS)
def prediction(request) -> str:
    return request.param


@pytest.fixture
def levels(prediction) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma of the timesteps T, in double precision for exact inversion."""
    noise = noise_of(scheduler_of(prediction))
    name, alpha, sigma = noise.prediction, noise.alpha, noise.sigma
    assert name == prediction
    return alpha[T].double(), sigma[T].double()


@pytest.fixture
def z() -> torch.Tensor:
    return torch.randn(
        len(T), 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(
        len(T), 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def clean(
    prediction: str,
    noisy: torch.Tensor,
    said: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
) -> torch.Tensor:
    """The clean latents that a prediction means."""
    alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    if prediction == "epsilon":
        return (noisy - sigma * said) / alpha
    if prediction == "v_prediction":  # where alpha^2 + sigma^2 = 1
        return alpha * noisy - sigma * said
    return noisy - sigma * said


# ------------------------------------------------------------------------------------------ noising
def test_add_noise_is_the_schedulers_own(prediction, z, noise):
    scheduler = scheduler_of(prediction)
    levels = noise_of(scheduler)
    alpha, sigma = (level[T] for level in (levels.alpha, levels.sigma))
    found = objective.add_noise(z.float(), noise.float(), alpha, sigma)
    if prediction == "flow_prediction":
        expected = scheduler.scale_noise(
            z.float(), torch.stack([scheduler.timesteps[999 - t] for t in T]), noise.float()
        )  # they descend
    else:
        expected = scheduler.add_noise(z.float(), noise.float(), T)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_v_target_is_the_schedulers_own_velocity(z, noise):
    scheduler = scheduler_of("v_prediction")
    levels = noise_of(scheduler)
    alpha, sigma = (level[T] for level in (levels.alpha, levels.sigma))
    found = objective.target("v_prediction", z.float(), noise.float(), alpha, sigma)
    torch.testing.assert_close(
        found, scheduler.get_velocity(z.float(), noise.float(), T), atol=1e-6, rtol=1e-6
    )


def test_noise_is_a_function_of_its_generator():
    def draw(seed, offset):
        return objective.draw_noise(
            torch.Size((2, 4, 8, 8)), torch.Generator().manual_seed(seed), offset
        )

    assert torch.equal(draw(0, 0.1), draw(0, 0.1)) and not torch.equal(draw(0, 0.1), draw(1, 0.1))
    assert torch.equal(
        draw(0, 0.0), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    )


def test_noise_offset_shifts_each_channel_of_each_sample_by_a_constant():
    def draw(offset):
        return objective.draw_noise(
            torch.Size((2, 4, 8, 8)), torch.Generator().manual_seed(0), offset
        )

    shift = draw(0.1) - draw(0.0)
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift))
    assert len(shift.mean((2, 3)).flatten().unique()) == 8


# ------------------------------------------------------------------------------------------- target
def test_target_and_noisy_latents_give_the_clean_ones_back(prediction, levels, z, noise):
    noisy = objective.add_noise(z, noise, *levels)
    said = objective.target(prediction, z, noise, *levels)
    torch.testing.assert_close(clean(prediction, noisy, said, *levels), z, atol=1e-5, rtol=1e-5)


def test_flow_target_is_the_path_s_velocity(z, noise):
    def at(s):
        return objective.add_noise(z, noise, torch.full((len(T),), 1 - s), torch.full((len(T),), s))

    slope = (at(0.6) - at(0.5)) / 0.1
    torch.testing.assert_close(
        objective.target("flow_prediction", z, noise, torch.ones(1), torch.ones(1)),
        slope,
        atol=1e-5,
        rtol=1e-5,
    )


def test_an_unknown_prediction_type_is_named(z, noise):
    with pytest.raises(ValueError, match="'sample'.*epsilon"):
        objective.target("sample", z, noise, torch.ones(6), torch.ones(6))


# ------------------------------------------------------------------------------------------ weights
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_the_error_of_the_clean_latents_by_min_of_snr_and_gamma(
    prediction, levels, z, noise, gamma
):
    """The definition, whatever the denoiser predicts: weight x loss on the prediction = min(SNR,
    gamma) x loss on x0.
    """
    alpha, sigma = levels
    noisy = objective.add_noise(z, noise, alpha, sigma)
    wanted = objective.target(prediction, z, noise, alpha, sigma)
    said = wanted + 0.1 * torch.randn(
        z.shape, generator=torch.Generator().manual_seed(2), dtype=z.dtype
    )

    def mean(error):
        return (error**2).flatten(1).mean(1)

    weighted = objective.min_snr_weight(prediction, alpha, sigma, gamma) * mean(said - wanted)
    on_the_image = mean(clean(prediction, noisy, said, alpha, sigma) - z)
    snr = (alpha / sigma) ** 2
    torch.testing.assert_close(weighted, snr.clamp(max=gamma) * on_the_image, rtol=1e-4, atol=1e-12)


def test_min_snr_of_epsilon_is_one_in_the_noise_and_falls_near_the_image(levels):
    noise = noise_of(scheduler_of("epsilon"))
    alpha, sigma = (level[T].double() for level in (noise.alpha, noise.sigma))
    weight = objective.min_snr_weight("epsilon", alpha, sigma, 5.0)
    assert weight[-1] == 1 and (weight.diff() >= 0).all() and 0 < weight[0] < 0.01


def test_min_snr_weights_are_finite_at_both_ends(prediction):
    """The image itself (sigma 0), and pure noise (alpha 0: schedules of zero terminal SNR)."""
    weight = objective.min_snr_weight(
        prediction, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 5.0
    )
    assert weight.isfinite().all() and (weight >= 0).all()
    if prediction == "epsilon":
        assert weight[1] == 1  # min(SNR, gamma) / SNR at any SNR below gamma


# --------------------------------------------------------------------------------------------- loss
def test_sample_loss_is_one_number_a_sample_in_fp32():
    said = torch.tensor([[[[1.0, 3.0]]], [[[2.0, 2.0]]]]).bfloat16()
    wanted = torch.tensor([[[[0.0, 1.0]]], [[[2.0, 2.0]]]])
    loss = objective.sample_loss(said, wanted)
    assert loss.dtype == torch.float32 and loss.tolist() == [2.5, 0.0]
