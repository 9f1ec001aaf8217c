"""The guide's commands for photos run as they stand, made small, one after another."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from test_readme import ROOT, lines_of
from tiny_runs import QUIET, command

from dreamblend.sandbox import world
from dreamblend.storage import snapshots
from train import main as train

SMALLER = ["--trainer.max_steps", "2", "--snapshots.steps", "[1, 2]", *QUIET]


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


@pytest.mark.parametrize("option", ["--data.caption_dropout"])
def test_the_commands_for_photos_run(option, there):
    ((_, file, *words),) = asked(option)
    assert file == "train.py"
    status, _, said = command(train, *words, *SMALLER)
    assert status == 0, said
    (_, last) = snapshots.find(there / words[words.index("--out") + 1])
    settings = snapshots.read(last[1]).about.settings
    assert settings["caption_dropout"] == 0.1 and settings["shuffle_tags"] is True
    shutil.rmtree(there / "runs")
