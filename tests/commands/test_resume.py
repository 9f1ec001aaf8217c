"""Interrupted by real signals and continued, a run ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from tiny_runs import Send, contents, fit, fit_words

import dreamblend.storage.snapshots
from dreamblend.callbacks import ResumeState, WeightEMA, resume
from dreamblend.callbacks.resume import NAME, STOPPED
from dreamblend.errors import InputError
from dreamblend.tuning import CustomDiffusion, Full, LoRA

ROOT = Path(__file__).resolve().parents[2]


def snapshots(run: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(run / "snapshots").items()}


CASES = {
    "full": (lambda: Full(text_encoder=True), lambda: (), {}),
    "lora with dropout, averaged": (
        lambda: LoRA(rank=2, dropout=0.2),
        lambda: (EMAWeightAveraging(decay=0.5),),
        {},
    ),
    "averaged, accumulated, with a schedule": (
        Full,
        lambda: (WeightEMA(decay=0.5),),
        {"trainer": {"accumulate_grad_batches": 2}, "lr_scheduler": "cosine"},
    ),
    "lora, averaged": (
        lambda: LoRA(rank=2),
        lambda: (WeightEMA(decay=0.5),),
        {"lr_warmup_steps": 3},
    ),
    "custom diffusion with class images": (
        CustomDiffusion,
        lambda: (),
        {"data": {"num_class_images": 3}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_by_a_signal_and_continued_it_ends_bit_for_bit_the_same(
    case, tiny_base, mug_photos, tmp_path
):
    tuning, extra, options = CASES[case]
    if "data" in options:
        options = {
            **options,
            "data": {
                **options["data"],
                "class_images_dir": copytree(mug_photos, tmp_path / "class"),
            },
        }

    def train(out: str, *callbacks, **more):
        return fit(
            tiny_base,
            mug_photos,
            tmp_path / out,
            tuning(),
            steps=[1, 3, 5],
            callbacks=(*extra(), *callbacks, ResumeState()),
            **options,
            **more,
        )

    train("whole")
    batch = 4 if "trainer" in options else 2  # accumulated: the first half of step 3
    with pytest.raises(SystemExit) as stop:
        train("cut", Send(signal.SIGUSR2, batch))
    assert stop.value.code == STOPPED and set(os.listdir(tmp_path / "cut/snapshots")) == {
        "step-000001",
        "step-000003",
    }
    before, state = snapshots(tmp_path / "cut"), tmp_path / "cut" / NAME
    assert (
        torch.load(state, weights_only=True)["global_step"] == 3
    )  # a whole step, and nothing that could run
    train("cut", ckpt_path=state)
    after = snapshots(tmp_path / "cut")
    assert (
        after == snapshots(tmp_path / "whole")
        and before.items() <= after.items()
        and torch.load(state, weights_only=True)["global_step"] == 5
    )


class Losses(list, L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.append(outputs["loss"].item())


def test_interrupted_at_every_step_it_goes_on_training(tiny_base, mug_photos, tmp_path):
    whole, cut, steps = Losses(), Losses(), [1, 2, 4]
    fit(
        tiny_base,
        mug_photos,
        tmp_path / "whole",
        LoRA(rank=2),
        steps=steps,
        lr_warmup_steps=3,
        callbacks=(whole,),
    )
    for leg in range(4):
        state = tmp_path / "cut" / NAME if leg else None
        stops = () if leg == 3 else (Send(signal.SIGTERM, leg),)
        with pytest.raises(SystemExit) if stops else nullcontext():
            callbacks = cut, *stops, ResumeState()
            fit(
                tiny_base,
                mug_photos,
                tmp_path / "cut",
                LoRA(rank=2),
                steps=steps,
                lr_warmup_steps=3,
                callbacks=callbacks,
                ckpt_path=state,
            )
    assert cut == whole and snapshots(tmp_path / "cut") == snapshots(tmp_path / "whole")
    weights = [
        data for name, data in snapshots(tmp_path / "cut").items() if name.endswith(".safetensors")
    ]
    assert len(set(weights)) == len(weights) == 3


def test_a_state_never_says_that_a_step_is_done_whose_snapshot_is_not(
    tiny_base, mug_photos, tmp_path, monkeypatch
):
    """As a run that goes on from it would leave that snapshot out."""
    write, there = dreamblend.storage.snapshots.write, []

    def slowly(*of):
        time.sleep(0.3)
        return write(*of)

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            there.append((tmp_path / NAME).exists() and len(os.listdir(tmp_path / "snapshots")))

    monkeypatch.setattr(dreamblend.storage.snapshots, "write", slowly)
    fit(
        tiny_base,
        mug_photos,
        tmp_path,
        LoRA(rank=2),
        steps=[1, 2, 3],
        callbacks=(ResumeState(every=1), Look()),
    )
    assert there == [False, 1, 2]


def test_a_state_is_kept_every_so_often_and_whole_or_not_at_all(
    tiny_base, mug_photos, tmp_path, monkeypatch
):
    with pytest.raises(ZeroDivisionError):  # whatever may happen
        fit(tiny_base, mug_photos, tmp_path, steps=[9], callbacks=(ResumeState(every=2), Fail(5)))
    assert torch.load(tmp_path / NAME, weights_only=True)["global_step"] == 4
    said = (tmp_path / NAME).read_bytes()

    def full(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    with pytest.raises(InputError, match="No space left.*go on"):
        fit(
            tiny_base,
            mug_photos,
            tmp_path,
            steps=[9],
            callbacks=(ResumeState(every=2),),
            ckpt_path=tmp_path / NAME,
        )
    assert (tmp_path / NAME).read_bytes() == said and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("took, steps", [(0, [2, 4, 6, 8, 10]), (2, [2, 9, 10])])
def test_a_state_is_kept_every_minute_or_so_rarely_that_it_takes_little(
    took, steps, tiny_base, mug_photos, tmp_path, monkeypatch
):
    now, kept = 0.0, []
    monkeypatch.setattr(resume, "time", SimpleNamespace(monotonic=lambda: now))
    write = resume.Straight.save_checkpoint

    def slowly(self, checkpoint, path, storage_options=None):
        nonlocal now
        now += took
        kept.append(checkpoint["global_step"])
        write(self, checkpoint, path, storage_options)

    class HalfAMinute(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            nonlocal now
            now += 30

    monkeypatch.setattr(resume.Straight, "save_checkpoint", slowly)
    watch = (HalfAMinute(), ResumeState())
    fit(tiny_base, mug_photos, tmp_path, LoRA(rank=2), steps=[10], callbacks=watch)
    assert kept == steps
    assert torch.load(tmp_path / NAME, weights_only=True)["global_step"] == 10


class Fail(L.Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise ZeroDivisionError


def test_ctrl_c_stops_with_its_own_status_and_a_second_one_at_once(tiny_base, mug_photos, tmp_path):
    with pytest.raises(SystemExit) as stop:
        fit(
            tiny_base,
            mug_photos,
            tmp_path / "once",
            steps=[3],
            callbacks=(Send(signal.SIGINT, 0), ResumeState()),
        )
    assert stop.value.code == 130 and (tmp_path / "once" / NAME).exists()
    with pytest.raises(SystemExit):  # Lightning's, of a KeyboardInterrupt
        fit(
            tiny_base,
            mug_photos,
            tmp_path / "twice",
            steps=[3],
            callbacks=(Send(signal.SIGINT, 0, times=2), ResumeState()),
        )
    assert not (tmp_path / "twice" / NAME).exists()
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


@pytest.fixture(scope="module")
def stopped(tiny_base, mug_photos, tmp_path_factory) -> tuple[Path, Path]:
    """A run that was stopped at step 2 of 3, and its photos."""
    folder = tmp_path_factory.mktemp("stopped")
    photos = Path(copytree(mug_photos, folder / "photos"))
    with pytest.raises(SystemExit):
        fit(
            tiny_base,
            photos,
            folder / "run",
            LoRA(rank=2),
            steps=[1, 3],
            callbacks=(Send(signal.SIGTERM, 1), ResumeState()),
        )
    return folder / "run", photos


@pytest.mark.parametrize(
    "other, say",
    [
        (dict(learning_rate=2e-2), "learning_rate 0.01 and not 0.02"),
        (dict(tuning=LoRA(rank=3)), "rank"),
        (dict(seed=1), "seed"),
        (dict(data={"batch_size": 2}), "batch_size"),
        (dict(lr_scheduler="cosine"), "lr_scheduler"),
        (dict(trainer={"accumulate_grad_batches": 2}), "accumulate_grad_batches"),
        (dict(photos=1), "photos"),
    ],
)
def test_what_would_be_another_run_is_refused(stopped, tiny_base, tmp_path, other, say):
    run, photos = (Path(copytree(p, tmp_path / p.name)) for p in stopped)
    if other.pop("photos", None):
        next(iter(sorted(photos.iterdir()))).unlink()
    before = contents(run)
    with pytest.raises(InputError, match="choose another --out") as refused:
        fit(
            tiny_base,
            photos,
            run,
            **{"tuning": LoRA(rank=2), **other},
            steps=[1, 3],
            callbacks=(ResumeState(),),
            ckpt_path=run / NAME,
        )
    assert say in str(refused.value)
    assert {k: v for k, v in contents(run).items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


def test_a_run_that_was_killed_before_its_first_state_begins_again_and_keeps_its_snapshots(
    tiny_base, mug_photos, tmp_path
):
    fit(tiny_base, mug_photos, tmp_path / "whole", steps=[1, 2, 3])
    with pytest.raises(ZeroDivisionError):
        fit(tiny_base, mug_photos, tmp_path / "cut", steps=[1, 2, 3], callbacks=(Fail(2),))
    before = snapshots(tmp_path / "cut")
    with pytest.raises(InputError, match="other settings"):
        fit(tiny_base, mug_photos, tmp_path / "cut", steps=[1, 2, 3], learning_rate=2e-2)
    fit(tiny_base, mug_photos, tmp_path / "cut", steps=[1, 2, 3])
    assert before.items() <= snapshots(tmp_path / "cut").items() and snapshots(
        tmp_path / "cut"
    ) == snapshots(tmp_path / "whole")
    with pytest.raises(InputError, match="finished run"):
        fit(tiny_base, mug_photos, tmp_path / "cut", steps=[1, 2, 3])


@pytest.mark.heavy
def test_the_same_command_goes_on_after_a_signal(tiny_base, mug_photos, tmp_path):
    """Of two processes the signal reaches one, and both stop at the same step. One process alone is
    stopped in this one, above.
    """

    sixty_steps = ("--snapshots.steps", "[1, 60]", "--trainer.max_steps", 60)
    sixty_steps += ("--data.batch_size", 4)  # as the recipe has it: the signal comes before the end
    two_processes = ("--trainer.devices", 2, "--trainer.strategy", "ddp")

    def line(out: str) -> list[str]:
        recipe = ROOT / "configs/train_lora.yaml"
        words = fit_words(
            tiny_base,
            mug_photos,
            tmp_path / out,
            "--trainer.callbacks",
            "[]",
            *sixty_steps,
            *two_processes,
            config=recipe,
        )
        return [sys.executable, str(ROOT / "train.py"), *map(str, words)]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.Popen(
        line("whole"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    cut = subprocess.Popen(
        line("cut"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    first = tmp_path / "cut/snapshots/step-000001"
    while not first.exists() and cut.poll() is None:
        time.sleep(0.02)
    cut.send_signal(signal.SIGTERM)
    _, said = cut.communicate(timeout=200)
    assert (
        cut.returncode == STOPPED
        and "run the same command" in said
        and not (tmp_path / "cut/snapshots/step-000060").exists()
    ), said
    assert whole.wait(timeout=200) == 0, whole.stderr.read()
    done = subprocess.run(line("cut"), env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "going on at step" in done.stdout + done.stderr, done.stderr
    weights = [
        (tmp_path / out / "snapshots/step-000060/pytorch_lora_weights.safetensors").read_bytes()
        for out in ("whole", "cut")
    ]
    assert weights[0] == weights[1]
