"""NaN and infinity: training stops or skips and says where; a blend draws again in fp32, and leaves out what is still not finite."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from processes import together
from safetensors.torch import load_file
from tiny_runs import command, contents, fit, step

from callbacks import ResumeState
from callbacks.resume import NAME
from callbacks.writer import slug
from dreamblend import snapshots
from dreamblend.errors import InputError
from dreamblend.snapshots import Weights
from dreamblend.tuner import MOST_SKIPPED
from dreamblend.tuning import Full, LoRA

LORA_FILE = "pytorch_lora_weights.safetensors"


class Poison(L.Callback):
    """Latents of one photo that are not finite, as a VAE in half precision makes them."""

    def __init__(self, photo: int, value: float = torch.nan):
        self.photo, self.value = photo, value

    def on_train_start(self, trainer, module):
        module.latents[False][0][0, self.photo] = self.value


def finite(path: Path) -> bool:
    return all(torch.isfinite(v).all() for v in load_file(path).values())


# ------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_training_stops_before_the_step_and_names_its_photos_and_goes_on_by_skipping(tiny_base, mug_photos, tmp_path, value):
    photos = sorted(p.name for p in mug_photos.iterdir())
    options = dict(steps=[1, 8], callbacks=(Poison(2, value), ResumeState(every=1)))
    with pytest.raises(InputError, match=r"the loss of step \d is NaN or infinite \(photos: " + photos[2] + r"\).*model.on_nan") as stop:
        fit(tiny_base, mug_photos, tmp_path / "run", LoRA(rank=2), **options)
    before = contents(tmp_path / "run/snapshots")
    state = torch.load(tmp_path / "run" / NAME, weights_only=True)
    assert f"step {state['global_step'] + 1} " in str(stop.value) and finite(step(tmp_path / "run", 1) / LORA_FILE)
    with pytest.warns(UserWarning, match=f"photos: {photos[2]}.: it is skipped"):
        fit(tiny_base, mug_photos, tmp_path / "run", LoRA(rank=2), on_nan="skip", ckpt_path=tmp_path / "run" / NAME, **options)
    assert finite(step(tmp_path / "run", 8) / LORA_FILE) and before.items() <= contents(tmp_path / "run/snapshots").items()
    with pytest.warns(UserWarning, match="it is skipped"):
        fit(tiny_base, mug_photos, tmp_path / "whole", LoRA(rank=2), on_nan="skip", **options)
    assert contents(tmp_path / "run/snapshots") == contents(tmp_path / "whole/snapshots")


def test_a_skipped_step_changes_no_weight(tiny_base, mug_photos, tmp_path):
    """Accumulated, averaged and with weight decay, which would move weights without a gradient."""
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(torch.cat([p.detach().flatten().clone() for p in module.trained.parameters() if p.requires_grad]))

    options = dict(on_nan="skip", weight_decay=.5, trainer={"accumulate_grad_batches": 2})
    with pytest.warns(UserWarning, match="skipped"):
        fit(tiny_base, mug_photos, tmp_path, Full(), steps=[3], callbacks=(Poison(0), Look(), EMAWeightAveraging(decay=.5)), **options)
    moved = [not torch.equal(seen[i], seen[i + 2]) for i in (1, 3)]
    assert torch.isfinite(torch.stack(seen)).all() and True in moved and False in moved


def test_a_rate_that_blows_up_stops_and_does_not_skip_forever(tiny_base, mug_photos, tmp_path):
    with pytest.raises(InputError, match=r"of step \d is NaN or infinite .*lower model.rate"):
        fit(tiny_base, mug_photos, tmp_path / "stop", steps=[9], rate=1e30)
    with pytest.raises(InputError, match=f"as were the {MOST_SKIPPED} steps before it"), pytest.warns(UserWarning):
        fit(tiny_base, mug_photos, tmp_path / "skip", steps=[99], rate=1e30, on_nan="skip")


def test_two_processes_agree(tiny_base, mug_photos, tmp_path):
    """The photo is one process's alone; both skip the same steps, and both stop."""

    def work(rank: int) -> None:
        options = dict(steps=[1, 4], rate=1e-3, callbacks=(Poison(1),), trainer={"devices": 2, "strategy": "ddp"})
        module = fit(tiny_base, mug_photos, tmp_path / "skip", LoRA(rank=2), on_nan="skip", **options)
        torch.save([p.detach() for p in module.trained.parameters() if p.requires_grad], tmp_path / f"{rank}.pt")
        try:
            fit(tiny_base, mug_photos, tmp_path / "stop", LoRA(rank=2), **options)
        except InputError as error:
            (tmp_path / f"{rank}.txt").write_text(str(error))

    assert together(2, work) == [0, 0]
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(p, q) and torch.isfinite(p).all() for p, q in zip(a, b, strict=True))
    said = {(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)}
    assert len(said) == 1 and sorted(p.name for p in mug_photos.iterdir())[1] in said.pop()
