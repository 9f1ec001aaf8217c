"""Names of the version before still work, with a warning."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import yaml
from tiny_runs import command

from blend import main
from dreamblend.renamed import MODULES

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("old", MODULES)
def test_a_module_under_its_old_name_is_the_module_itself(old):
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=f"{old} is {MODULES[old]} now"):
        module = importlib.import_module(old)
    now = importlib.import_module(MODULES[old])
    assert module is now and now.__spec__.name == now.__name__ == MODULES[old]


def test_a_configuration_of_the_version_before_is_read(tmp_path):
    config = yaml.safe_load((ROOT / "configs/blend.yaml").read_text())
    config["model"]["blend"]["class_path"] = "dreamblend.blends.Score"
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config))
    words = ["--run", tmp_path / "no-run", "--prompts", "a {subject}", "--early", 1, "--late", 2]
    status, _, err = command(main, "predict", "--config", tmp_path / "old.yaml", *words)
    assert status == 2 and "no-run" in err and "class_path" not in err  # it came as far as the run
