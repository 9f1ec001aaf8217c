"""A finished run is trained on: it ends as one that was longer from the start, and keeps what it
has.
"""

from __future__ import annotations

import lightning as L
import pytest
import torch
from tiny_runs import command, contents, fit, fit_words, step

from dreamblend.callbacks import ResumeState, WeightEMA
from dreamblend.callbacks.resume import NAME
from dreamblend.errors import InputError
from dreamblend.storage.snapshots import read
from dreamblend.tuning import LoRA
from train import main


class Rates(L.Callback, list):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.append(optimizer.param_groups[0]["lr"])


def test_a_finished_run_goes_on_and_ends_as_a_longer_one(tiny_base, mug_photos, tmp_path):
    def train(out: str, last: int, state=None) -> None:
        callbacks = (WeightEMA(0.5), ResumeState())
        options = dict(callbacks=callbacks, ckpt_path=state, max_steps=last, steps=[1])
        fit(tiny_base, mug_photos, tmp_path / out, LoRA(rank=2), **options)

    train("whole", 4)
    train("twice", 2)
    first = contents(tmp_path / "twice/snapshots")
    state = tmp_path / "twice" / NAME
    with pytest.raises(InputError, match="is of step 2, and trainer.max_steps is 2: raise it"):
        train("twice", 2, state)
    train("twice", 4, state)
    both = contents(tmp_path / "twice/snapshots")
    assert first.items() <= both.items() and step(tmp_path / "twice", 2).is_dir()
    assert contents(step(tmp_path / "twice", 4)) == contents(step(tmp_path / "whole", 4))


def test_a_schedule_that_had_ended_goes_on_as_the_longer_one(tiny_base, mug_photos, tmp_path):
    def train(last: int, state=None) -> Rates:
        rates = Rates()
        callbacks = (rates, ResumeState())
        options = dict(callbacks=callbacks, ckpt_path=state, max_steps=last, steps=[1])
        schedule = dict(lr_scheduler="linear", learning_rate=1e-3)
        fit(tiny_base, mug_photos, tmp_path, LoRA(rank=2), **options, **schedule)
        return rates

    assert train(2) == pytest.approx([1e-3, 5e-4])
    assert train(4, tmp_path / NAME) == pytest.approx([5e-4, 2.5e-4])
    assert train(5, tmp_path / NAME) == pytest.approx([2e-4])  # and on, beside its older snapshots
    assert torch.load(tmp_path / NAME, weights_only=True)["global_step"] == 5
    # what was run is in the record, so that it is not taken for a run of five steps in one go
    settings = {at: read(step(tmp_path, at)).about.settings for at in (1, 2, 4, 5)}
    ended = {at: (of["max_steps"], of.get("max_steps_before")) for at, of in settings.items()}
    first, second = [2, 2], [4, 4]
    assert ended == {1: (2, None), 2: (2, None), 4: (4, [first]), 5: (5, [first, second])}


def test_the_same_command_with_more_steps_trains_on(tiny_base, mug_photos, tmp_path):
    words = fit_words(tiny_base, mug_photos, tmp_path, "--model.tuning", "LoRA")
    assert command(main, *words)[0] == 0
    status, _, err = command(main, *words)
    assert status == 2 and "raise it to go on, or choose another --out" in err
    more = [*words, "--trainer.max_steps", 3]
    assert command(main, *more)[0] == 0 and step(tmp_path, 3).is_dir()
    last = [*words, "--trainer.max_steps", 4, "--resume.keep", "false"]
    assert command(main, *last)[0] == 0 and not (tmp_path / NAME).exists()
