"""`select` picks the pair of another trainer's run, and `predict` draws it."""

from __future__ import annotations

import json
from pathlib import Path

import foreign_runs
import pytest
from foreign_runs import as_kohya
from tiny_runs import QUIET, command, fit, step

from blend import main
from dreamblend.tuning import LoRA

FEW = ["--num_inference_steps", 2, "--seeds", "7-8"]
PROBES = ["--prompts", '["a picture of a {subject} on the moon"]']
DRAW = ["predict", "--prompts", '["a {subject}"]', "--seeds", 0, *QUIET]


@pytest.fixture(scope="module")
def loras(mug_photos, tmp_path_factory) -> list:
    """Of a short run on the sandbox, under kohya's names."""
    out = tmp_path_factory.mktemp("made") / "run"
    few = {"batch_size": 4}
    fit("sandbox", mug_photos, out, LoRA(rank=2), steps=[2, 12], learning_rate=2e-2, data=few)
    files = [step(out, n) / "pytorch_lora_weights.safetensors" for n in (2, 12)]
    alpha = LoRA(rank=2).alpha
    return [as_kohya(file, alpha=alpha) for file in files]


def ran(*words: object) -> str:
    status, said, err = command(main, *words)
    assert status == 0, err
    return said


@pytest.fixture
def kohya(loras, tmp_path) -> Path:
    return foreign_runs.kohya(tmp_path / "kohya", loras)


def test_select_picks_the_pair_of_a_kohya_run_and_predict_draws_it(kohya, mug_photos, tmp_path):
    status, _, err = command(main, "select", "--run", kohya)
    assert status == 2 and "--base and --photos" in err and err.count("\n") == 1

    told = ["--base", "sandbox", "--photos", mug_photos]
    said = ran("select", "--run", kohya, *FEW, *PROBES, *told)
    assert "a run of kohya sd-scripts or musubi-tuner, 2 checkpoints, steps 30 to 60" in said
    pair = json.loads((kohya / "pair.json").read_text())
    assert (pair["early"], pair["late"]) == (30, 60) and (kohya / "pair.html").is_file()

    # what select was told is kept: predict asks for nothing
    out, few = tmp_path / "out", ["--model.num_inference_steps", 2]
    assert "early 30 and late 60" in ran(*DRAW, "--run", kohya, "--out", out, *few)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {(Path(a["early"]).name, Path(a["late"]).name) for a in lines} == {
        ("mug-000001.safetensors", "mug.safetensors")
    }
    assert {a["kind"] for a in lines} == {"early", "region", "late"}
    # the same snapshots by their steps are the same images
    ran(*DRAW, "--run", kohya, "--out", out, *few, "--early", 30, "--late", 60)
