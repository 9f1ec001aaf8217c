"""Optimizers step as their libraries do, schedules are those of diffusers, clipping is usual."""

from __future__ import annotations

import importlib.util
import json
from contextlib import redirect_stdout
from io import StringIO

import lightning as L
import pytest
import torch
from conftest import save_tiny_base
from diffusers.optimization import get_scheduler
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file
from tiny_runs import command, contents, fit, fit_words, step

from dreamblend.callbacks import Preview, ResumeState, WeightEMA
from dreamblend.callbacks.averaging import averaged
from dreamblend.errors import InputError
from dreamblend.storage import snapshots
from dreamblend.training.module import Tuner
from dreamblend.training.optimizers import (
    Adafactor,
    AdamW,
    AdamW8bit,
    AdamWScheduleFree,
    Lion,
    Prodigy,
)
from dreamblend.tuning import Full, LoRA
from train import main

DECAY = 0.02


class Replay(L.Callback):
    """The same gradients to an optimizer of the library itself, on copies of the weights."""

    def __init__(self, make):
        self.make, self.groups = make, []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if not self.groups:
            self.groups = [
                {
                    "params": [p.detach().clone().requires_grad_() for p in group["params"]],
                    "lr": group["lr"],
                }
                for group in optimizer.param_groups
            ]
            with redirect_stdout(StringIO()):
                self.optimizer = self.make(self.groups)
        for mine, theirs in zip(self.optimizer.param_groups, optimizer.param_groups):
            for ours, p in zip(mine["params"], theirs["params"], strict=True):
                ours.grad = None if p.grad is None else p.grad.clone()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.optimizer.step()

    def on_train_end(self, trainer, module):
        for group, made in zip(trainer.optimizers[0].param_groups, self.groups, strict=True):
            assert all(map(torch.equal, group["params"], made["params"]))


def library(name: str, rate: float, **settings):
    """How its users make it."""

    def make(groups):
        if name == "AdamW":
            made = {"lr": rate, "weight_decay": DECAY, "fused": True, **settings}
            return torch.optim.AdamW(groups, **made)
        if name == "AdamW8bit":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(groups, lr=rate, weight_decay=DECAY, **settings)
        if name == "Adafactor":
            from transformers.optimization import Adafactor

            fixed = {"scale_parameter": False, "relative_step": False}
            return Adafactor(groups, lr=rate, weight_decay=DECAY, **fixed, **settings)
        if name == "Prodigy":
            import prodigyopt

            return prodigyopt.Prodigy(groups, lr=rate, weight_decay=DECAY, **settings)
        if name == "Lion":
            import lion_pytorch

            return lion_pytorch.Lion(groups, lr=rate, weight_decay=DECAY, **settings)
        import schedulefree

        made = schedulefree.AdamWScheduleFree(groups, lr=rate, weight_decay=DECAY, **settings)
        made.train()
        return made

    return make


BETAS = {"betas": (0.8, 0.95), "eps": 1e-6}
SAFE = {"use_bias_correction": True, "safeguard_warmup": True}
CHOICES = {
    "AdamW": (AdamW(**BETAS), 1e-3, BETAS),
    "AdamW8bit": (AdamW8bit(**BETAS), 1e-3, BETAS),
    "Adafactor": (Adafactor(beta1=0.5, decay_rate=-0.7), 1e-3, {"beta1": 0.5, "decay_rate": -0.7}),
    "Prodigy": (Prodigy(**BETAS, d_coef=2.0), 1.0, {**BETAS, **SAFE, "d_coef": 2.0}),
    "Lion": (Lion((0.8, 0.95)), 1e-4, {"betas": (0.8, 0.95)}),
    "AdamWScheduleFree": (AdamWScheduleFree(**BETAS), 1e-3, BETAS),
}


@pytest.mark.parametrize("name", CHOICES)
def test_an_optimizer_steps_as_its_library_with_settings_and_rates(
    name, tiny_base, mug_photos, tmp_path
):
    choice, rate, settings = CHOICES[name]
    if choice.package:
        pytest.importorskip(choice.package)
    more = {} if name == "Prodigy" else {"text_encoder_learning_rate": rate / 2}
    module = fit(
        tiny_base,
        mug_photos,
        tmp_path,
        Full(text_encoder=True),
        steps=[3],
        callbacks=(Replay(library(name, rate, **settings)),),
        learning_rate=rate,
        optimizer=choice,
        weight_decay=DECAY,
        **more,
    )
    recorded = snapshots.read(step(tmp_path, 3)).about.settings["optimizer"]
    assert recorded == {"name": name, **json.loads(json.dumps({**choice.settings}))}
    assert module.settings()["weight_decay"] == DECAY


def test_the_optimizer_is_chosen_on_the_command_line(tiny_base, mug_photos, tmp_path):
    words = ["--model.optimizer", "Prodigy", "--model.optimizer.d_coef", 0.5]
    status, out, err = command(main, *fit_words(tiny_base, mug_photos, tmp_path, *words))
    assert (status, err) == (0, "") and "decoupled" not in out
    settings = snapshots.read(step(tmp_path, 2)).about.settings
    assert settings["optimizer"]["d_coef"] == 0.5 and settings["learning_rate"] == 1
    assert settings["gradient_clip_val"] == 1.0  # where nobody says
    words = ["--model.optimizer", "AdamW", "--model.optimizer.betas", "[0.5, 0.9]"]
    other = fit_words(tiny_base, mug_photos, tmp_path, *words, "--trainer.max_steps", 3)
    status, _, err = command(main, *other)
    assert status == 2 and "optimizer {'name': 'Prodigy'" in err


def test_usual_rates_depend_on_the_optimizer(tiny_base):
    usual = Full().usual_rate("usual")
    rates = {
        type(o): Tuner(str(tiny_base), tuning=Full(), optimizer=o).learning_rate
        for o in (AdamW(), Lion(), Prodigy(), Adafactor())
    }
    assert rates == {AdamW: usual, Lion: usual / 10, Prodigy: 1.0, Adafactor: usual}


def test_plain_adamw_is_not_recorded_and_its_fused_form_makes_the_same_steps():
    assert AdamW().record == {} and AdamW(eps=1e-6).record["optimizer"]["eps"] == 1e-6
    torch.manual_seed(0)
    start, results = torch.randn(40, 30), []
    for fused in (False, True):
        p = torch.nn.Parameter(start.clone())
        made = AdamW().make([{"params": [p]}], 1e-2, 1e-2, fused=fused)
        assert bool(made.defaults["fused"]) is fused
        for _ in range(3):
            p.grad = p.detach() ** 2
            made.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


# ---------------------------------------------------------------------------- the schedule-free one
def test_snapshots_hold_the_evaluated_weights_and_training_does_not_notice(
    tiny_base, mug_photos, tmp_path
):
    class Look(L.Callback):
        def on_train_end(self, trainer, module):
            optimizer = trainer.optimizers[0]
            named = {n: p for n, p in module.backbone.denoiser.named_parameters()}
            self.training = {n: p.detach().clone() for n, p in named.items()}
            with averaged(trainer, module) as name:
                assert name == "AdamWScheduleFree"
                self.inside = {n: p.detach().clone() for n, p in named.items()}
            assert all(torch.equal(p, self.training[n]) for n, p in named.items())
            assert all(group["train_mode"] for group in optimizer.param_groups)
            optimizer.eval()  # as its users do
            self.evaluated = {n: p.detach().clone() for n, p in named.items()}
            optimizer.train()

    options = dict(learning_rate=1e-3, optimizer=AdamWScheduleFree())
    look = Look()
    preview = Preview(["a {subject}"], seeds=1, num_inference_steps=1)
    few = (WeightEMA(0.5), look)  # the average of an average rests
    fit(tiny_base, mug_photos, tmp_path / "few", steps=[3], callbacks=few, **options)
    more = (preview, ResumeState())
    fit(tiny_base, mug_photos, tmp_path / "many", steps=[1, 2, 3], callbacks=more, **options)
    saved = load_file(step(tmp_path / "few", 3) / "unet/diffusion_pytorch_model.safetensors")
    for name, value in look.evaluated.items():
        assert torch.equal(saved[name], value) and torch.equal(look.inside[name], value)
    assert any(not torch.equal(saved[n], value) for n, value in look.training.items())
    assert snapshots.read(step(tmp_path / "few", 3)).about.settings["averaged"] == (
        "AdamWScheduleFree"
    )
    last = [contents(step(tmp_path / run, 3)) for run in ("few", "many")]
    weights = [{k: v for k, v in files.items() if k.endswith("safetensors")} for files in last]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(Prodigy(), marks=pytest.mark.heavy),
        AdamWScheduleFree(),
        pytest.param(AdamW8bit(), marks=pytest.mark.heavy),
    ],
)
def test_an_interrupted_run_goes_on_with_the_optimizers_state(
    choice, tiny_base, mug_photos, tmp_path
):
    class Crash(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 3:
                raise ZeroDivisionError

    def train(out, *callbacks, state=None):
        fit(
            tiny_base,
            mug_photos,
            tmp_path / out,
            LoRA(rank=2),
            steps=[1, 4],
            callbacks=(*callbacks, ResumeState(every=2)),
            learning_rate=1.0 if choice.one_rate else 1e-2,
            optimizer=choice,
            ckpt_path=state,
        )

    train("whole")
    with pytest.raises(ZeroDivisionError):
        train("cut", Crash())
    train("cut", state=tmp_path / "cut" / "resume.ckpt")
    assert contents(tmp_path / "cut/snapshots") == contents(tmp_path / "whole/snapshots")


# ---------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine_with_restarts", {"lr_num_cycles": 2}),
        ("polynomial", {"lr_power": 2.0}),
        ("polynomial", {}),
    ],
)
def test_schedules_are_those_of_diffusers(name, options, tiny_base, mug_photos, tmp_path):
    class Rates(L.Callback, list):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.append(optimizer.param_groups[0]["lr"])

    rates = Rates()
    fit(
        tiny_base,
        mug_photos,
        tmp_path,
        LoRA(rank=2),
        steps=[6],
        callbacks=(rates,),
        learning_rate=1e-3,
        lr_scheduler=name,
        **options,
    )
    plain = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler(
        name,
        plain,
        num_warmup_steps=0,
        num_training_steps=6,
        num_cycles=options.get("lr_num_cycles", 1),
        power=options.get("lr_power", 1.0),
    )
    expected = []
    for _ in range(6):
        expected.append(schedule.get_last_lr()[0])
        plain.step()
        schedule.step()
    assert rates == expected and len(set(rates)) > 2
    settings = snapshots.read(step(tmp_path, 6)).about.settings
    assert {key: settings.get(key) for key in options} == options
    assert ("lr_power" in settings) == ("lr_power" in options)


# ------------------------------------------------------------------------------------ what is wrong
WRONG = {
    "a rate of its own": (
        dict(optimizer=Prodigy(), text_encoder_learning_rate=0.5),
        "Prodigy has one rate for all that trains",
    ),
    "a schedule without one": (
        dict(optimizer=AdamWScheduleFree(), lr_scheduler="cosine"),
        "AdamWScheduleFree has no schedule",
    ),
    "cycles of a line": (dict(lr_scheduler="linear", lr_num_cycles=2), "lr_num_cycles is of .*"),
    "a power of a cosine": (dict(lr_scheduler="cosine", lr_power=2.0), "model.lr_power is of"),
    "no restart": (dict(lr_scheduler="cosine_with_restarts"), "needs model.lr_num_cycles"),
    "a power of zero": (dict(lr_scheduler="polynomial", lr_power=0.0), "lr_power is 0.0: it must"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_said(case, tiny_base):
    options, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        Tuner(str(tiny_base), **options)


def test_wrong_settings_of_an_optimizer_are_said():
    for make, message in (
        (lambda: AdamW(betas=(0.9, 1.0)), r"betas is \[0.9, 1.0\]: each is a share"),
        (lambda: AdamW(eps=0.0), "eps is 0.0: it must be above zero"),
        (lambda: Prodigy(d_coef=-1.0), "d_coef is -1.0"),
        (lambda: Adafactor(beta1=1.0), "beta1 is 1.0"),
        (lambda: AdamWScheduleFree(betas=(0.0, 0.9)), "begin above zero"),
    ):
        with pytest.raises(InputError, match=message):
            make()


def test_a_package_that_is_missing_is_named(monkeypatch):
    for choice in (AdamW8bit, Prodigy, Lion, AdamWScheduleFree):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name: None)
            with pytest.raises(InputError, match=f"{choice.__name__} needs the package .*: pip"):
                choice()


def test_lightnings_averages_beside_its_own_are_refused(tiny_base, mug_photos, tmp_path):
    averages = (EMAWeightAveraging(decay=0.5),)
    with pytest.raises(InputError, match="leave EMAWeightAveraging out"):
        fit(
            tiny_base,
            mug_photos,
            tmp_path,
            optimizer=AdamWScheduleFree(),
            callbacks=averages,
        )


def test_a_run_from_before_clipping_was_usual_says_how_it_goes_on(mug_photos, tmp_path):
    base = save_tiny_base(tmp_path / "base")
    run = tmp_path / "run"
    fit(base, mug_photos, run, LoRA(rank=2), steps=[1, 2])
    asked = ["--model.tuning", "LoRA", "--model.tuning.rank", 2, "--model.learning_rate", 1e-2]
    words = fit_words(base, mug_photos, run, *asked, "--trainer.max_steps", 3)
    status, _, err = command(main, *words)
    assert status == 2 and "(--trainer.gradient_clip_val 0 does not clip)" in err
    status, _, err = command(main, *words, "--trainer.gradient_clip_val", 0)
    assert (status, err) == (0, "")


class Fused(AdamW):
    """As on a GPU."""

    def make(self, groups, rate, weight_decay, fused=False):
        return super().make(groups, rate, weight_decay, fused=True)


@pytest.mark.heavy
def test_gradients_are_clipped_as_lightning_clips_them(
    tiny_base, mug_photos, tmp_path, monkeypatch
):
    def weights(name: str, clip: dict, **settings) -> list[torch.Tensor]:
        trainer = {"accelerator": "cpu", **clip, **settings.pop("trainer", {})}
        module = fit(
            tiny_base, mug_photos, tmp_path / name, LoRA(rank=2), trainer=trainer, **settings
        )
        return [p.detach().clone() for p in module.in_training]

    norm = {"gradient_clip_val": 1e-3}
    value = {"gradient_clip_val": 1e-7, "gradient_clip_algorithm": "value"}
    ours = [weights(f"ours {i}", clip) for i, clip in enumerate((norm, value, {}))]
    # Lightning refuses these two together
    for i, clip in enumerate((norm, value)):
        weights(f"fused {i}", clip, optimizer=Fused(), trainer={"precision": "bf16-mixed"})
    monkeypatch.delattr(Tuner, "configure_gradient_clipping")
    theirs = [weights(f"theirs {i}", clip) for i, clip in enumerate((norm, value))]
    assert all(map(torch.equal, ours[0] + ours[1], theirs[0] + theirs[1]))
    assert not torch.equal(ours[0][0], ours[2][0]) and not torch.equal(ours[1][0], ours[2][0])
