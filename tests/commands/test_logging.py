"""Loggers, validation prompts and the probe's curves by options alone."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import command, fit_words

from train import main

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["--trainer.log_every_n_steps", 1, "--trainer.max_steps", 4, "--snapshots.steps", "[1, 4]"]


def words(base: Path, photos: Path, out: Path, *more: object) -> list[object]:
    all_words = [*fit_words(base, photos, out, "--model.tuning", "LoRA", *STEPS), *more]
    place = all_words.index("--trainer.logger")
    return all_words[:place] + all_words[place + 2 :]


def previews(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "previews").iterdir())


def test_validation_prompts_are_drawn_into_tensorboard(tiny_base, mug_photos, tmp_path):
    asked = ["--logger", "tensorboard", "--validation.prompts", '["a {subject}"]']
    asked += ["--validation.every", 2]
    status, _, err = command(main, *words(tiny_base, mug_photos, tmp_path, *asked))
    assert (status, err) == (0, "")
    assert previews(tmp_path) == [f"step-{n:06d}.png" for n in (1, 2, 4)]
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent)).Reload()
    assert [event.step for event in events.Images("preview")] == [1, 2, 4]
    assert [event.step for event in events.Scalars("loss")]


@pytest.mark.heavy
def test_validation_prompts_are_drawn_into_wandb(tiny_base, mug_photos, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    asked = ["--logger", "wandb", "--validation.prompts", '["a {subject}"]']
    status, _, err = command(main, *words(tiny_base, mug_photos, tmp_path, *asked))
    assert status == 0, err
    drawn = list(tmp_path.glob("wandb/offline-run-*/files/media/images/preview_*.png"))
    sheets = [tmp_path / "previews" / name for name in previews(tmp_path)]
    assert len(drawn) == len(sheets) == 2
    assert {pixels(path) for path in drawn} == {pixels(path) for path in sheets}


@pytest.mark.heavy
def test_wandb_without_a_login_is_told_before_anything_is_loaded(
    tiny_base, mug_photos, tmp_path, monkeypatch
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))  # where a login is kept
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    asked = map(str, words(tiny_base, mug_photos, tmp_path / "run", "--logger", "wandb"))
    line = [sys.executable, ROOT / "train.py", *asked]  # wandb keeps what it was once told
    done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 2 and "run wandb login, or set WANDB_MODE=offline" in done.stderr
    assert not (tmp_path / "run").exists()


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_the_recipes_preview_takes_the_prompts_and_csv_the_curves(tiny_base, mug_photos, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {subject}\na {subject} on the beach\n")
    preview = '[{"class_path": "dreamblend.callbacks.Preview", "init_args": {"seeds": 1, '
    preview += '"num_inference_steps": 1}}]'
    asked = ["--trainer.callbacks", preview, "--logger", "csv", "--validation.prompts", prompts]
    status, _, err = command(main, *words(tiny_base, mug_photos, tmp_path / "run", *asked))
    assert (status, err) == (0, "")
    with Image.open(tmp_path / "run/previews/step-000001.png") as sheet:
        assert sheet.width == 2 * sheet.height  # two prompts, one seed: the recipe's own
    rows = list(csv.DictReader(next((tmp_path / "run").rglob("metrics.csv")).open()))
    assert [row["loss"] for row in rows]


WRONG = {
    "a logger": (["--logger", "mlflow"], "--logger is 'mlflow': it is one of tensorboard, wandb"),
    "two": (["--logger", "csv", "--trainer.logger", "true"], "both say where to log"),
    "every": (["--validation.every", "0"], "every is 0: it is a number"),
    "no curves": (["--logger", "none", "--validation.probe", "true"], "trainer.logger is off"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case, tiny_base, mug_photos, tmp_path):
    more, message = WRONG[case]
    status, _, err = command(main, *words(tiny_base, mug_photos, tmp_path, *more))
    assert status == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "asked", [["--logger", "wandb"], ["--trainer.logger", "lightning.pytorch.loggers.WandbLogger"]]
)
def test_wandb_that_is_missing_is_named(asked, tiny_base, mug_photos, tmp_path):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    status, _, err = command(main, *words(tiny_base, mug_photos, tmp_path, *asked))
    assert status == 2 and "wandb" in err and err.count("\n") == 1
    assert not (tmp_path / "snapshots").exists()
