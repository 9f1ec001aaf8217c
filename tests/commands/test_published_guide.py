"""The guide's command for a published sampler runs as it stands, made small; and each of them is
found by its name.
"""

from __future__ import annotations

import json
import shlex

import pytest
from test_readme import ROOT, lines_of
from tiny_runs import QUIET, command, fit

from blend import main
from dreamblend.blending.blends import BLENDS
from dreamblend.tuning import LoRA

SMALLER = ("--early", 1, "--late", 2, "--seeds", 0, "--model.num_inference_steps", 2)


@pytest.fixture
def there(tiny_base, mug_photos, tmp_path, monkeypatch):
    """A folder with the run that the guide speaks of."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    fit(tiny_base, mug_photos, tmp_path / "runs/mug", LoRA(rank=4), steps=[1, 2])
    return tmp_path


def guide() -> list[str]:
    """The words of the guide's command."""
    guided = lines_of(ROOT / "docs" / "guide.md")
    (line,) = [line for line in guided if "--model.blend Reward" in line]
    return shlex.split(line)[2:]


def test_the_command_for_a_published_sampler_runs(there):
    status, _, err = command(main, *guide(), *SMALLER, *QUIET)
    assert status == 0, err
    lines = [
        json.loads(line)
        for line in (there / "runs/mug-reward/results.jsonl").read_text().split("\n")
        if line
    ]
    (drawn,) = [line for line in lines if line["kind"] == "reward"]
    assert drawn["settings"]["weight"] == 1.5 and drawn["settings"]["start"] == "base"
    report = (there / "runs/mug-reward/report.html").read_text()
    assert "what late adds" in report


def test_what_a_sampler_cannot_do_is_said_before_anything_is_drawn(there):
    words = guide()
    words[words.index("Reward")] = "Personalization"
    status, _, err = command(main, *words, *SMALLER, *QUIET, "--model.guidance_scale", 1)
    assert status == 2 and "choose another blend" in err, err
    assert not list((there / "runs/mug-reward").glob("**/*.png"))


def test_the_guide_lists_every_blend():
    page = (ROOT / "docs" / "guide.md").read_text()
    table = (ROOT / "docs" / "method.md").read_text()
    for kind in BLENDS.values():
        assert f"`{kind.__name__}`" in page and f"`{kind.__name__}`" in table
