"""The guide's commands for photos run as they stand, made small, one after another."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_readme import ROOT, lines_of
from tiny_runs import QUIET, command

from blend import main as blend
from dreamblend.sandbox import world
from dreamblend.storage import snapshots
from train import main as train

SMALLER = [
    "--trainer.max_steps",
    "2",
    "--snapshots.steps",
    "[1, 2]",
    *QUIET,
    "--trainer.callbacks",
    "null",
]


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    """A folder with the photos that the guide speaks of."""
    (tmp_path / "photos/mug").mkdir(parents=True)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for i, photo in enumerate(world.photos("teal_mug")):
        wide = Image.new("RGB", (96, 64), "white")
        wide.paste(photo.convert("RGB"), (16, 0))
        (wide if i % 2 else photo).save(tmp_path / f"photos/mug/{i}.png")
        (tmp_path / f"photos/mug/{i}.txt").write_text("a {identifier} {class_noun}, red, blue")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(option: str) -> list[list[str]]:
    """The guide's commands that use an option."""
    return [
        shlex.split(re.sub(r"stable-diffusion-v1-5/\S+|stabilityai/\S+", "sandbox", line))
        for line in lines_of(ROOT / "docs" / "guide.md")
        if option in line
    ]


def settings_of(run: Path) -> dict:
    (*_, (_, last)) = snapshots.find(run)
    return snapshots.read(last).about.settings


def test_the_command_for_captions_runs(there):
    ((_, _, *words),) = asked("--data.caption_dropout")
    status, _, said = command(train, *words, *SMALLER)
    assert status == 0, said
    settings = settings_of(there / "runs/mug-captions")
    assert settings["caption_dropout"] == 0.1 and settings["shuffle_tags"] is True


def test_the_command_for_buckets_runs(there):
    ((_, _, *words),) = asked("--data.buckets")
    status, _, said = command(train, *words, *SMALLER)
    assert status == 0, said
    settings = settings_of(there / "runs/mug-buckets")
    assert settings["buckets"] is True and settings["crop"] == "random"


@pytest.mark.heavy
def test_the_command_for_masks_runs(there):
    (there / "photos/mug-masks").mkdir()
    for photo in (there / "photos/mug").glob("*.png"):
        Image.new("L", Image.open(photo).size, 255).save(there / "photos/mug-masks" / photo.name)
    ((_, _, *words),) = asked("--data.mask")
    status, _, said = command(train, *words, *SMALLER)
    assert status == 0, said
    assert settings_of(there / "runs/mug-masked")["background_weight"] == 0.1


@pytest.mark.heavy
def test_the_commands_for_several_subjects_run(there):
    for name in ("1_sks mug", "2_zwx robot toy"):
        shutil.copytree(there / "photos/mug", there / "photos/kitchen" / name)
    (_, _, *training), (_, _, *drawing) = asked("runs/kitchen")
    status, _, said = command(train, *training, *SMALLER)
    assert status == 0, said
    assert len(settings_of(there / "runs/kitchen")["subjects"]) == 2
    smaller = ("--early", 1, "--late", 2, "--seeds", 0, "--model.num_inference_steps", 2, *QUIET)
    status, _, said = command(blend, *drawing, *smaller)
    assert status == 0, said
    rows = (there / "runs/kitchen-zwx/results.jsonl").read_text()
    assert "a zwx robot toy beside a sks mug" in rows
    run = json.loads((there / "runs/kitchen-zwx/run.json").read_text())
    assert len(run["photos"]) == 5 and all("2_zwx robot toy" in photo for photo in run["photos"])
