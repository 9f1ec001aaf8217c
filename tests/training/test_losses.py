"""Timesteps, losses and the last timestep's noise, against diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from tiny_runs import blend_words, command, fit, fit_words, step

from blend import main as blend
from dreamblend.blending.models import Models
from dreamblend.blending.pair import Pair
from dreamblend.errors import InputError
from dreamblend.models import load_backbone
from dreamblend.models.noise import TrainingNoise
from dreamblend.storage import snapshots
from dreamblend.training.losses import Loss
from dreamblend.training.module import Tuner
from dreamblend.training.timesteps import Timesteps
from dreamblend.tuning import LoRA
from train import main

SIGMA = torch.arange(1, 1001) / 1000
FLOW = TrainingNoise("flow_prediction", 1 - SIGMA, SIGMA, SIGMA * 1000)


def source() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(
    ("density", "options"),
    [
        ("uniform", {}),
        ("logit_normal", {"logit_mean": 0.5, "logit_std": 0.7}),
        ("logit_normal", {}),
        ("mode", {"mode_scale": 0.8}),
    ],
)
def test_the_timesteps_are_those_that_diffusers_draws(density, options):
    settings = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, **options}
    u = compute_density_for_timestep_sampling(density, 500, **settings, generator=source())
    theirs = FLOW.timesteps.flip(0)[(u * 1000).long()]  # as its training scripts look them up
    ours = FLOW.timestep(Timesteps(density, **options).draw(FLOW, 500, source()))
    assert torch.equal(ours, theirs)


def test_cosmap_is_drawn_by_the_density_that_diffusers_weighs_with():
    drawn = Timesteps("cosmap").draw(FLOW, 200_000, source())
    found = torch.histc(drawn.float(), 20, 0, 1000) / len(drawn) * 20
    middles = (torch.arange(20) + 0.5) / 20
    wanted = compute_loss_weighting_for_sd3("cosmap", middles)
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("density", [None, "uniform", "logit_normal", "mode", "cosmap"])
def test_a_range_holds_all_draws_and_is_reached_to_its_ends(density):
    drawn = Timesteps(density, range=(200, 210)).draw(FLOW, 5000, source())
    assert set(drawn.tolist()) == set(range(200, 210))
    plain = Timesteps().draw(FLOW, 50, source())
    assert torch.equal(plain, torch.randint(1000, (50,), generator=source()))


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr", None])
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber_losses_are_the_formulas_of_diffusers_script(kind, schedule):
    predicted, wanted = torch.randn(2, 3, 4, 5, 5).unbind()
    cumulative, t = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([10, 500, 990])
    ours = Loss(kind, 0.2, schedule)(
        predicted, wanted, cumulative.sqrt(), (1 - cumulative).sqrt(), t / 1000
    )
    for i in range(3):
        if schedule == "constant":
            c = 0.2
        elif schedule == "exponential":
            c = math.exp(math.log(0.2) / 1000 * t[i])
        else:
            sigmas = ((1.0 - cumulative[i]) / cumulative[i]) ** 0.5
            c = (1 - 0.2) / (1 + sigmas) ** 2 + 0.2
        root = torch.sqrt((predicted[i] - wanted[i]) ** 2 + c**2) - c
        loss = (2 * c * root if kind == "huber" else 2 * root).mean()
        torch.testing.assert_close(ours[i], loss)


def test_what_is_set_changes_the_weights_and_is_recorded(tiny_base, mug_photos, tmp_path):
    words = ["--model.timesteps.density", "logit_normal", "--model.timesteps.logit_mean", 0.5]
    words += ["--model.timesteps.range", "[100, 900]", "--model.loss.type", "huber"]
    status, _, err = command(main, *fit_words(tiny_base, mug_photos, tmp_path, *words))
    assert (status, err) == (0, "")
    settings = snapshots.read(step(tmp_path, 1)).about.settings
    timesteps = {"density": "logit_normal", "logit_mean": 0.5, "range": [100, 900]}
    assert settings["timesteps"] == timesteps and settings["loss"] == {"type": "huber"}
    assert not {"timesteps", "loss", "optimizer"} & Recorded(tiny_base, mug_photos, tmp_path)


class Recorded(set):
    """The names in the record of a plain run."""

    def __init__(self, base, photos, folder):
        fit(base, photos, folder / "plain", LoRA(rank=2), steps=[1])
        super().__init__(snapshots.read(step(folder / "plain", 1)).about.settings)


def test_the_last_timestep_is_noise_alone_in_training_and_in_drawing(
    tiny_v_base, mug_photos, tmp_path
):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    options = dict(steps=[1, 2], rescale_betas_zero_snr=True)
    module = fit(tiny_v_base, mug_photos, tmp_path, LoRA(rank=2), **options)
    betas = load_backbone(str(tiny_v_base)).scheduler.betas
    alphas = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    torch.testing.assert_close(module.noise.alpha, alphas.sqrt(), atol=1e-3, rtol=1e-3)
    assert module.noise.alpha[-1] < 1e-3 and module.noise.sigma[-1] == 1
    models = Models.load(Pair.find(tmp_path, "1", "2"), str(tiny_v_base))
    config = models.late.schedule(4).config
    assert config.rescale_betas_zero_snr and models.late.schedule(4).timesteps[0] == 999
    status, _, err = command(
        blend, *blend_words(tmp_path, tmp_path / "out", "--model.base", tiny_v_base)
    )
    assert status == 0, err


WRONG = {
    "a density": (lambda: Timesteps("square"), "density is 'square': it is one of uniform"),
    "a mean of none": (lambda: Timesteps(logit_mean=1.0), "logit_mean is of the density"),
    "a mode of another": (lambda: Timesteps("uniform", mode_scale=1.0), "mode_scale is of the"),
    "a deviation": (lambda: Timesteps("logit_normal", logit_std=0.0), "must be above zero"),
    "a range backwards": (lambda: Timesteps(range=(5, 5)), r"range is \[5, 5\]: it is a low"),
    "a range too far": (lambda: Timesteps(range=(0, 2000)).check(FLOW), "has 1000 timesteps"),
    "a loss": (lambda: Loss("l1"), "model.loss.type is 'l1': it is one of l2"),
    "a schedule": (lambda: Loss("huber", 0.1, "line"), "huber_schedule is 'line'"),
    "c of l2": (lambda: Loss(huber_c=0.1), "are of the losses huber and smooth_l1"),
    "c": (lambda: Loss("huber", 0.0), "huber_c is 0.0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case):
    make, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        make()


def test_zero_snr_needs_a_base_that_predicts_v(tiny_base, mug_photos, tmp_path):
    assert Tuner(str(tiny_base)).zero_snr is False
    with pytest.raises(InputError, match="is for a base that predicts v, .* predicts epsilon"):
        fit(tiny_base, mug_photos, tmp_path, LoRA(), rescale_betas_zero_snr=True)
