"""The benchmark of costs, on a tiny base: what is compared does the same work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pretend import ON_PRETEND, pretend_device

from benchmarks.cost import drawing, saving, starting, training
from benchmarks.cost.__main__ import Costs
from benchmarks.cost.bases import BASES, Base
from benchmarks.cost.clock import in_turn, over, spread
from benchmarks.pieces import full_pair, lora_pair
from benchmarks.training import Subject
from dreamblend.blending.blends import CAG, Late, Merge, Region
from dreamblend.callbacks.resume import wait_after
from dreamblend.models import load_backbone

NOUN = "mug"
PAIRS = drawing.pairs_of(NOUN, 2)


@pytest.fixture(scope="module")
def base(tiny_base) -> Base:
    return Base("tiny", lambda out: str(tiny_base), 32, images=2, batch=4, steps=2)


@pytest.fixture(scope="module")
def subject(mug_photos) -> Subject:
    return Subject("mug", mug_photos, NOUN, (PAIRS[0][0],))


def compared(models, *blends) -> dict[str, dict]:
    rows = drawing.compare(models, NOUN, 2, 3, (32, 32), 2, list(blends))
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize("make", [lora_pair, full_pair])
def test_plain_draws_what_late_draws_and_its_passes_are_the_unit(tiny_base, make):
    models = make(load_backbone(str(tiny_base)))
    plain = drawing.plain(models.late, PAIRS, 3, (32, 32))()
    late = drawing.blended(models, Late(), PAIRS, NOUN, 3, (32, 32))()
    early = drawing.plain(models.early, PAIRS, 3, (32, 32))()
    values = [np.asarray(images, dtype=float) for images in map(np.stack, (plain, late, early))]
    assert np.abs(values[0] - values[1]).max() <= 1  # decoded one at a time
    assert (values[0] != values[2]).any()
    found = compared(models, Late(), CAG(), Merge())
    assert [found[name]["passes"] for name in ("plain", "late", "merge")] == [6, 6, 6]
    # its reference up to the last guided step, and two guided steps
    assert found["cag"]["passes"] == 6 + 2 * 2 + 2 * 1
    assert found["cag"]["tflop"] > found["late"]["tflop"] >= found["plain"]["tflop"] > 0
    assert found["plain"]["gb"] < found["late"]["gb"] < found["cag"]["gb"]
    assert found["plain"]["times"] == {"median": 1, "low": 1, "high": 1}


def test_a_lora_pair_holds_one_base_and_a_full_one_two(tiny_base):
    for make, of_one in ((lora_pair, 1.0), (full_pair, 1.5)):
        models = make(load_backbone(str(tiny_base)))
        ratio = drawing.held(models.early, models.late) / drawing.held(models.late)
        assert of_one < ratio < of_one + 0.5


@pytest.mark.heavy
def test_drawing_is_measured_on_another_device(tiny_base):
    with pretend_device() as device, torch.no_grad():
        models = lora_pair(load_backbone(str(tiny_base)))
        models.to(device)
        assert compared(models, Region())["region"]["passes"] > 6


def test_all_loops_train_the_runs_own_weights(base, subject, tmp_path):
    seen: dict[str, list] = {}

    def watched(name):
        make = training.OTHERS[name]

        def made(trainer, module):
            weights = list(module.backbone.denoiser.parameters())
            step = make(trainer, module)

            def once():
                before = [w.detach().clone() for w in weights]
                photos = step()
                moved = any(not torch.equal(w, b) for w, b in zip(weights, before))
                seen.setdefault(name, []).append((photos, moved))
                assert all(w.grad is None for w in weights)
                return photos

            return once

        return made

    rows = training.compare(
        base, "full", subject, 2, tmp_path, {name: watched(name) for name in training.OTHERS}
    )
    assert [row["name"] for row in rows] == [training.OURS, *training.OTHERS]
    assert all(row["rate"]["low"] > 0 for row in rows)
    photos = len(list(subject.photos.iterdir()))
    epoch = [min(4, photos - start) for start in range(0, photos, 4)]
    assert [count for count, _ in seen[training.SCRIPT]] == (epoch * 5)[:5]
    # a copy of its own is in the other layout
    assert {name for name, each in seen.items() if each[-1][1]} == {*seen} - {training.LAST}


@pytest.mark.heavy
def test_training_is_measured_on_another_device(base, subject, tmp_path):
    with pretend_device():
        rows = training.compare(base, "lora", subject, 1, tmp_path, **ON_PRETEND)
    assert len(rows) == 1 + len(training.OTHERS)


def test_the_wait_for_snapshots_is_a_share_of_the_recipes_run(base, subject, tmp_path):
    found = saving.measure(base, "lora", subject, tmp_path)
    assert found["snapshot"] > 0 and found["state"] > 0 and found["snapshot_mb"] > 0
    run = 600 * found["step"]
    states = 1 + run // wait_after(found["state"])  # the last one, and those before
    waits = 8 * found["snapshot"] + states * found["state"]
    share = waits / (run + waits)
    assert found["of_snapshots"] + found["of_states"] == pytest.approx(share)


def test_times_are_taken_in_turn():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    found = in_turn(runs, 3, "cpu")
    assert "".join(order) == "abccbaabc" and all(len(each) == 3 for each in found.values())
    assert over([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == {"median": 3, "low": 2, "high": 4}
    assert spread([1.0, 2.0, 9.0])["median"] == 2


def test_what_is_there_is_not_measured_again_and_all_of_it_is_on_the_page(
    base, subject, tmp_path, monkeypatch
):
    monkeypatch.setitem(BASES, "tiny", base)
    monkeypatch.setattr(drawing, "BLENDS", {"region": Region})
    costs = Costs(tmp_path, 2, 1, ["tiny"])
    rows = [{"name": name, "seconds": spread([1.0])} for name in ("fit", "predict")]
    monkeypatch.setattr(starting, "measure", lambda *_: rows)
    monkeypatch.setattr(starting, "imports", lambda module: {"all": 2.0, "torch": 1.0})
    for section in ("drawing", "snapshot", "startup"):
        getattr(costs, section)()
    page = costs.page()
    for told in ("drawing: tiny, lora", "drawing: tiny, full", "region", "tiny, lora |", "predict"):
        assert told in page
    again = Costs(tmp_path, 2, 1, ["tiny"])
    monkeypatch.setattr(drawing, "compare", lambda *_: pytest.fail("it is measured again"))
    monkeypatch.setattr(saving, "measure", lambda *_: pytest.fail("it is measured again"))
    for section in ("drawing", "snapshot", "startup"):
        getattr(again, section)()
    assert again.page() == page
