"""A benchmark of the sandbox made small: jobs side by side, interrupted and repeated, end in the
same file; and what its numbers say.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import contents

from benchmarks import sandbox
from benchmarks.study import Recipe, Study, Subject, label
from benchmarks.training import render_photos
from dreamblend.blending.blends import CAG, Early, Region
from dreamblend.blending.pair import Models
from dreamblend.blending.prompts import read_shard
from dreamblend.errors import InputError
from dreamblend.evaluation import bench
from dreamblend.evaluation.outcome import outcome
from dreamblend.models import load_backbone
from dreamblend.sandbox import world
from dreamblend.sandbox.judges import claims
from dreamblend.tuning import Full, LoRA

RECIPES = (
    Recipe("full", Full, 1e-3, (1, 2), (Region(), CAG(0.3))),
    Recipe("lora", lambda: LoRA(rank=2), 1e-3),
)


def study(out: Path, seeds: tuple[int, ...] = (0, 1)) -> Study:
    subjects = tuple(
        Subject(
            name,
            render_photos(name, out / "photos" / name),
            world.SUBJECTS[name].noun,
            sandbox.prompts(world.SUBJECTS[name].noun)[:1],
        )
        for name in ("navy_cat", "mint_lamp")
    )
    return Study("small", out, "sandbox", subjects, RECIPES, (1, 2), seeds, "sandbox", sampling=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study")
    small = study(out)
    small.run()
    assert small.finish()
    return out


def test_results_say_every_point_of_every_subject(finished):
    results = json.loads((finished / "results.json").read_text())
    assert (
        results["subjects"] == ["navy_cat", "mint_lamp"]
        and results["protocol"]["name"] == "sandbox"
        and results["settings"]["seeds"] == [0, 1]
    )
    names = {f"{m} {n}" for m in ("full", "lora") for n in "012"} | {
        f"full {label(blend)}" for blend in (Region(), CAG(0.3))
    }
    assert {p["name"] for p in results["points"]} == names
    assert all(
        0 <= p["means"][s]["prompt_fidelity"] <= 1
        for p in results["points"]
        for s in results["subjects"]
    )
    base = [p["means"] for p in results["points"] if p["name"] in ("full 0", "lora 0")]
    assert base[0] == base[1]  # nothing of a method is in the base
    assert {f["name"] for f in results["front"]} == {"full", "lora", "full region", "full cag"}


@pytest.mark.heavy
def test_interrupted_in_shards_nothing_is_done_twice_and_the_file_is_the_same(
    finished, tmp_path, monkeypatch
):
    drawn = []
    really = bench.Bench.blends

    def draw(self, *args, **more):
        if len(drawn) == 3 and not (tmp_path / "went on").exists():
            raise KeyboardInterrupt
        drawn.append(1)
        return really(self, *args, **more)

    monkeypatch.setattr(bench.Bench, "blends", draw)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path).run(read_shard("0/2"))
    assert study(tmp_path).finish() is None and not (tmp_path / "results.json").exists()
    (tmp_path / "went on").touch()
    before = contents(tmp_path / "runs")
    study(tmp_path).run(read_shard("1/2"))
    study(tmp_path).run(read_shard("0/2"))
    assert (
        contents(tmp_path / "runs").items() >= before.items()
    )  # the run that was there was not trained again
    assert study(tmp_path).finish()
    assert len(drawn) == 2 * (
        1 + 2 + 2 + 2
        # two subjects: the base, the snapshots of full and of lora, the blends with and without a
        # reference
    )
    assert (tmp_path / "results.json").read_bytes() == (finished / "results.json").read_bytes()
    study(tmp_path).run()
    assert len(drawn) == 14


def test_points_of_other_settings_or_damaged_ones_are_refused(finished, tmp_path):
    from shutil import copytree

    out = Path(copytree(finished, tmp_path / "out"))
    with pytest.raises(InputError, match="other settings"):
        study(out, seeds=(0,)).run()
    (out / "points/navy_cat/full.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        study(out).finish()


def test_points_measured_before_a_measure_was_are_kept_without_it(finished, tmp_path, monkeypatch):
    from shutil import copytree

    out = Path(copytree(finished, tmp_path / "out"))
    path = out / "points/navy_cat/lora.json"
    said = json.loads(path.read_text())
    assert said["points"]["2"].pop("prior") is not None
    path.write_text(json.dumps(said))
    monkeypatch.setattr(bench.Bench, "blends", None)  # nothing is drawn again
    study(out).run()
    means = {p["name"]: p["means"] for p in study(out).finish()["points"]}
    assert (
        means["lora 2"]["navy_cat"]["prior"] is None
        and means["lora 1"]["navy_cat"]["prior"] is not None
    )


def test_the_prior_is_the_likeness_of_what_the_class_noun_alone_draws(mug_photos):
    base = load_backbone("sandbox")

    def asked(prompts):
        return bench.Bench(mug_photos, "sks", "mug", prompts, [3, 4], num_inference_steps=2)

    rows = asked(["a mug"]).single(base)
    assert asked(["a sks mug on the moon"]).prior({"any": Early()}, Models(base, base, base)) == {
        "any": pytest.approx(np.mean([r["subject"] for r in rows]), abs=1e-5)
    }


def test_images_that_are_all_nan_are_told_and_not_scored(tiny_base, mug_photos):
    spoilt = load_backbone(str(tiny_base))
    next(spoilt.denoiser.parameters()).data.fill_(torch.nan)
    asked = bench.Bench(mug_photos, "sks", "mug", ["a sks mug"], [3, 4], num_inference_steps=1)
    for ask in (asked.prior, asked.blends):
        with pytest.raises(InputError, match="every image of far is NaN or infinite"):
            ask({"far": Early()}, Models(spoilt, spoilt, spoilt))


# ------------------------------------------------------------------------------------ what is asked
def test_the_benchmarks_subjects_are_apart_and_its_prompts_can_be_judged():
    assert len(set(sandbox.SUBJECTS)) == 8 and not set(sandbox.SUBJECTS) & set(sandbox.CHOSEN_ON)
    for name in sandbox.SUBJECTS:
        noun = world.SUBJECTS[name].noun
        prompts = sandbox.prompts(noun)
        assert len(set(prompts)) == 20 and prompts == sandbox.prompts(noun)
        assert all(
            f"sks {noun}" in p and not any(home in p for home in world.HOME_PLACES) for p in prompts
        )
        kinds = [sorted(kind for kind, _ in claims(p)) for p in prompts]
        assert all("place" in k for k in kinds) and {kind for k in kinds for kind in k} == {
            "place",
            "colour",
            "noun",
            "wears",
        }


@pytest.mark.parametrize("text", ["4/4", "x", "-1/2", "1"])
def test_a_shard_that_is_none_is_told(text):
    with pytest.raises(InputError, match="0/4"):
        read_shard(text)


# --------------------------------------------------------------------------------- what numbers say
def made(values: dict[str, list[tuple[float, float]]]) -> dict:
    """Points of a subject: name -> (subject fidelity, prompt fidelity)."""
    return {
        n: {
            "subject": s,
            "prompt_fidelity": p,
            "diversity": 1.0,
            "overlap": 0.0,
            "context_mass": 0.1,
        }
        for n, (s, p) in values.items()
    }


def test_outcome_is_the_area_of_the_mean_front_and_its_differences():
    blends = {"region edge=0.2": {"blend": "region", "edge": 0.2}}
    found = {
        ("a", "full"): made({"0": (0.2, 1.0), "400": (0.8, 0.2), "region edge=0.2": (0.8, 0.9)}),
        ("b", "full"): made({"0": (0.4, 1.0), "400": (1.0, 0.4), "region edge=0.2": (0.8, 0.9)}),
    }
    said = outcome(found, blends, {"full": (0, 400)})
    front = {f["name"]: f for f in said["front"]}
    assert front["full"]["hypervolume"] == pytest.approx(
        0.3 * 1.0 + 0.6 * 0.3
    )  # of (.3, 1) and (.9, .3), above (0, 0)
    assert front["full region"]["hypervolume"] == pytest.approx(
        0.3 * 1.0 + 0.5 * 0.9 + 0.1 * 0.3
    )  # with the base and the pair, which a blender has
    low, high = front["full"]["interval"]
    assert low == pytest.approx(0.2 + 0.6 * 0.2) and high == pytest.approx(
        0.4 + 0.6 * 0.4
    )  # one subject drawn twice
    (pair,) = said["paired"]
    assert (pair["a"], pair["b"]) == ("full region", "full") and pair[
        "difference"
    ] == pytest.approx(0.78 - 0.48)
    assert pair["interval"][0] < pair["difference"] < pair["interval"][1]
    single, blend = (
        next(p for p in said["points"] if p["kind"] == kind) for kind in ("single", "region")
    )
    assert (
        blend["above"]["difference"] == pytest.approx(0.9 - (0.3 + 0.1 / 0.6 * 0.7))
        and "above" not in single
    )  # of the line from (.3, 1) to (.9, .3)
    low, high = blend["above"]["interval"]
    assert low == pytest.approx(0.9 - (0.4 + 0.2 / 0.6 * 0.6)) and high == pytest.approx(
        0.7
    )  # b drawn twice; a drawn twice
    assert (single["dial"], single["early"]) == (0, None) and (
        blend["dial"],
        blend["early"],
        blend["late"],
    ) == ({"edge": 0.2}, 0, 400)
    assert outcome(found, blends, {"full": (0, 400)}) == said and np.isfinite(
        json.loads(json.dumps(said))["front"][0]["hypervolume"]
    )
