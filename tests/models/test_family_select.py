"""`select` picks a pair of every family, and `predict` draws with it."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
from families import FAMILIES, SMALL, UNTRAINABLE, save_family, small_bases
from PIL import Image
from tiny_runs import QUIET, fit_words, succeeding

from blend import main

FEW = ("sdxl",)  # select itself knows no family
TRAINED = [
    pytest.param(name, marks=[] if name in FEW else pytest.mark.heavy)
    for name in FAMILIES
    if name not in UNTRAINABLE
]
DRAWING = ("--seeds", 7, "--prompts", '["a picture of a {subject} on the moon"]')


ran = functools.partial(succeeding, main)


def predicted(run: Path, out: Path, *more: object) -> tuple[str, list[dict]]:
    """What `predict` says, and the lines of its images."""
    steps = ("--model.num_inference_steps", 2)
    said = ran("predict", "--run", run, "--out", out, *DRAWING, *steps, *QUIET, *more)
    return said, [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.heavy
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.holds("select")
def test_select_picks_a_pair_and_predict_draws_it(name, mug_photos, tmp_path):
    """The photos are those of a subject that the late snapshot has learned: what it draws. Two
    steps teach a random model nothing that judges see.
    """
    base, photos, run = save_family(name, tmp_path), tmp_path / "photos", tmp_path / "run"
    shutil.copytree(mug_photos, photos)
    with small_bases():
        rate = ("--model.learning_rate", 0.01)
        ran(*fit_words(base, photos, run, "--model.tuning", "LoRA", *rate))
        _, lines = predicted(run, tmp_path / "drawn", "--early", 1, "--late", 2)
        (late,) = [tmp_path / "drawn" / line["file"] for line in lines if line["kind"] == "late"]
        for photo in photos.iterdir():
            shutil.copy(late, photo)
        # the sandbox's judges are shipped, and read images of any model
        ran("select", "--run", run, "--judges", "sandbox", "--num_inference_steps", 2, *DRAWING)
        pair = json.loads((run / "pair.json").read_text())
        said, lines = predicted(run, tmp_path / "out")
    assert (pair["early"], pair["late"]) == (1, 2)
    late_alone = pair["snapshots"][1]["subject"]
    assert late_alone > 0.999 and late_alone > pair["base"]["subject"]
    assert "early 1 and late 2, as picked" in said
    assert {(line["kind"], line["early"], line["late"]) for line in lines} == {
        (kind, "1", "2") for kind in ("early", "region", "late")
    }
    for line in lines:
        assert Image.open(tmp_path / "out" / line["file"]).size == (SMALL, SMALL)
