"""Names of the version before still work, with a warning."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import yaml
from tiny_runs import command

import callbacks
import dreamblend.callbacks
from blend import main
from dreamblend.renamed import CALLBACKS, MODULES

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
