"""What a run keeps and is: averages, the last step, frozen weights, draws over epochs, whose
snapshots and class images are there.
"""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import contents, fit, plain_pipeline, step
from torch import nn

from dreamblend.callbacks import Preview, Probe, ResumeState, WeightEMA
from dreamblend.callbacks.averaging import averaged
from dreamblend.callbacks.resume import NAME
from dreamblend.errors import InputError
from dreamblend.models import load_backbone
from dreamblend.storage import snapshots
from dreamblend.training.data import SubjectData
from dreamblend.training.optimizers import AdamW
from dreamblend.tuning import CustomDiffusion, Full, LoRA, TLoRA

UNET = "unet/diffusion_pytorch_model.safetensors"


class Weights(L.Callback):
    """The trained weights after each step, and how each step was drawn."""

    def __init__(self):
        self.at, self.draws = {}, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.draws.append(batch["draw"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.at[trainer.global_step] = [
            p.detach().clone() for p in module.trained.parameters() if p.requires_grad
        ]


class Crash(L.Callback):
    def __init__(self, at: int):
        self.at = at

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.at:
            raise ZeroDivisionError


class Stop(L.Callback):
    """Ends a run as a callback may."""

    def __init__(self, at: int):
        self.at = at

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.at


def kept(out) -> list[int]:
    return [number for number, _ in snapshots.listing(out / "snapshots")]


# ----------------------------------------------------------------------------------------- averages
class Steps:
    """As much of a trainer and its module as the average sees."""

    optimizer = AdamW()
    lightning_module = property(lambda self: self)

    def __init__(self, average: WeightEMA):
        self.trained = nn.ParameterList([nn.Parameter(torch.zeros(1))])
        self.in_training = list(self.trained)
        self.callbacks = [average]
        self.global_step = 0
        self.average = average

    def train(self, value: float) -> float:
        """One step that leaves the weight at `value`; the average after it."""
        self.trained[0].data.fill_(value)
        self.global_step += 1
        self.average.on_train_batch_end(self, self, None, None, 0)
        with averaged(self, self):
            return self.trained[0].item()


def test_the_base_has_no_share_in_an_average_and_the_first_trained_weights_soon_have_none():
    first = Steps(WeightEMA(0.97))
    shares = [first.train(1.0)] + [
        first.train(0.0) for _ in range(49)
    ]  # what the average holds of the first trained weights
    assert shares[0] == 1  # and of the base, before them, nothing
    assert all(shares[number - 1] < 0.01 for number in (10, 25, 50)), shares
    ages, steps = Steps(WeightEMA(0.97)), range(1, 400)
    mean = [number - ages.train(float(number)) for number in steps]
    assert [round(mean[number - 1], 3) for number in (1, 10, 50, 100)] == [0, 1, 5, 10] and mean[
        -1
    ] == pytest.approx(0.97 / 0.03, rel=0.01)


@pytest.mark.parametrize(
    "tuning",
    [Full(text_encoder=True), LoRA(rank=2), CustomDiffusion()],
    ids=["full", "lora", "custom"],
)
def test_snapshots_hold_the_average_of_what_trains_and_say_which(
    tiny_base, mug_photos, tmp_path, tuning
):
    seen, average = Weights(), WeightEMA(0.3)
    module = fit(
        tiny_base,
        mug_photos,
        tmp_path,
        tuning,
        steps=[1, 4],
        lr_warmup_steps=4,
        callbacks=(seen, average),
    )
    mean = seen.at[1]
    for n in range(1, 4):
        decay = min(0.3, (1 + n) / (10 + n))
        mean = [decay * a + (1 - decay) * b for a, b in zip(mean, seen.at[n + 1])]
    held = average.state_dict()["shadow_params"]
    assert sum(p.numel() for p in held) == sum(
        p.numel() for p in module.parameters() if p.requires_grad
    )  # nothing frozen is copied
    for a, b in zip(held, mean, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    written = {
        n: sorted(
            (
                v
                for f in step(tmp_path, n).rglob("*.safetensors")
                for v in load_file(f).values()
                if v.numel()
            ),
            key=order,
        )
        for n in (1, 4)
    }
    for n, wanted in ((1, seen.at[1]), (4, held)):
        same = [
            torch.equal(a, b) for a, b in zip(written[n], sorted(wanted, key=order), strict=True)
        ]
        assert all(same)
        assert (
            snapshots.read(step(tmp_path, n)).about.settings["averaged"] == "WeightEMA(decay=0.3)"
        )
    assert all(
        torch.equal(a, b)
        for a, b in zip(seen.at[4], (p for p in module.trained.parameters() if p.requires_grad))
    )  # training goes on with its own
    before = plain_pipeline(tiny_base).unet.state_dict()
    if isinstance(tuning, Full):  # the first step of the warm-up trains already
        assert any(
            not torch.equal(v, before[k]) for k, v in load_file(step(tmp_path, 1) / UNET).items()
        )


def order(tensor: torch.Tensor) -> tuple:
    return tuple(tensor.shape), tensor.double().sum().item(), tensor.double().square().sum().item()


# ---------------------------------------------------------------------------------------- last step
ENDS = {
    "max_steps": lambda: ((), dict(max_steps=7), 7),
    "asked to": lambda: ((Stop(5),), dict(max_steps=9), 5),
    "max_time": lambda: (
        (),
        dict(max_steps=10**6, trainer={"max_time": timedelta(seconds=1)}),
        None,
    ),
    "epochs": lambda: (
        (),
        dict(max_steps=99, trainer={"limit_train_batches": 2, "max_epochs": 3}),
        6,
    ),
    "early stopping": lambda: (
        (EarlyStopping("loss", patience=0, mode="min", divergence_threshold=0.0),),
        dict(max_steps=99, trainer={"limit_train_batches": 3}),
        3,
    ),
    "accumulated": lambda: (
        (Stop(4),),
        dict(max_steps=9, trainer={"accumulate_grad_batches": 2}),
        4,
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_last_step_is_kept_whatever_ends_a_run(end, tiny_base, mug_photos, tmp_path):
    more, options, last = ENDS[end]()
    seen, preview = Weights(), Preview(["a {subject}"], seeds=1, num_inference_steps=1)
    trainer = {**options.pop("trainer", {})}
    # an average of Lightning's that never begins would put the first weights back at the end
    callbacks = (
        seen,
        EMAWeightAveraging(update_starting_at_step=10**6),
        preview,
        *more,
        ResumeState(every=1),
    )
    fit(
        tiny_base,
        mug_photos,
        tmp_path,
        LoRA(rank=2),
        steps=[1],
        callbacks=callbacks,
        trainer=trainer,
        **options,
    )
    last = last or max(seen.at)
    assert kept(tmp_path) == sorted({1, last}) and (tmp_path / NAME).exists()
    assert [p.name for p in sorted((tmp_path / "previews").iterdir())] == [
        f"step-{n:06d}.png" for n in sorted({1, last})
    ]
    held = load_file(step(tmp_path, last) / "pytorch_lora_weights.safetensors").values()
    assert all(
        torch.equal(a, b)
        for a, b in zip(sorted(held, key=order), sorted(seen.at[last], key=order), strict=True)
    )


def test_a_state_beyond_the_last_step_is_refused_and_stays(tiny_base, mug_photos, tmp_path):
    with pytest.raises(ZeroDivisionError):
        fit(
            tiny_base,
            mug_photos,
            tmp_path,
            LoRA(rank=2),
            steps=[1],
            max_steps=9,
            callbacks=(Crash(4), ResumeState(every=3)),
        )
    with pytest.raises(InputError, match="is of step 3, and trainer.max_steps is 3: raise it"):
        fit(
            tiny_base,
            mug_photos,
            tmp_path,
            LoRA(rank=2),
            steps=[1],
            max_steps=3,
            callbacks=(ResumeState(),),
            ckpt_path=tmp_path / NAME,
        )
    assert (tmp_path / NAME).exists() and kept(tmp_path) == [1]


# ---------------------------------------------------------------------------------- same run or not
OTHERS = {
    "photos": "photos",
    "class images": "class_images",
    "data": "flip False and not True",
    "accumulated": "accumulate_grad_batches 1 and not 2",
    "clipped": "gradient_clip_val None and not 1.0",
    "precision": "precision 32-true and not bf16-mixed",
    "averaged": "averages",
    "word": "identifier sks and not ohwx",
}


def test_a_folder_takes_snapshots_of_one_run_alone(tiny_base, mug_photos, tmp_path):
    """With a resume state and without one, by one comparison."""
    photos, prior, out = (tmp_path / name for name in ("photos", "prior", "run"))
    for folder in (photos, prior):
        shutil.copytree(mug_photos, folder)

    def train(other: str = "", state: Path | None = None, callbacks: tuple = ()) -> None:
        data = {
            "flip": other == "data",
            "class_images_dir": prior,
            "num_class_images": 2,
            "identifier": "ohwx" if other == "word" else "sks",
        }
        trainer = {
            "accumulated": {"accumulate_grad_batches": 2},
            "clipped": {"gradient_clip_val": 1.0},
            "precision": {"precision": "bf16-mixed"},
        }.get(other, {})
        average = WeightEMA(0.5 if other == "averaged" else 0.9)
        callbacks = (average, *callbacks, ResumeState(every=1))
        fit(
            tiny_base,
            photos,
            out,
            LoRA(rank=2),
            steps=[1],
            max_steps=4,
            data=data,
            trainer=trainer,
            ckpt_path=state,
            callbacks=callbacks,
        )

    with pytest.raises(ZeroDivisionError):
        train(callbacks=(Crash(3),))
    before = contents(out)
    for i, (other, say) in enumerate(OTHERS.items()):
        changed = {"photos": photos, "class images": prior}.get(other)
        if changed:
            (changed / "0.png").rename(tmp_path / "0.png")
            shutil.copy(changed / "1.png", changed / "0.png")
        for state in (None, out / NAME)[: 1 + (i < 2)]:
            with pytest.raises(
                InputError, match="run with other settings .*choose another --out"
            ) as refused:
                train(other, state)
            assert say in str(refused.value) and contents(out) == before
        if changed:
            (tmp_path / "0.png").replace(changed / "0.png")
    train()
    assert kept(out) == [1, 4]


# ------------------------------------------------------------------------------------- class images
def test_class_images_of_another_class_or_base_are_refused_by_name_and_the_users_own_are_taken(
    tiny_base, tiny_v_base, mug_photos, tmp_path
):
    prior = tmp_path / "prior"
    prior.mkdir()
    shutil.copy(mug_photos / "0.png", prior / "mine.png")  # it says nothing of itself
    data = {"class_images_dir": prior, "num_class_images": 2}
    fit(tiny_base, mug_photos, tmp_path / "a", LoRA(rank=2), steps=[1], data=data)
    record = json.loads(Image.open(prior / "00000.png").text["dreamblend_class_image"])
    assert record["prompt"] == "a mug" and record["seed"] == 0 and record["base"] == str(tiny_base)
    assert record["num_inference_steps"] == 25 and record["guidance_scale"] == 5.0
    before = contents(prior)
    for base, more, say in (
        (tiny_base, {"class_prompt": "a dog"}, "for 'a mug'.*for 'a dog'"),
        (tiny_v_base, {}, f"drawn by {tiny_base} .*of {tiny_v_base} "),
    ):
        with pytest.raises(
            InputError,
            match=(
                f"00000.png was {'' if 'by' in say else '.*'}{say}.*choose another"
                " --data.class_images_dir"
            ),
        ):
            fit(base, mug_photos, tmp_path / "b", LoRA(rank=2), steps=[1], data={**data, **more})
    assert contents(prior) == before and not kept(tmp_path / "b")
    fit(tiny_base, mug_photos, tmp_path / "c", LoRA(rank=2), steps=[1], data=data)
    assert contents(prior) == before


@pytest.mark.parametrize("prior", [".", "class", "..", "../link"])
def test_class_images_and_photos_lie_apart(mug_photos, tmp_path, prior):
    photos = shutil.copytree(mug_photos, tmp_path / "photos")
    (tmp_path / "link").symlink_to(photos)
    with pytest.raises(InputError, match="must lie apart: choose another class_images_dir"):
        SubjectData(photos, "mug", class_images_dir=photos / prior, num_class_images=2).check()
    SubjectData(
        photos, "mug", class_images_dir=tmp_path / "photos-of-class", num_class_images=2
    ).check()


# ----------------------------------------------------------------------------------- frozen weights
@pytest.mark.parametrize(
    "tuning", [Full(), LoRA(rank=2, text_encoder=True, dora=True), TLoRA(rank=2), CustomDiffusion()]
)
def test_frozen_weights_are_small_and_the_rest_fp32(tiny_base, mug_photos, tmp_path, tuning):
    """Class images, previews and probes are drawn in it too; checkpointed, as large models are."""
    data = {"class_images_dir": tmp_path / "prior", "num_class_images": 2}
    looks = (
        Preview(seeds=1, num_inference_steps=2),
        Probe(["a {subject}"], num_inference_steps=1, judges="sandbox"),
    )
    seen, logger = Weights(), L.pytorch.loggers.CSVLogger(tmp_path)
    module = fit(
        tiny_base,
        mug_photos,
        tmp_path / "run",
        tuning,
        steps=[1, 2],
        data=data,
        callbacks=(seen, WeightEMA(), *looks),
        frozen_dtype="bf16",
        gradient_checkpointing=True,
        trainer={"precision": "bf16-mixed", "logger": logger},
    )
    backbone, base = module.backbone, plain_pipeline(tiny_base)
    assert all(
        p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
        for m in backbone.parts().values()
        for p in m.parameters()
    )
    assert all(p.dtype == torch.float32 for p in backbone.vae.parameters()) and all(
        p.dtype == torch.float32 for p in seen.at[1]
    )
    assert any(not torch.equal(a, b) for a, b in zip(seen.at[1], seen.at[2]))
    about = snapshots.read(step(tmp_path / "run", 2)).about
    assert (about.settings["frozen_dtype"], about.settings["precision"]) == ("bf16", "bf16-mixed")
    assert about.base_hash == load_backbone(str(tiny_base)).fingerprint()  # of the base as it is
    table = backbone.parts()["text_encoder"].get_input_embeddings().weight
    if not table.requires_grad:
        assert torch.equal(table, base.text_encoder.get_input_embeddings().weight.bfloat16())
    assert len(list((tmp_path / "run/previews").iterdir())) == 2


def test_frozen_weights_that_the_others_cannot_be_multiplied_with_are_refused(
    tiny_base, mug_photos, tmp_path
):
    for precision in ("32-true", "bf16-true"):
        with pytest.raises(
            InputError, match=f"model.frozen_dtype bf16 needs mixed precision.*it is {precision}"
        ):
            fit(
                tiny_base,
                mug_photos,
                tmp_path,
                LoRA(rank=2),
                steps=[1],
                frozen_dtype="bf16",
                trainer={"precision": precision},
            )
    with pytest.raises(InputError, match="model.frozen_dtype is 'fp8'"):
        fit(tiny_base, mug_photos, tmp_path, steps=[1], frozen_dtype="fp8")


# -------------------------------------------------------------------------------------- on the disk
def test_a_snapshot_keeps_every_entry_of_a_small_update(tiny_base, mug_photos, tmp_path):
    class Update(L.Callback):
        """Weights of scale 0.03 that move by 1e-4: what early snapshots are made of."""

        def on_train_batch_end(self, trainer, module, *_):
            source = torch.Generator().manual_seed(0)
            for name, p in module.backbone.denoiser.named_parameters():
                base[name] = 0.03 * torch.randn(p.shape, generator=source)
                p.data.copy_(base[name] + 1e-4 * torch.randn(p.shape, generator=source).sign())
                trained[name] = p.detach().clone()

    lost = {}
    for dtype in (None, "fp16", "bf16"):
        base, trained = {}, {}
        fit(
            tiny_base,
            mug_photos,
            tmp_path / str(dtype),
            steps=[1],
            callbacks=(Update(),),
            dtype=dtype,
        )
        stored = load_file(step(tmp_path / str(dtype), 1) / UNET)
        if dtype is None:  # as it is by default
            assert all(torch.equal(stored[k] - base[k], trained[k] - base[k]) for k in base)
        undone = torch.cat([(stored[k] == base[k].to(stored[k].dtype)).flatten() for k in base])
        lost[dtype] = undone.float().mean().item()
    assert (
        lost[None] == 0 and lost["fp16"] < 0.02 and lost["bf16"] == pytest.approx(0.25, abs=0.05)
    ), lost


# ------------------------------------------------------------------------------------------- epochs
EPOCHS = {
    "limited": {"limit_train_batches": 3},
    "reloaded": {"limit_train_batches": 2, "reload_dataloaders_every_n_epochs": 1},
    "validated": {"val_check_interval": 2},
    "accumulated unevenly": {"limit_train_batches": 3, "accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("case", EPOCHS)
def test_no_draw_comes_twice_whatever_begins_an_epoch_and_a_continued_run_sees_the_same(
    case, tiny_base, mug_photos, tmp_path
):
    whole, cut, options = Weights(), Weights(), dict(steps=[5], trainer=EPOCHS[case])
    fit(tiny_base, mug_photos, tmp_path / "whole", LoRA(rank=2), callbacks=(whole,), **options)
    assert len(set(whole.draws)) == len(whole.draws) >= 5
    if case != "accumulated unevenly":  # there an epoch's last step has fewer draws than others
        assert whole.draws == list(range(len(whole.draws)))
    for leg in (2, 3, None):  # within an epoch, and at its end
        state = tmp_path / "cut" / NAME
        stop = () if leg is None else (Crash(leg),)
        callbacks = (cut, ResumeState(every=1), *stop)
        try:
            fit(
                tiny_base,
                mug_photos,
                tmp_path / "cut",
                LoRA(rank=2),
                callbacks=callbacks,
                ckpt_path=state if state.exists() else None,
                **options,
            )
        except ZeroDivisionError:
            pass
    assert cut.at.keys() == whole.at.keys() and all(
        torch.equal(a, b) for k in whole.at for a, b in zip(whole.at[k], cut.at[k])
    )
    assert sorted(set(cut.draws)) == sorted(whole.draws)


def test_what_repeats_its_draws_is_refused(tiny_base, mug_photos, tmp_path):
    with pytest.raises(InputError, match="trainer.overfit_batches.*leave it out"):
        fit(
            tiny_base, mug_photos, tmp_path, LoRA(rank=2), steps=[2], trainer={"overfit_batches": 2}
        )
