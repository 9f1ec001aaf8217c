"""Names of the version before still work, with a warning."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny_runs import command, fit

import callbacks
import dreamblend.callbacks
from blend import main
from dreamblend.options import arranged
from dreamblend.renamed import CALLBACKS, MODULES, OPTIONS
from dreamblend.storage import snapshots
from dreamblend.training.identity import check_same

ROOT = Path(__file__).resolve().parents[1]


RENAMED = MODULES | CALLBACKS


@pytest.mark.parametrize("old", RENAMED)
def test_a_module_under_its_old_name_is_the_module_itself(old):
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"{old} is {RENAMED[old]} now"):
        module = importlib.import_module(old)
    now = importlib.import_module(RENAMED[old])
    assert module is now and now.__spec__.name == now.__name__ == RENAMED[old]


def test_the_callbacks_have_short_names_in_a_checkout():
    names = dreamblend.callbacks.__all__
    assert len(names) == 7
    assert all(getattr(callbacks, name) is getattr(dreamblend.callbacks, name) for name in names)


def test_a_configuration_of_the_version_before_is_read(tmp_path):
    config = yaml.safe_load((ROOT / "configs/blend.yaml").read_text())
    config["model"]["blend"]["class_path"] = "dreamblend.blends.Score"
    config["trainer"]["callbacks"] = [{"class_path": "callbacks.BlendWriter"}]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config))
    words = ["--run", tmp_path / "no-run", "--prompts", "a {subject}", "--early", 1, "--late", 2]
    status, _, err = command(main, "predict", "--config", tmp_path / "old.yaml", *words)
    assert status == 2 and "no-run" in err and "class_path" not in err  # it came as far as the run


def test_old_options_on_the_command_line_are_the_present_ones_with_a_warning():
    with pytest.warns(FutureWarning) as told:
        found = arranged(
            ["fit", "--model.rate=1e-4", "--data.prior_dir", "~/p", "--model.warmup", "3"]
        )
    assert found == [
        "fit",
        "--model.learning_rate=1e-4",
        "--data.class_images_dir",
        str(Path.home() / "p"),
        "--model.lr_warmup_steps",
        "3",
    ]
    assert "--model.rate is --model.learning_rate now" in str(told[0].message) and len(told) == 3


def test_old_options_of_a_configuration_are_the_present_ones_with_a_warning(tmp_path):
    old = {
        "model": {"rate": 1e-4, "schedule": "cosine", "tuning": "LoRA"},
        "data": {"prior_count": 3},
        "snapshots": {"steps": [1, 2]},
        "trainer": {"callbacks": [{"class_path": "Preview", "init_args": {"steps": 2}}]},
    }
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    with pytest.warns(FutureWarning) as told:
        word, text = arranged(["--config", str(tmp_path / "old.yaml")])
    assert word == "--config" and yaml.safe_load(text) == {
        "model": {"learning_rate": 1e-4, "lr_scheduler": "cosine", "tuning": "LoRA"},
        "data": {"num_class_images": 3},
        "snapshots": {"steps": [1, 2]},
        "trainer": {
            "callbacks": [{"class_path": "Preview", "init_args": {"num_inference_steps": 2}}]
        },
    }
    assert any(
        f"model.rate of {tmp_path / 'old.yaml'} is model.learning_rate now" in str(one.message)
        for one in told
    )


def test_a_present_configuration_stays_the_file_that_it_is():
    for recipe in (ROOT / "configs").glob("*.yaml"):
        assert arranged(["--config", str(recipe)]) == ["--config", str(recipe)]


def test_a_run_can_be_continued_and_blended_that_the_version_before_began(
    tiny_base, mug_photos, tmp_path
):
    """Its settings have their old names in snapshot.json and in the resume state."""
    fit(tiny_base, mug_photos, tmp_path, steps=[1])
    file = tmp_path / "snapshots" / "step-000001" / "snapshot.json"
    present = json.loads(file.read_text())
    old = {new.rpartition(".")[2]: old.rpartition(".")[2] for old, new in OPTIONS.items()}
    said = {**present, "settings": {old.get(k, k): v for k, v in present["settings"].items()}}
    assert "rate" in said["settings"] and "learning_rate" not in said["settings"]
    file.write_text(snapshots._text(said))
    assert snapshots.read(file.parent).about.settings == present["settings"]
    theirs = {"rate": 1.0, "prior_count": 0}
    check_same(theirs, {"learning_rate": 1.0, "num_class_images": 0}, "it")
