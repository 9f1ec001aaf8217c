"""What an installed wheel holds, and that it trains and draws from any folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path
from shutil import copytree

import pytest
from tiny_runs import QUIET

ROOT = Path(__file__).resolve().parents[2]
FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, as building leaves its own files among the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("dreamblend", "callbacks", "configs"):
        copytree(ROOT / name, source / name, symlinks=True)
    for name in FILES:
        (source / name).write_bytes((ROOT / name).read_bytes())
    line = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out]
    done = subprocess.run([*line, source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder that pip would unpack the wheel into."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def test_a_wheel_installs_no_name_but_its_own(installed):
    names = {path.name for path in installed.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"dreamblend"}


def test_a_wheel_holds_types_weights_recipes_and_the_command(installed):
    package = installed / "dreamblend"
    assert (package / "py.typed").is_file()
    assert (package / "sandbox/weights/base/model_index.json").is_file()
    recipes = {path.name: path.read_bytes() for path in (ROOT / "configs").glob("*.yaml")}
    assert {p.name: p.read_bytes() for p in (package / "configs").iterdir()} == recipes != {}
    entries = ConfigParser()
    entries.read(next(installed.glob("*.dist-info")) / "entry_points.txt")
    assert dict(entries["console_scripts"]) == {"dreamblend": "dreamblend.__main__:main"}


@pytest.mark.heavy
def test_what_a_wheel_installs_trains_and_draws_from_any_folder(
    installed, tiny_base, mug_photos, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(installed))

    def run(*words: object) -> None:
        line = [sys.executable, "-m", "dreamblend", *map(str, words), *QUIET]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]

    run("fit", "--config", "train_lora.yaml", "--model.base", tiny_base, "--data.instance_dir",
        mug_photos, "--data.class_noun", "mug", "--data.batch_size", 1, "--snapshots.steps", "[1]",
        "--trainer.max_steps", 2, "--trainer.callbacks.num_inference_steps", 1,
        "--out", "run")  # fmt: skip
    run("predict", "--config", "blend.yaml", "--run", "run", "--early", 1, "--late", 2, "--prompts",
        "a {subject}", "--seeds", 0, "--model.num_inference_steps", 1, "--out", "out")  # fmt: skip
    assert (tmp_path / "run/previews/step-000002.png").is_file()
    assert (tmp_path / "out/report.html").is_file()
