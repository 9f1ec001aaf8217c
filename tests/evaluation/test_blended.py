"""What is measured of a blend, and kept in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import fit

from dreamblend.evaluation.blended import diagnose_blend, photos_of
from dreamblend.models import load_backbone
from dreamblend.storage import snapshots
from dreamblend.storage.snapshots import Snapshot
from dreamblend.tuning import LoRA

SETTINGS = {
    "identifier": "sks",
    "class_noun": "mug",
    "grid": 4,
    "size": 32,
    "num_inference_steps": 1,
    "guidance_scale": 2.0,
}


@pytest.fixture(scope="module")
def found(tiny_base, mug_photos, tmp_path_factory) -> list[Snapshot]:
    run = tmp_path_factory.mktemp("run")
    fit(tiny_base, mug_photos, run, LoRA(rank=2), steps=[1, 2])
    return [snapshots.read(path) for _, path in snapshots.find(run)]


def test_a_run_is_diagnosed_once_and_again_where_the_file_is_damaged(found, tiny_base, tmp_path):
    loaded = []

    def base():
        loaded.append(load_backbone(str(tiny_base)))
        return loaded[-1]

    def diagnosed(**other) -> list[dict]:
        prompts = ["a sks mug in the snow", "a sks mug on the beach"]
        return diagnose_blend(tmp_path, base, found, prompts, {**SETTINGS, **other})

    rows = diagnosed()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert diagnosed() == [] and len(loaded) == 1
    for damaged in ("{", "[]", '{"about": 1'):
        (tmp_path / "collapse.json").write_text(damaged)
        assert diagnosed() == rows
    assert diagnosed() == [] and len(loaded) == 4
    assert diagnosed(guidance_scale=3.0) != rows
    assert diagnosed(size=[96, 64], grid=12) != rows  # a grid that there is at this size alone


def test_photos_are_found_while_they_are_where_the_run_had_them(found, mug_photos, monkeypatch):
    about = found[0].about
    assert about is not None and photos_of(about) == mug_photos.resolve()
    monkeypatch.setitem(about.settings, "instance_dir", str(Path("gone")))
    assert photos_of(about) is None and photos_of(None) is None
