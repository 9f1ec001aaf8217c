"""A benchmark of the sandbox made small: jobs side by side, interrupted and repeated, end in the
same file; and what its numbers say.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from tiny_runs import contents

from benchmarks import former, plan
from benchmarks.command import estimate
from benchmarks.former import Former
from benchmarks.study import Recipe, Study, Subject
from benchmarks.training import Setting, places, render_photos
from dreamblend.blending.blends import CAG, Early, Region
from dreamblend.blending.models import Models
from dreamblend.blending.pair import Pair
from dreamblend.blending.prompts import read_shard
from dreamblend.errors import InputError
from dreamblend.evaluation import bench
from dreamblend.evaluation.measures import DIAGNOSED
from dreamblend.evaluation.outcome import outcome
from dreamblend.models import load_backbone
from dreamblend.sandbox import judges, world
from dreamblend.selection.probes import PROBES
from dreamblend.tuning import Full, LoRA

PLAN = plan.read()
SETTINGS = (Setting(Region()), Setting(CAG(0.3)), Setting(CAG(0.3), grid=16))
RECIPES = (
    Recipe("full", Full, 1e-3, (1, 2), SETTINGS),
    Recipe("lora", lambda: LoRA(rank=2), 1e-3),
)


def study(out: Path, seeds: tuple[int, ...] = (0, 1)) -> Study:
    subjects = tuple(
        Subject(
            name,
            render_photos(name, out / "photos" / name),
            world.SUBJECTS[name].noun,
            PLAN.prompts_of(world.SUBJECTS[name].noun)[:1],
        )
        for name in ("navy_cat", "mint_lamp")
    )
    return Study(
        *("small", out, "sandbox", subjects, RECIPES, (1, 2), seeds, "sandbox"),
        sampling=2,
        questions=PLAN.questions,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study")
    small = study(out)
    small.run()
    assert small.finish()
    return out


def test_what_another_plan_measured_in_the_same_folder_is_left_out(finished, tmp_path):
    whole = study(copytree(finished, tmp_path / "out"))
    fewer = replace(whole, recipes=tuple(replace(r, blends=r.blends[:1]) for r in whole.recipes))
    names = {p["name"] for p in fewer.finish()["points"]}
    every = {p["name"] for p in whole.finish()["points"]}
    assert names < every and {f"full {SETTINGS[0].label}", "full 2", "lora 2"} <= names


def test_results_say_every_point_of_every_subject(finished):
    results = json.loads((finished / "results.json").read_text())
    assert (
        results["subjects"] == ["navy_cat", "mint_lamp"]
        and results["protocol"]["name"] == "sandbox"
        and results["settings"]["seeds"] == [0, 1]
    )
    names = {f"{m} {n}" for m in ("full", "lora") for n in "012"} | {
        f"full {setting.label}" for setting in SETTINGS
    }
    assert {p["name"] for p in results["points"]} == names
    assert all(
        0 <= p["means"][s]["prompt_fidelity"] <= 1
        for p in results["points"]
        for s in results["subjects"]
    )
    base = [p["means"] for p in results["points"] if p["name"] in ("full 0", "lora 0")]
    assert base[0] == base[1]  # nothing of a method is in the base
    tuned = {p["name"]: p["means"]["navy_cat"] for p in results["points"]}["full 2"]
    assert all(
        tuned[measure] is not None for measure in DIAGNOSED if measure != "prompt_sensitivity"
    )
    assert {f["name"] for f in results["front"]} == {"full", "lora", "full region", "full cag"}


def test_a_blend_is_shown_with_the_settings_that_are_not_its_defaults(finished):
    points = json.loads((finished / "results.json").read_text())["points"]
    shown = {p["shown"] for p in points if p["kind"] != "single"}
    assert shown == {"full region", "full cag strength=0.3", "full cag strength=0.3 on 16 x 16"}
    text = (finished / "tables.md").read_text()
    assert all(f"| {name} " in text for name in shown)
    other = Setting(Region(weight=2.0), pair=(25, 400))
    assert other.shown == "region weight=2.0 of 25+400"
    assert {f"{s.shown}" for s in PLAN.methods[0].blends} >= {"region", "region margin=0.2"}
    assert all(
        len({s.shown for s in recipe.blends}) == len(recipe.blends) for recipe in PLAN.methods
    )


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
        1 + 2 + 2 + 3
        # two subjects: the base, the snapshots of full and of lora, the blends with and without a
        # reference, and those of another grid
    )
    assert (tmp_path / "results.json").read_bytes() == (finished / "results.json").read_bytes()
    study(tmp_path).run()
    assert len(drawn) == 16


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


def test_the_former_region_differs_from_todays_by_its_guidance_alone(finished):
    models = Models.load(Pair.find(finished / "runs/navy_cat/full", "1", "2"), "sandbox")

    def images(scale, **blends):
        drawn = {name: [] for name in blends}
        asked = bench.Bench(
            *(finished / "photos/navy_cat", "sks", "cat", ["a sks cat on the moon"], [0, 1], 3),
            scale,
        )
        asked.blends(blends, models, lambda picture: drawn[picture.kind].append(picture.image))
        return drawn

    blends = {"former": Former(), "today": Region(asked=1.0, margin=1.0)}
    alone = images(1.0, **blends)  # without guidance
    assert alone["former"] == alone["today"]
    guided = images(4.0, **blends)
    assert guided["former"] != guided["today"]


def test_the_former_region_asks_for_the_benchmarks_results(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["former", "--out", str(tmp_path)])
    with pytest.raises(InputError, match=r"results.json: run .python -m benchmarks.sandbox"):
        former.main.__wrapped__()


# ------------------------------------------------------------------------------------ what is asked
def test_the_plan_measures_what_nothing_was_chosen_on():
    assert len(set(PLAN.subjects)) >= 12 and len(PLAN.chosen_on) == 2
    nouns = [world.SUBJECTS[name].noun for name in PLAN.subjects]
    assert sorted(nouns) == sorted(world.NOUNS)  # one of each class
    assert not set(PLAN.subjects) & {*PLAN.chosen_on, *PLAN.seen_by_rule}
    assert len(set(PLAN.prompts)) == 20
    assert {*PLAN.subjects, *PLAN.chosen_on} <= set(world.SUBJECTS)
    kinds = [sorted(kind for kind, _ in judges.claims(p)) for p in PLAN.prompts_of("mug")]
    assert all({"place", "noun"} <= set(k) for k in kinds)
    assert {kind for k in kinds for kind in k} >= {"colour", "wears"}


def test_no_prompt_that_is_measured_has_the_context_of_a_probe():
    def read(name):
        lines = (Path(__file__).parents[2] / "configs" / name).read_text().splitlines()
        return [line for line in lines if not line.startswith("#")]

    chosen_by = plan.context_words([*PROBES, *PLAN.chosen_by])
    assert {"wall", "moon", "sea", "meadow", "desert", "bow", "clock", "orange"} <= chosen_by
    for measured in (PLAN.prompts, read("prompts.txt"), places("mug")):
        assert len(measured) >= 5 and not plan.context_words(measured) & chosen_by
        homes = {home for home in world.HOME_PLACES for text in measured if home in text}
        assert not homes


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  - tan_dog", "  - teal_mug", "teal_mug is in two lists"),
        ("  - tan_dog", "  - pale_dog", "the sandbox has no pale_dog"),
        ("a {subject} in the jungle", "a {subject} on the moon", "probes ask for moon"),
        ("a {subject} in the desert", "a {subject} in the jungle", "chosen_by ask for jungle"),
        ("sampling: 6", "samples: 6", "samples, sampling is unknown"),
        ("blend: switch", "blend: swap", "cannot be made .'swap'"),
        ("strength: 0.2", "strenght: 0.2", "strenght"),
    ],
)
def test_a_plan_that_cannot_be_kept_is_told(tmp_path, old, new, told):
    path = tmp_path / "plan.yaml"
    path.write_text(plan.PATH.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=told):
        plan.read(path)


def test_a_plan_may_be_like_another(tmp_path, monkeypatch):
    (tmp_path / "plan.yaml").write_text(plan.PATH.read_text())
    path = tmp_path / "fewer.yaml"
    path.write_text("{like: plan.yaml, seeds: 1, steps: [25, 200]}")
    monkeypatch.setattr("sys.argv", ["sandbox", "--processes", "2", "--plan", str(path)])
    found, _ = plan.named()
    assert (found.seeds, found.steps) == (1, (25, 200))
    assert (found.subjects, found.prompts) == (PLAN.subjects, PLAN.prompts)
    assert found.digest not in (PLAN.digest, plan.read(tmp_path / "plan.yaml").digest)
    joint = plan.read(plan.PATH.with_name("plan_joint.yaml"))
    assert joint.base == "sandbox-dit" and joint.subjects == PLAN.subjects
    (tmp_path / "plan.yaml").write_text(plan.PATH.read_text() + "# another")
    assert plan.read(path).digest != found.digest


def test_the_plan_fits_into_its_hours(tmp_path):
    subjects = tuple(Subject(n, tmp_path, "mug", PLAN.prompts) for n in PLAN.subjects)
    whole = Study(
        *("whole", tmp_path, PLAN.base, subjects, PLAN.methods, PLAN.steps),
        *(tuple(range(PLAN.seeds)), "sandbox", PLAN.sampling, PLAN.scale),
    )
    said = estimate(whole, 2, **PLAN.speed)
    assert float(said.split("about ")[1].split()[0]) < 5  # of six: the regret takes one
    assert whole.images().total() == 12 * 42 * (1 + sum(len(whole.wanted(r)) for r in PLAN.methods))


def test_every_question_has_its_rows(finished):
    rows = json.loads((finished / "results.json").read_text())["questions"]
    assert [q["ask"] for q in PLAN.questions] == list(dict.fromkeys(r["question"] for r in rows))
    by = {q["ask"]: [r for r in rows if r["question"] == q["ask"]] for q in PLAN.questions}
    cag = {r["of"].split(",")[0] for r in by["Does CAG have more than the sweep of its own run?"]}
    assert cag == {"full cag over full"}
    assert len(by["Does any setting of CAG lie above the sweep?"]) == 2
    (regret,) = by["Is the picked pair as good as the best one?"]
    assert regret["value"] is None  # it was not measured
    text = (finished / "tables.md").read_text()
    asked = text.split("\n\n")[1].splitlines()[2:]  # of the first table, under its titles
    assert len(asked) == len(rows) and all(f"| {q['ask']} " in text for q in PLAN.questions)


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


def test_outcome_says_fronts_and_how_blends_differ_from_the_snapshots():
    blends = {
        "region edge=0.2": {"blend": "region", "edge": 0.2},
        "region edge=0.2 of 100+400": {"blend": "region", "edge": 0.2, "early": 100, "late": 400},
    }
    rng = np.random.default_rng(0)
    found = {}
    for name in "abcdef":
        x, y = rng.uniform(-0.1, 0.1, 2)
        points = {"0": (0.3, 0.8), "100": (0.4, 0.6), "400": (0.8, 0.3)}
        points |= {"region edge=0.2": (0.7, 0.7), "region edge=0.2 of 100+400": (0.6, 0.6)}
        moved = {n: (s + x, p + y) for n, (s, p) in points.items()}
        found[name, "full"] = made(moved)
    mean = np.mean(
        [[row["0"][m] for m in ("subject", "prompt_fidelity")] for row in found.values()], 0
    )
    x, y = mean - (0.3, 0.8)
    said = outcome(found, blends, {"full": (0, 400)})
    front = {f["name"]: f for f in said["front"]}
    base, blend, late = (0.3 + x, 0.8 + y), (0.7 + x, 0.7 + y), (0.8 + x, 0.3 + y)
    swept = front["full"]["measured"]["hypervolume"]
    assert swept["value"] == pytest.approx(
        base[0] * base[1] + 0.1 * (0.6 + y) + 0.4 * late[1]
    )  # of the base, 100 and 400, above (0, 0)
    assert swept["interval"][0] < swept["value"] < swept["interval"][1]
    blended = front["full region"]
    assert blended["ends"] == ["full 0", "full 400"]  # which a blender has, too
    assert front["full region of 100+400"]["ends"] == ["full 0", "full 100", "full 400"]
    assert blended["measured"]["hypervolume"]["value"] == pytest.approx(
        base[0] * base[1] + 0.4 * blend[1] + 0.1 * late[1]
    )
    # three quarters of the way from .3 to .8, on the line from the base to the blend
    at = {name: f["measured"]["prompt at 75%"]["value"] for name, f in front.items()}
    assert at["full region"] == pytest.approx(0.8 + y - 0.1 * 0.375 / 0.4)
    assert at["full"] == pytest.approx(0.8 + y - 0.5 * 0.75)
    sweep, other = said["sweep"]
    assert (other["a"], other["b"]) == ("full region of 100+400", "full")
    more = sweep["measured"]["prompt at 75%"]
    assert (sweep["a"], sweep["b"]) == ("full region", "full")
    assert more["value"] == pytest.approx(at["full region"] - at["full"])
    # all subjects differ in the same way, which falls out of the difference
    assert more["interval"] == pytest.approx([more["value"]] * 2)
    single, first, second = (said["points"][i] for i in (0, 3, 4))
    assert first["above"]["value"] == pytest.approx(0.7 - (0.8 - 0.5 * 0.4 / 0.5))
    assert "above" not in single and (single["dial"], single["early"]) == (0, None)
    assert (first["dial"], first["early"], first["late"]) == ({"edge": 0.2}, 0, 400)
    assert (second["dial"], second["early"], second["late"]) == ({"edge": 0.2}, 100, 400)
    json.dumps(said, allow_nan=False)


def test_of_fewer_than_five_subjects_there_is_no_interval():
    found = {(s, "full"): made({"0": (0.2, 1.0), "400": (0.8, 0.2)}) for s in "ab"}
    said = outcome(found, {}, {"full": None})
    assert said["front"][0]["measured"]["hypervolume"]["interval"] is None
    json.dumps(said, allow_nan=False)
