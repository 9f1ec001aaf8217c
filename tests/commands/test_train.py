"""Training: what moves and what does not, the same run twice, continued runs, class images, the
snapshot schedule, the entry point.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import save_tiny_base
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file
from tiny_runs import command, contents, fit, fit_words, predict, step

from dreamblend.callbacks import SnapshotCheckpoint
from dreamblend.callbacks.snapshots import log_spaced
from dreamblend.errors import InputError
from dreamblend.models import load_backbone
from dreamblend.storage import snapshots
from dreamblend.storage.photos import list_photos, load_photo, to_pixels
from dreamblend.training.class_images import draw_priors, missing_priors
from dreamblend.training.data import Draws, SubjectData
from dreamblend.training.module import Tuner
from dreamblend.training.seeding import generator
from dreamblend.tuning import Full, LoRA
from train import main

ROOT = Path(__file__).resolve().parents[2]
UNET = "unet/diffusion_pytorch_model.safetensors"


class Notes(L.Callback):
    """What happens at each optimizer step: rates, gradients, losses, weights."""

    def __init__(self):
        self.rates = []
        self.gradients = []
        self.norms = []
        self.losses = []
        self.weights = {}
        self.batches = 0

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.gradients.append(
            {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
        )

    def on_before_zero_grad(self, trainer, module, optimizer):  # after the step: what clipping left
        kept = [p.grad.norm() for p in module.parameters() if p.grad is not None]
        self.norms += [torch.stack(kept).norm().item()] if kept else []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches += 1
        self.losses.append(trainer.callback_metrics["loss"].item())
        self.weights[trainer.global_step] = {
            name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad
        }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -------------------------------------------------------------------------------------- determinism
@pytest.mark.parametrize("method", [Full, LoRA])
def test_the_same_seed_gives_the_same_snapshots_to_the_bit(tiny_base, mug_photos, tmp_path, method):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(tiny_base, mug_photos, tmp_path / name, method(), steps=[1, 2], seed=seed)
    a, b, c = (contents(tmp_path / name / "snapshots") for name in "abc")
    assert a == b
    weights = [name for name in a if name.endswith(".safetensors")]
    assert len(weights) == 2 and all(a[name] != c[name] for name in weights)


@pytest.mark.holds("train full", of="stable_diffusion")
def test_a_few_photos_are_learned(tiny_base, mug_photos, tmp_path):
    notes = Notes()
    fit(
        tiny_base,
        mug_photos,
        tmp_path,
        steps=[40],
        callbacks=(notes,),
        data={"batch_size": 4},
        learning_rate=1e-2,
    )
    first, last = torch.tensor(notes.losses[:10]).mean(), torch.tensor(notes.losses[-10:]).mean()
    assert last < 0.8 * first


# --------------------------------------------------------------------------------------- what moves
def parts(backbone) -> dict[str, dict[str, torch.Tensor]]:
    """Weights by part, under the names they have without adapters."""
    modules = {
        "denoiser": backbone.denoiser,
        "vae": backbone.vae,
        "text": backbone.parts()["text_encoder"],
    }
    return {
        part: {
            k.replace(".base_layer", ""): v.clone()
            for k, v in m.state_dict().items()
            if "lora_" not in k
        }
        for part, m in modules.items()
    }


@pytest.mark.parametrize(
    "tuning, moves",
    [
        (Full(), {"denoiser"}),
        (Full(text_encoder=True), {"denoiser", "text"}),
        (LoRA(), set()),
        (LoRA(text_encoder=True), set()),
    ],
    ids=["full", "full-text", "lora", "lora-text"],
)
def test_frozen_weights_do_not_move(tiny_base, mug_photos, tmp_path, tuning, moves):
    before = parts(load_backbone(str(tiny_base)))
    after = parts(fit(tiny_base, mug_photos, tmp_path, tuning, steps=[2]).backbone)
    assert {part for part in before if not same(before[part], after[part])} == moves


def test_the_text_encoder_has_its_own_rate(tiny_base, mug_photos, tmp_path):
    notes = Notes()
    fit(
        tiny_base,
        mug_photos,
        tmp_path / "a",
        Full(text_encoder=True),
        steps=[1],
        callbacks=(notes,),
        learning_rate=1e-3,
        text_encoder_learning_rate=1e-4,
    )
    assert notes.rates == [[1e-3, 1e-4]]
    before = parts(load_backbone(str(tiny_base)))["text"]
    still = fit(
        tiny_base,
        mug_photos,
        tmp_path / "b",
        Full(text_encoder=True),
        steps=[1],
        text_encoder_learning_rate=0.0,
    )
    assert same(before, parts(still.backbone)["text"])


# ------------------------------------------------------------------------------------- class images
def test_class_images_are_drawn_once_and_used(tiny_base, mug_photos, tmp_path):
    priors = dict(class_images_dir=tmp_path / "prior", num_class_images=3)
    fit(tiny_base, mug_photos, tmp_path / "a", steps=[2], data=priors)
    drawn = list_photos(tmp_path / "prior")
    assert [p.name for p in drawn] == ["00000.png", "00001.png", "00002.png"]
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in drawn}
    fit(tiny_base, mug_photos, tmp_path / "b", steps=[2], data=priors, prior_loss_weight=0.0)
    assert {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in list_photos(tmp_path / "prior")
    } == before
    assert not same(
        load_file(step(tmp_path / "a", 2) / UNET), load_file(step(tmp_path / "b", 2) / UNET)
    )  # the prior term counts


def test_class_images_are_drawn_by_the_untouched_base(tiny_base, mug_photos, tmp_path):
    fit(
        tiny_base,
        mug_photos,
        tmp_path / "a",
        LoRA(),
        steps=[1],
        data=dict(class_images_dir=tmp_path / "prior", num_class_images=2),
    )
    base = load_backbone(str(tiny_base))
    draw_priors(base, "a mug", missing_priors(tmp_path / "own", 2), base.fingerprint())
    for drawn, own in zip(
        list_photos(tmp_path / "prior"), list_photos(tmp_path / "own"), strict=True
    ):
        assert (
            to_pixels([load_photo(drawn, 32)]) - to_pixels([load_photo(own, 32)])
        ).abs().max() <= 2 / 127


def test_only_the_class_images_that_are_missing_are_drawn(tmp_path, mug_photos):
    """Also beside images with names of their own."""
    (tmp_path / "dog.png").write_bytes((mug_photos / "0.png").read_bytes())
    (tmp_path / "00001.png").write_bytes((mug_photos / "1.png").read_bytes())
    assert [p.name for p in missing_priors(tmp_path, 4)] == ["00000.png", "00002.png"]
    assert missing_priors(tmp_path, 2) == missing_priors(tmp_path, 1) == []


def test_a_prior_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/prior.*--data.class_images_dir"):
        missing_priors(tmp_path / "file/prior", 2)


# ------------------------------------------------------------------------------------------ latents
def test_a_flipped_latent_is_that_of_the_flipped_photo(tiny_base, mug_photos, tmp_path):
    module = fit(tiny_base, mug_photos, tmp_path, steps=[1], data={"flip": True})
    pixels = to_pixels([load_photo(p, 32) for p in list_photos(mug_photos)])
    parts = zip(*(photo[0] for photo in module.latents[False]))
    mean, deviation = (torch.stack(part, 1) for part in parts)
    assert mean.shape == deviation.shape == (2, len(pixels), 4, 8, 8)
    vae = module.backbone.vae
    with torch.no_grad():
        for row, view in enumerate((pixels, pixels.flip(-1))):
            posterior = vae.encode(view).latent_dist
            torch.testing.assert_close(mean[row], posterior.mean * vae.config.scaling_factor)
            torch.testing.assert_close(deviation[row], posterior.std * vae.config.scaling_factor)
    assert (mean[1] - mean[0].flip(-1)).abs().max() > 1e-3


def test_without_flip_nothing_is_flipped(tiny_base, mug_photos, tmp_path):
    assert fit(tiny_base, mug_photos, tmp_path, steps=[1]).latents[False][0][0][0].shape[0] == 1


# ----------------------------------------------------------------------------------------- settings
def test_accumulation_counts_optimizer_steps(tiny_base, mug_photos, tmp_path):
    notes = Notes()
    module = fit(
        tiny_base,
        mug_photos,
        tmp_path,
        steps=[1, 2, 3],
        callbacks=(notes,),
        trainer={"accumulate_grad_batches": 2},
    )
    assert (module.trainer.global_step, notes.batches, len(notes.rates)) == (3, 6, 3)
    assert [number for number, _ in snapshots.find(tmp_path)] == [1, 2, 3]
    for number in (1, 2, 3):  # each as it was right after its step
        held, now = load_file(step(tmp_path, number) / UNET), notes.weights[number]
        assert same(held, {k.removeprefix("trained.0."): v for k, v in now.items()})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_what_the_schedulers_own_functions_say(mug_photos, tmp_path, prediction):
    """The first loss of a run, again from diffusers' `add_noise` and `get_velocity`."""
    notes, base = Notes(), save_tiny_base(tmp_path / "base", prediction, seed=1)
    module = fit(
        base,
        mug_photos,
        tmp_path / "run",
        steps=[1],
        callbacks=(notes,),
        data={"batch_size": 4},
        learning_rate=1e-30,
    )
    source = generator(module.seed, "noise", 0, 0)
    z = module._latents(Draws(len(list_photos(mug_photos)), 0, 4, False, 0).at(0), source)
    noise, t = torch.randn(z.shape, generator=source), torch.randint(1000, (4,), generator=source)
    scheduler = module.backbone.scheduler
    wanted = scheduler.get_velocity(z, noise, t) if prediction == "v_prediction" else noise
    with torch.no_grad():
        predicted = module.backbone.denoise(
            scheduler.add_noise(z, noise, t), t, module.backbone.encode_prompts(["a sks mug"] * 4)
        )
    assert notes.losses == [
        pytest.approx(torch.nn.functional.mse_loss(predicted, wanted).item(), rel=1e-5)
    ]


def test_a_v_prediction_base_trains(tiny_v_base, mug_photos, tmp_path):
    notes = Notes()
    fit(tiny_v_base, mug_photos, tmp_path, steps=[2], callbacks=(notes,))
    assert torch.isfinite(torch.tensor(notes.losses)).all() and not same(
        notes.weights[1], notes.weights[2]
    )


# Adam's first steps do not feel a factor on the whole gradient, so there are several photos
@pytest.mark.parametrize(
    "setting",
    [
        {"min_snr_gamma": 5.0},
        {"noise_offset": 0.1},
        {"weight_decay": 0.5},
        {"gradient_checkpointing": False},
    ],
)
def test_settings_of_the_loss_change_the_result(tiny_base, mug_photos, tmp_path, setting):
    for name, more in (("plain", {}), ("set", setting)):
        fit(tiny_base, mug_photos, tmp_path / name, steps=[1], data={"batch_size": 4}, **more)
    equal = same(
        load_file(step(tmp_path / "plain", 1) / UNET), load_file(step(tmp_path / "set", 1) / UNET)
    )
    assert equal == (
        "gradient_checkpointing" in setting
    )  # the control: what it is by default changes nothing


@pytest.mark.parametrize(
    "tuning", [Full(text_encoder=True), LoRA(text_encoder=True)], ids=["full", "lora"]
)
def test_gradient_checkpointing_leaves_the_gradients(tiny_base, mug_photos, tmp_path, tuning):
    gradients = []
    for on in (False, True):
        notes = Notes()
        module = fit(
            tiny_base,
            mug_photos,
            tmp_path / str(on),
            tuning,
            steps=[1],
            callbacks=(notes,),
            gradient_checkpointing=on,
        )
        assert (
            module.backbone.denoiser.is_gradient_checkpointing
            == module.backbone.parts()["text_encoder"].is_gradient_checkpointing
            == on
        )
        gradients.append(notes.gradients[0])
    assert gradients[0].keys() == gradients[1].keys() and any(
        g.abs().max() > 1e-6 for k, g in gradients[0].items() if k.startswith("trained.1")
    )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "settings, shares",
    [
        (dict(), [1, 1, 1, 1]),
        (dict(lr_warmup_steps=2), [0.5, 1, 1, 1]),
        (dict(lr_warmup_steps=4), [0.25, 0.5, 0.75, 1]),
        (dict(lr_scheduler="linear"), [1, 0.75, 0.5, 0.25]),
        (dict(lr_scheduler="linear", lr_warmup_steps=2), [0.5, 1, 2 / 3, 1 / 3]),
        (dict(lr_scheduler="cosine"), [1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_the_rate_follows_its_schedule(tiny_base, mug_photos, tmp_path, settings, shares):
    notes = Notes()
    fit(
        tiny_base,
        mug_photos,
        tmp_path,
        LoRA(),
        steps=[4],
        callbacks=(notes,),
        learning_rate=1e-3,
        **settings,
    )
    assert [rate / 1e-3 for (rate,) in notes.rates] == pytest.approx(shares, abs=1e-6)


def test_a_schedule_needs_a_last_step(tiny_base, mug_photos, tmp_path):
    endless = L.Trainer(
        max_epochs=1,
        limit_train_batches=1,
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
    )
    with pytest.raises(InputError, match="cosine.*trainer.max_steps"):
        endless.fit(
            Tuner(str(tiny_base), lr_scheduler="cosine"), datamodule=SubjectData(mug_photos, "mug")
        )


def test_gradients_are_clipped(tiny_base, mug_photos, tmp_path):
    notes = Notes()
    fit(
        tiny_base,
        mug_photos,
        tmp_path,
        steps=[3],
        callbacks=(notes,),
        trainer={"gradient_clip_val": 1e-3},
    )
    assert len(notes.norms) >= 2 and all(
        norm == pytest.approx(1e-3, rel=1e-3) for norm in notes.norms
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions_train(tiny_base, mug_photos, tmp_path, precision):
    notes = Notes()
    fit(
        tiny_base,
        mug_photos,
        tmp_path,
        LoRA(),
        steps=[2],
        callbacks=(notes,),
        trainer={"precision": precision},
    )
    assert torch.isfinite(torch.tensor(notes.losses)).all() and not same(
        notes.weights[1], notes.weights[2]
    )


# ---------------------------------------------------------------------------------------------- EMA
def average(weights: list[dict], decay: float) -> dict:
    """The exponential moving average as its definition says: the first weights, then decay times
    itself plus the rest.
    """
    mean = weights[0]
    for now in weights[1:]:
        mean = {k: decay * mean[k] + (1 - decay) * now[k] for k in mean}
    return mean


@pytest.mark.parametrize("tuning", [Full(text_encoder=True), LoRA()], ids=["full-text", "lora"])
def test_snapshots_hold_the_averaged_weights(tiny_base, mug_photos, tmp_path, tuning):
    plain, watched = Notes(), Notes()
    fit(tiny_base, mug_photos, tmp_path / "plain", tuning, steps=[4], callbacks=(plain,))
    fit(
        tiny_base,
        mug_photos,
        tmp_path / "ema",
        tuning,
        steps=[2, 4],
        callbacks=(watched, EMAWeightAveraging(decay=0.5)),
    )
    assert all(
        same(plain.weights[k], watched.weights[k]) for k in range(1, 5)
    )  # training itself is as before
    for number in (2, 4):
        assert (
            snapshots.read(step(tmp_path / "ema", number))
            .about.settings["averaged"]
            .startswith("EMAWeightAveraging(decay=0.5, ")
        )
        held = {}
        for file in step(tmp_path / "ema", number).rglob("*.safetensors"):
            held |= {(file.parent.name, k): v for k, v in load_file(file).items()}
        wanted = average([watched.weights[k] for k in range(1, number + 1)], 0.5)
        assert len(held) == len(wanted)
        for (part, key), value in held.items():
            name = f"trained.{int(part == 'text_encoder')}." + key.removeprefix("unet.").replace(
                "lora_A.weight", "lora_A.tuned.weight"
            ).replace("lora_B.weight", "lora_B.tuned.weight")
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)


def test_before_averaging_begins_a_snapshot_holds_the_weights_in_training(
    tiny_base, mug_photos, tmp_path
):
    notes = Notes()
    fit(
        tiny_base,
        mug_photos,
        tmp_path,
        steps=[1, 3],
        callbacks=(notes, EMAWeightAveraging(decay=0.5, update_starting_at_step=2)),
    )
    assert same(
        load_file(step(tmp_path, 1) / UNET),
        {k.removeprefix("trained.0."): v for k, v in notes.weights[1].items()},
    )
    averaged = [snapshots.read(step(tmp_path, n)).about.settings["averaged"] for n in (1, 3)]
    assert averaged[0] is None and averaged[1].startswith("EMAWeightAveraging(decay=0.5, ")


# --------------------------------------------------------------------------------------- continuing
class Stop(L.Callback):
    """Ends a run as a crash would."""

    def __init__(self, at: int):
        self.at = at

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.at:
            raise RuntimeError("stopped")


@pytest.mark.parametrize(
    "tuning, model, trainer, ema",
    [
        (Full(), dict(lr_scheduler="cosine", lr_warmup_steps=2), {}, False),
        (LoRA(dropout=0.3), {}, dict(accumulate_grad_batches=2), False),
        (Full(text_encoder=True), {}, {}, True),
        (LoRA(text_encoder=True), {}, {}, True),
    ],
    ids=["full", "lora", "full-text-ema", "lora-text-ema"],
)
def test_a_continued_run_ends_as_the_uninterrupted_one_to_the_bit(
    tiny_base, mug_photos, tmp_path, tuning, model, trainer, ema
):
    def extra():
        return (EMAWeightAveraging(decay=0.5),) if ema else ()

    options = dict(steps=[2, 4, 6], trainer=trainer, **model)
    whole = fit(tiny_base, mug_photos, tmp_path / "whole", tuning, callbacks=extra(), **options)

    def keep():
        return ModelCheckpoint(
            tmp_path / "resume", filename="{step}", every_n_train_steps=3, save_top_k=-1
        )

    with pytest.raises(RuntimeError, match="stopped"):
        fit(
            tiny_base,
            mug_photos,
            tmp_path / "cut",
            tuning,
            callbacks=(*extra(), keep(), Stop(5)),
            **options,
        )
    early = contents(tmp_path / "cut" / "snapshots")
    assert [number for number, _ in snapshots.find(tmp_path / "cut")] == [2, 4]
    on = fit(
        tiny_base,
        mug_photos,
        tmp_path / "cut",
        tuning,
        callbacks=(*extra(), keep()),
        ckpt_path=tmp_path / "resume/step=3.ckpt",
        **options,
    )
    assert on.trainer.global_step == 6
    for module in (on, whole):
        module.trained.eval()  # without dropout
    assert torch.equal(predict(on.backbone), predict(whole.backbone))
    assert contents(tmp_path / "cut" / "snapshots") == contents(tmp_path / "whole" / "snapshots")
    assert early.items() <= contents(tmp_path / "cut" / "snapshots").items()


def test_the_resume_state_of_a_lora_holds_no_base(tiny_base, mug_photos, tmp_path):
    for name, callbacks in (("plain", ()), ("ema", (EMAWeightAveraging(),))):
        keep = ModelCheckpoint(tmp_path / name, filename="end", every_n_train_steps=1)
        fit(tiny_base, mug_photos, tmp_path / name, LoRA(), steps=[1], callbacks=(keep, *callbacks))
        state = torch.load(tmp_path / name / "end.ckpt", weights_only=True)
        for key in {"state_dict", "current_model_state"} & state.keys():
            assert state[key] and all("lora_" in k for k in state[key])


def test_a_continued_run_does_not_draw_class_images_with_tuned_weights(
    tiny_base, mug_photos, tmp_path
):
    keep = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=1)
    options = dict(
        data=dict(class_images_dir=tmp_path / "prior", num_class_images=2), callbacks=(keep,)
    )
    fit(tiny_base, mug_photos, tmp_path / "a", steps=[1], **options)
    (tmp_path / "prior/00001.png").unlink()
    with pytest.raises(InputError, match="prior lacks 1 of the class images"):
        fit(
            tiny_base,
            mug_photos,
            tmp_path / "a",
            steps=[2],
            ckpt_path=tmp_path / "end.ckpt",
            **options,
        )


# ---------------------------------------------------------------------------- the snapshot schedule
@pytest.mark.parametrize(
    "count, last",
    [(2, 400), (8, 400), (10, 20), (5, 5), (9, 4), (12, 100), (20, 1000), (30, 31), (3, 1)],
)
def test_log_spaced_keeps_first_and_last(count, last):
    steps = log_spaced(count, last)
    assert steps == sorted(set(steps)) and len(steps) == min(count, last)
    assert steps[0] == max(1, round(last / 100)) and steps[-1] == last
    gaps = [b - a for a, b in zip(steps, steps[1:])]
    assert all(b >= a - 1 for a, b in zip(gaps, gaps[1:]))  # they widen, but for rounding


def test_log_spaced_snapshots_are_kept(tiny_base, mug_photos, tmp_path):
    L.seed_everything(0, verbose=False)
    runner = dict(
        max_steps=6,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = SubjectData(mug_photos, "mug", batch_size=1)
    L.Trainer(callbacks=[SnapshotCheckpoint(log_spaced=3)], **runner).fit(
        Tuner(str(tiny_base), tuning=LoRA()), datamodule=data
    )
    assert [number for number, _ in snapshots.find(tmp_path)] == log_spaced(3, 6)


@pytest.mark.parametrize(
    "settings, say",
    [
        (dict(steps=[]), "steps are"),
        (dict(steps=[0, 4]), "steps are"),
        (dict(log_spaced=1), "log_spaced is 1"),
        (dict(steps=[1], dtype="fp8"), "dtype is 'fp8'"),
    ],
)
def test_wrong_schedules_are_refused(settings, say):
    with pytest.raises(InputError, match=say):
        SnapshotCheckpoint(**settings)


def test_steps_that_would_never_come_are_refused(tiny_base, mug_photos, tmp_path):
    with pytest.raises(
        InputError, match=r"steps \[9, 12\] would never be reached: trainer.max_steps is 4"
    ):
        fit(tiny_base, mug_photos, tmp_path, steps=[2, 12, 9], max_steps=4)
    assert not contents(tmp_path)


def test_a_folder_with_snapshots_of_another_or_a_finished_run_is_refused(
    tiny_base, mug_photos, tmp_path
):
    fit(tiny_base, mug_photos, tmp_path, LoRA(), steps=[1])
    before = contents(tmp_path)
    with pytest.raises(
        InputError, match=r"holds the snapshots of a finished run \(steps 1\): choose another --out"
    ):
        fit(tiny_base, mug_photos, tmp_path, LoRA(), steps=[1])
    for other in (
        {"seed": 1},
        {"learning_rate": 0.1},
        {"lr_scheduler": "cosine"},
    ):  # also at other steps: it would mix two runs
        with pytest.raises(
            InputError,
            match=(
                r"step-000001 is of a run with other settings \(.*: give the same settings, or"
                r" choose another --out"
            ),
        ):
            fit(tiny_base, mug_photos, tmp_path, LoRA(), steps=[2], **other)
    assert contents(tmp_path) == before


def test_a_run_that_goes_on_to_later_steps_keeps_its_snapshots(tiny_base, mug_photos, tmp_path):
    fit(tiny_base, mug_photos, tmp_path / "longer", LoRA(), steps=[1])
    before = contents(tmp_path / "longer")
    fit(tiny_base, mug_photos, tmp_path / "longer", LoRA(), steps=[2])
    fit(tiny_base, mug_photos, tmp_path / "at once", LoRA(), steps=[1, 2])
    assert contents(tmp_path / "longer").items() >= before.items()
    assert contents(tmp_path / "longer") == contents(tmp_path / "at once")


def test_what_a_killed_run_left_is_swept(tiny_base, mug_photos, tmp_path):
    (tmp_path / "snapshots/.step-000001.part-99/unet").mkdir(parents=True)
    fit(tiny_base, mug_photos, tmp_path, LoRA(), steps=[1])
    assert [p.name for p in (tmp_path / "snapshots").iterdir()] == ["step-000001"]


def test_a_snapshot_is_written_while_training_goes_on(tiny_base, mug_photos, tmp_path, monkeypatch):
    """The write of step 1 waits for step 3: this ends only if it runs beside the training."""
    reached, really, threads = threading.Event(), snapshots.write, []

    def slow(*args):
        threads.append(threading.current_thread().name)
        assert reached.wait(60)
        return really(*args)

    class Reach(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                reached.set()

    monkeypatch.setattr(snapshots, "write", slow)
    fit(tiny_base, mug_photos, tmp_path, steps=[1], max_steps=3, callbacks=(Reach(),))
    assert threads and threads[0].startswith("snapshot")
    assert snapshots.read(step(tmp_path, 1))  # joined before the run ends
    assert not [t for t in threading.enumerate() if t.name.startswith("snapshot")]


def test_an_error_of_the_thread_ends_the_run_and_earlier_snapshots_stay(
    tiny_base, mug_photos, tmp_path, monkeypatch
):
    import os

    rename = os.rename

    def full(source, target):
        if str(target).endswith("step-000002"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    class Wait(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            time.sleep(0.05)

    monkeypatch.setattr(os, "rename", full)
    notes = Notes()
    with pytest.raises(
        InputError, match="step-000002.*No space left.*earlier snapshots are intact"
    ):
        fit(tiny_base, mug_photos, tmp_path, LoRA(), steps=[1, 2, 100], callbacks=(notes, Wait()))
    assert notes.batches < 100  # at once, not at the next snapshot
    assert [p.name for p in (tmp_path / "snapshots").iterdir()] == [
        "step-000001"
    ] and snapshots.read(step(tmp_path, 1))


def test_a_crash_lets_the_write_that_was_begun_finish(tiny_base, mug_photos, tmp_path, monkeypatch):
    really = snapshots.write

    def slow(*args):
        time.sleep(0.5)
        return really(*args)

    monkeypatch.setattr(snapshots, "write", slow)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tiny_base, mug_photos, tmp_path, LoRA(), steps=[1], max_steps=4, callbacks=(Stop(2),))
    assert snapshots.read(step(tmp_path, 1)) and not [
        t for t in threading.enumerate() if t.name.startswith("snapshot")
    ]


# -------------------------------------------------------------------------------------- entry point


def test_the_command_trains_and_writes_its_settings_down(tiny_base, mug_photos, tmp_path):
    more = ["--seed_everything", 3, "--model.tuning", "LoRA", "--model.tuning.rank", 2]
    status, _, err = command(main, *fit_words(tiny_base, mug_photos, tmp_path, *more))
    assert (status, err) == (0, "")
    about = snapshots.read(step(tmp_path, 2)).about
    assert (about.method, about.seed, about.settings["tuning"]["rank"], about.base) == (
        "lora",
        3,
        2,
        str(tiny_base),
    )
    assert "rank: 2" in (tmp_path / "config.yaml").read_text()
    before = contents(tmp_path / "snapshots")
    status, _, err = command(
        main, *fit_words(tiny_base, mug_photos, tmp_path, "--model.tuning", "LoRA")
    )
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "resume.ckpt is of a run with other settings" in err
    status, _, err = command(main, *fit_words(tiny_base, mug_photos, tmp_path, *more))
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "is of step 2, and trainer.max_steps is 2: raise it" in err
    assert contents(tmp_path / "snapshots") == before


WRONG = {
    "photos": (["--data.instance_dir", "{tmp}/nowhere"], "{tmp}/nowhere does not exist"),
    "no images": (["--data.instance_dir", "{tmp}/empty"], "{tmp}/empty holds no images"),
    "out": (["--out", "{tmp}/file/run"], "{tmp}/file/run"),
    "base": (["--model.base", "{tmp}/nowhere"], "{tmp}/nowhere"),
    "base folder": (["--model.base", "{tmp}/empty"], "{tmp}/empty"),
    "rate": (["--model.learning_rate", "-1"], "model.learning_rate is -1"),
    "schedule": (["--model.lr_scheduler", "square"], "model.lr_scheduler is 'square'"),
    "prior": (["--data.num_class_images", "2"], "class_images_dir"),
    "prompt": (["--data.prompt", "a mug"], "prompt"),
    "steps": (["--snapshots.steps", "[1,50]"], "trainer.max_steps is 2"),
    "rank": (["--model.tuning", "LoRA", "--model.tuning.rank", "0"], "model.tuning.rank is 0"),
    "targets": (
        ["--model.tuning", "LoRA", "--model.tuning.targets", "[nothing]"],
        "model.tuning.targets",
    ),
    "no end": (["--trainer.max_steps", "-1"], "trainer.max_steps is not set"),
    "warmup": (["--model.lr_warmup_steps", "-1"], "model.lr_warmup_steps is -1"),
    "gamma": (["--model.min_snr_gamma", "0"], "model.min_snr_gamma is 0"),
    "dropout": (
        ["--model.tuning", "LoRA", "--model.tuning.dropout", "1.5"],
        "model.tuning.dropout is 1.5",
    ),
    "resume": (["--ckpt_path", "{tmp}/nowhere.ckpt"], "{tmp}/nowhere.ckpt"),
    "resume damaged": (["--ckpt_path", "{tmp}/damaged.ckpt"], "{tmp}/damaged.ckpt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_sentence_and_status_2(tiny_base, mug_photos, tmp_path, case):
    words, say = WRONG[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "damaged.ckpt").write_text("none")
    words = [w.format(tmp=tmp_path) for w in words]
    status, _, err = command(main, *fit_words(tiny_base, mug_photos, tmp_path / "run", *words))
    assert status == 2 and say.format(tmp=tmp_path) in err, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert not (tmp_path / "run/snapshots").exists() or not snapshots.listing(
        tmp_path / "run/snapshots"
    )


@pytest.mark.heavy
def test_a_wrong_input_in_its_own_process(tmp_path):
    """Nothing else on stderr: no traceback, no library's notices."""
    words = fit_words(tmp_path / "nowhere", tmp_path, tmp_path / "run")
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: base ")
        and done.stderr.count("\n") == 1
    ), done.stderr


def test_help_lists_the_main_options():
    status, out, _ = command(main, "--help")
    assert status == 0 and "fit" in out
    status, out, _ = command(main, "fit", "--help")
    assert status == 0
    options = (
        "out model.base model.learning_rate model.tuning data.instance_dir data.class_noun"
        " snapshots.steps ckpt_path trainer.max_steps"
    )
    for option in options.split():
        assert f"--{option}" in out, option


@pytest.mark.parametrize(
    "config", sorted((ROOT / "configs").glob("train*.yaml")), ids=lambda p: p.stem
)
def test_every_training_recipe_parses(config, mug_photos):
    status, out, err = command(
        main,
        "fit",
        "--config",
        config,
        "--data.instance_dir",
        mug_photos,
        "--data.class_noun",
        "mug",
        "--print_config",
    )
    assert status == 0 and "max_steps" in out, err
