"""The pair, picked: the rule on made-up measures, and the command on a short run of the sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import command, fit, step

from blend import main
from dreamblend.blending.blends import CAG, Region
from dreamblend.blending.module import Blender
from dreamblend.blending.options import Options
from dreamblend.errors import InputError
from dreamblend.evaluation.bench import Bench
from dreamblend.selection import survey
from dreamblend.selection.command import picked
from dreamblend.selection.noise import jackknife, standard_errors
from dreamblend.selection.rule import (
    choose,
    choose_earlier,
    choose_early,
    choose_late,
    choose_single,
    collapsed,
)
from dreamblend.selection.utility import Utility
from dreamblend.storage.runs import open_run
from dreamblend.tuning import Full, LoRA

BASE = {"name": "base", "step": 0, "subject": 0.3, "prompt_fidelity": 1.0, "diversity": 2.0}


def row(number: int, subject: float, prompt: float, diversity: float | None = 2.0) -> dict:
    return {
        "name": str(number),
        "step": number,
        "subject": subject,
        "prompt_fidelity": prompt,
        "diversity": diversity,
    }


def blend(early: int, late: int, subject: float, prompt: float) -> dict:
    return {
        "name": f"{early} + {late}",
        "early": early,
        "late": late,
        "subject": subject,
        "prompt_fidelity": prompt,
        "diversity": 2.0,
    }


SINGLES = [
    row(10, 0.31, 0.99),
    row(25, 0.4, 0.97),
    row(50, 0.6, 0.96),
    row(100, 0.8, 0.7),
    row(200, 0.9, 0.4),
    row(400, 0.85, 0.1),
]


# ----------------------------------------------------------------------------------------- the rule
@pytest.mark.parametrize(
    "keep, expected", [(0.98, 10), (0.965, 25), (0.95, 50), (0.6, 100), (0.05, 200)]
)  # the last one is never early
def test_early_is_the_latest_that_keeps_the_prompt(keep, expected):
    early, why = choose_early(BASE, SINGLES, keep)
    assert early["step"] == expected and f"{early['prompt_fidelity']:.3f}" in why


def test_early_is_no_later_than_the_first_loss():
    """One that seems to recover is noise."""
    assert (
        choose_early(
            BASE, [row(10, 0.3, 1.0), row(25, 0.4, 0.8), row(50, 0.6, 0.99), row(100, 0.8, 0.5)]
        )[0]["step"]
        == 10
    )


def test_early_keeps_diversity_too_where_it_is_known():
    rows = [row(10, 0.3, 1.0, 1.9), row(25, 0.4, 1.0, 0.9), row(50, 0.6, 1.0, 0.9)]
    early, why = choose_early(BASE, rows)
    assert early["step"] == 10 and "diversity" in why
    assert (
        choose_early({**BASE, "diversity": None}, [{**r, "diversity": None} for r in rows])[0][
            "step"
        ]
        == 25
    )


def test_early_of_a_run_that_forgot_at_once_is_its_first_and_says_so():
    early, why = choose_early(BASE, [row(10, 0.5, 0.6), row(25, 0.6, 0.5)])
    assert early["step"] == 10 and "earlier" in why


def test_a_pair_needs_two_snapshots():
    with pytest.raises(InputError, match="two snapshots"):
        choose_early(BASE, SINGLES[:1])


def test_late_is_the_one_whose_blend_has_both():
    blended = [
        blend(50, 100, 0.7, 0.95),
        blend(50, 200, 0.85, 0.93),
        blend(50, 400, 0.86, 0.3),
    ]  # the last one takes the prompt with it
    late, why = choose_late(BASE, SINGLES, blended)
    assert late["late"] == 200 and "step 50" in why and ".850" in why and ".930" in why


def test_a_pair_is_chosen_by_one_row_and_one_column_of_blends():
    subject = {100: 0.7, 200: 0.88, 400: 0.86}
    prompt = {100: 0.95, 200: 0.96, 400: 0.3}
    asked = []

    def measure(pairs):
        asked.append(pairs)
        return [
            blend(*pair, subject[pair[1]] - 0.3 * (pair[0] == 10), prompt[pair[1]])
            for pair in pairs
        ]

    choice = choose(BASE, SINGLES, measure)
    assert asked == [[(50, 100), (50, 200), (50, 400)], [(10, 200), (25, 200)]]
    assert (choice.early, choice.late) == (25, 200)
    assert [(row["early"], row["late"]) for row in choice.blends] == sum(asked, [])
    assert "of those up to step 50" in choice.reasons["early"]


@pytest.mark.parametrize("worth, expected", [(1.0, 50), (0.98, 25), (0.5, 10)])
def test_early_moves_back_as_far_as_its_blend_loses_nothing(worth, expected):
    blended = [blend(10, 200, 0.6, 0.99), blend(25, 200, 0.88, 0.97), blend(50, 200, 0.9, 0.97)]
    early, why = choose_earlier(BASE, SINGLES, blended, worth)
    assert early["early"] == expected and "step 200" in why
    assert choose_earlier(BASE, SINGLES, blended[:1])[0]["early"] == 10


def test_utility_is_one_at_its_best_zero_where_either_is_lost_and_free_of_scale():
    assert Utility(BASE, SINGLES)(row(1, 0.9, 1.0)) == pytest.approx(1)
    assert (
        Utility(BASE, SINGLES)(row(1, 0.3, 1.0))
        == Utility(BASE, SINGLES)(row(1, 0.9, 0.1))
        == Utility(BASE, SINGLES)(row(1, 0.2, 0.05))
        == 0
    )

    def clip(r):
        return {
            **r,
            "prompt_fidelity": 0.2 + 0.1 * r["prompt_fidelity"],
            "subject": 100 * r["subject"],
        }

    for r in SINGLES:
        assert Utility(clip(BASE), [clip(s) for s in SINGLES])(clip(r)) == pytest.approx(
            Utility(BASE, SINGLES)(r)
        )


def test_utility_is_bounded_on_both_axes():
    """A blend that has more of both than any snapshot is worth 1 and no more; a little of one does
    not pay for the other.
    """
    assert Utility(BASE, SINGLES)(row(1, 5.0, 3.0)) == 1
    assert Utility(BASE, SINGLES)(row(1, 5.0, 0.1)) == 0
    assert Utility(BASE, SINGLES)(row(1, 5.0, 0.55)) == Utility(BASE, SINGLES)(row(1, 0.9, 0.55))


def of_images(
    number: int, subject: float, prompt: float, spread: float = 0.0, own: float = 0.0
) -> dict:
    """A row with images of six prompts, two seeds each: `spread` is what all rows share of a
    prompt, `own` what this one has alone.
    """
    images = [
        {
            "prompt": f"p{p}",
            "seed": s,
            "subject": subject + own * (-1) ** (p + number),
            "diversity": 2.0,
            "prompt_fidelity": prompt + spread * (p - 2.5) + own * (-1) ** (p + number),
        }
        for p in range(6)
        for s in range(2)
    ]
    return {**row(number, subject, prompt), "images": images}


def test_the_error_is_that_of_the_mean_over_prompts_and_what_rows_share_cancels():
    import numpy as np

    one, other = of_images(1, 0.5, 0.30, spread=0.01), of_images(3, 0.5, 0.29, spread=0.01)
    wanted = (
        np.std(0.01 * (np.arange(6) - 2.5), ddof=1) / 6**0.5
    )  # by hand: twelve images of six prompts are no twelve prompts
    assert standard_errors(one)["prompt_fidelity"] == pytest.approx(wanted)
    assert jackknife(
        lambda rows: rows[0]["prompt_fidelity"] - rows[1]["prompt_fidelity"], [one, other]
    ) == pytest.approx(0, abs=1e-12)
    assert (
        jackknife(lambda rows: rows[0]["subject"], [row(1, 0.5, 0.3)]) is None
    )  # no images, nothing known
    single = {**one, "images": one["images"][:1]}
    assert set(standard_errors(single).values()) == {None}


def test_a_difference_within_the_noise_is_not_the_whole_scale():
    """Cosines of CLIP, .300 of the base and .296 of the worst snapshot: that may be nothing, and
    does not decide over the subject.
    """
    base, blends = of_images(0, 0.3, 0.300), []
    singles = [of_images(10, 0.4, 0.299, own=0.01), of_images(50, 0.9, 0.296, own=0.01)]
    strict = [{k: v for k, v in r.items() if k != "images"} for r in (base, *singles)]
    late = {**of_images(50, 0.9, 0.296, own=0.01), "late": 50, "early": 10}
    assert Utility(strict[0], strict[1:])(strict[2]) == 0  # as if all of the prompt were forgotten
    assert 0.7 < Utility(base, singles)(singles[1]) < 1
    blends = [{**of_images(100, 0.6, 0.300, own=0.01), "late": 100, "early": 10}, late]
    chosen, why = choose_late(base, singles, blends)
    assert (
        chosen["late"] == 50
        and "cannot tell whether any snapshot forgot the prompt" in why
        and ".004" in why
    )
    sharp = [of_images(10, 0.4, 0.299), of_images(50, 0.9, 0.296)]  # the same means without noise
    assert Utility(base, sharp)(sharp[1]) == 0


def test_what_the_probes_cannot_tell_is_said():
    base = of_images(0, 0.3, 1.0)
    singles = [
        of_images(10, 0.32, 0.99),
        of_images(100, 0.8, 0.5),
        of_images(200, 0.9, 0.4),
    ]
    blends = [
        {**of_images(n, s, 0.9, own=own), "early": 10, "late": n}
        for n, s, own in ((100, 0.70, 0.1), (201, 0.71, 0.1), (300, 0.4, 0.0))
    ]
    late, why = choose_late(base, singles, blends)
    assert late["late"] == 201 and "cannot tell it from late 100, whose" in why
    assert (
        "cannot tell"
        not in choose_late(
            base,
            singles,
            [{**r, "images": of_images(r["late"], r["subject"], 0.9)["images"]} for r in blends],
        )[1]
    )
    earlier = [{**r, "early": n, "late": 200} for n, r in zip((10, 20), blends)]
    assert "cannot tell it from early 20" in choose_earlier(base, singles, earlier, 0.9)[1]
    early, why = choose_earlier(base, singles, earlier, worth=1.0)
    assert early["early"] == 10 and "as much as the best within the noise" in why
    sharp = [
        {**r, "images": of_images(r["early"], r["subject"], 0.9)["images"]} for r in earlier
    ]  # the same means without noise
    assert choose_earlier(base, singles, sharp, worth=1.0)[0]["early"] == 20
    lost = [of_images(10, 0.3, 0.99), of_images(21, 0.4, 0.94, own=0.05), of_images(30, 0.5, 0.5)]
    assert (
        "cannot tell for sure" in choose_early(base, lost)[1]
        and "cannot tell" not in choose_early(base, [*lost[:1], *lost[2:], lost[2]])[1]
    )
    few = [{**r, "images": r["images"][:1]} for r in (base, *singles, *blends)]
    assert "give more --seeds" in choose_late(few[0], few[1:4], few[4:])[1]


def test_the_best_alone_is_named_with_its_error_and_those_that_are_as_good():
    base = of_images(0, 0.3, 1.0)
    rows = [of_images(10, 0.4, 0.95), of_images(101, 0.8, 0.8, own=0.1)]
    rows.append(of_images(200, 0.81, 0.79, own=0.1))
    step, why = choose_single(base, [*rows, of_images(400, 0.82, 0.3)])
    assert step == 101 and "±" in why and "cannot tell it from step 200, whose" in why
    sharp = [of_images(n, *values) for n, *values in ((10, 0.4, 0.95), (100, 0.8, 0.8))]
    assert "cannot tell" not in choose_single(base, [*sharp, of_images(200, 0.8, 0.5)])[1]


def test_a_last_snapshot_that_collapsed_is_told():
    base = of_images(0, 0.3, 1.0)
    good, better = of_images(10, 0.6, 0.95), of_images(20, 0.8, 0.9)
    assert collapsed(base, [good, better]) is None
    assert "has collapsed: its prompt" in str(collapsed(base, [good, of_images(20, 0.9, 0.4)]))
    assert "10 has subject" in str(collapsed(base, [good, of_images(20, 0.6, 0.8)]))
    unsure = of_images(21, 0.6, 0.8, own=0.5)
    assert collapsed(base, [good, unsure]) is None
    alike = of_images(20, 0.9, 0.9)
    alike |= {"diversity": 0.5, "images": [{**i, "diversity": 0.5} for i in alike["images"]]}
    assert "diversity" in str(collapsed(base, [good, alike]))
    assert collapsed(BASE, SINGLES) is None  # without images nothing is sure


def test_a_run_that_learned_nothing_is_told():
    with pytest.raises(InputError, match="train longer"):
        Utility(BASE, [row(10, 0.3, 1.0), row(20, 0.29, 1.0)])


# -------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def run(mug_photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("selected") / "run"
    fit(
        "sandbox",
        mug_photos,
        out,
        Full(),
        steps=[1, 5, 12],
        learning_rate=2e-3,
        data={"batch_size": 4},
    )
    return out


FEW = ["--steps", 3, "--seeds", "7-8", "--prompts", '["a picture of a {subject} on the moon"]']


@pytest.mark.holds("select", of="stable_diffusion")
def test_select_writes_the_pair_with_its_reasons_and_predict_takes_it(run, tmp_path, monkeypatch):
    measured = []
    really = Bench.blends
    monkeypatch.setattr(
        Bench,
        "blends",
        lambda self, *args, **more: measured.append(1) or really(self, *args, **more),
    )

    # interrupted after two measurements, it goes on with the third
    keep = survey.Survey._keep

    def interrupted(self, key, point):
        keep(self, key, point)
        if len(self.points) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(survey.Survey, "_keep", interrupted)
        assert command(main, "select", "--run", run, *FEW)[0] == 130
    assert len(measured) == 2 and not (run / "pair.json").exists()
    status, out, err = command(main, "select", "--run", run, *FEW)
    assert status == 0, err
    said = json.loads((run / "pair.json").read_text())
    assert len(measured) == 4 + len(said["blends"]) and said["early"] < said["late"]
    assert (
        said["reasons"]["early"] in out
        and said["reasons"]["late"] in out
        and "<svg" in (run / "pair.html").read_text()
    )
    assert (
        said["about"]["prompts"] == ["a picture of a sks mug on the moon"]
        and said["about"]["protocol"]["name"] == "sandbox"
    )

    # a second time nothing is drawn and nothing changes
    before = {p: p.read_bytes() for p in run.glob("*.*") if p.is_file()}
    count = len(measured)
    assert command(main, "select", "--run", run, *FEW)[0] == 0 and len(measured) == count
    assert before == {p: p.read_bytes() for p in run.glob("*.*") if p.is_file()}

    # for another blend only blends are drawn; what was measured for the first one stays
    assert command(main, "select", "--run", run, *FEW, "--blend", "Switch")[0] == 0
    switched = json.loads((run / "pair.json").read_text())
    assert switched["about"]["blend"]["blend"] == "switch" and len(measured) == count + len(
        switched["blends"]
    )
    count = len(measured)
    assert command(main, "select", "--run", run, *FEW)[0] == 0 and len(measured) == count
    assert before[run / "pair.json"] == (run / "pair.json").read_bytes()

    words = [
        "predict",
        "--run",
        run,
        "--prompts",
        '["a {subject}"]',
        "--seeds",
        0,
        "--out",
        tmp_path,
        "--model.num_inference_steps",
        2,
        "--trainer.accelerator",
        "cpu",
    ]
    status, out, err = command(main, *words)
    assert status == 0, err
    assert f"early {said['early']} and late {said['late']}" in out and len(measured) == count
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(line["early"], line["late"]) for line in lines} == {
        (str(said["early"]), str(said["late"]))
    }


def test_predict_picks_a_pair_for_what_will_draw_it(run, tmp_path, monkeypatch):
    """Not for select's defaults; and by what it was told of the rest."""
    from dreamblend.selection import command as pick

    asked = []

    def ask(run, blend, **more):
        asked.append({**blend.settings, **more})
        raise InputError("that is enough")

    monkeypatch.setattr(pick, "select", ask)
    words = [
        "predict",
        "--run",
        run,
        "--prompts",
        '["a {subject}"]',
        "--out",
        tmp_path,
        "--trainer.accelerator",
        "cpu",
    ]
    more = [
        "--model.blend",
        "Merge",
        "--model.blend.weight",
        0.7,
        "--model.guidance_scale",
        6,
        "--model.num_inference_steps",
        5,
        "--model.grid",
        16,
        "--model.quantize",
        "int8",
        "--model.height",
        64,
        "--model.attention_layers",
        '["mid_block"]',
        "--model.offload",
        "model",
        "--model.scheduler",
        "euler",
        "--model.negative_prompt",
        "blurry",
        "--model.guidance_rescale",
        0.7,
    ]
    assert command(main, *words, *more)[0] == 2
    assert asked == [
        {
            "blend": "merge",
            "weight": 0.7,
            "num_inference_steps": 5,
            "guidance_scale": 6.0,
            "grid": 16,
            "quantize": "int8",
            "height": 64,
            "attention_layers": ["mid_block"],
            "offload": "model",
            "scheduler": "euler",
            "negative_prompt": "blurry",
            "guidance_rescale": 0.7,
        }
    ]


OPTIONS = {"scheduler": "euler", "negative_prompt": "blurry", "guidance_rescale": 0.7}


def test_a_survey_draws_as_predict_does_with_its_options(tiny_base, mug_photos, tmp_path):
    fit(tiny_base, mug_photos, tmp_path, LoRA(rank=2), steps=[1, 2], learning_rate=0.1)

    how = {"num_inference_steps": 2, "guidance_scale": 20.0}
    blender = Blender("1", "2", tmp_path, **how, **OPTIONS)
    drawn = blender.draw([("a sks mug", 7)], 1)
    wanted = {p.kind: np.array(p.image, dtype=float) for p in drawn}["early"]

    def surveyed(**options) -> np.ndarray:
        probes = ["a {subject}"], [7], Region()
        made = survey.Survey(tmp_path, *probes, judges="none", options=Options(**options), **how)
        made.singles()
        (kept,) = made.image_folders["1"].iterdir()
        return np.array(Image.open(kept), dtype=float)

    np.testing.assert_allclose(surveyed(**OPTIONS), wanted, atol=1)
    assert np.abs(surveyed() - wanted).max() > 3


def test_options_without_effect_are_refused(tiny_base, mug_photos, tmp_path):
    fit(tiny_base, mug_photos, tmp_path, LoRA(rank=2), steps=[1, 2])
    words = ["select", "--run", tmp_path, "--judges", "none", "--guidance_scale", 1]
    status, _, err = command(main, *words, "--negative_prompt", "blurry")
    assert status == 2 and "negative_prompt acts on what guidance adds" in err


@pytest.mark.heavy
def test_a_pair_is_picked_for_its_sampler(run):
    words = [item for name, value in OPTIONS.items() for item in (f"--{name}", value)]
    assert command(main, "select", "--run", run, *FEW, *words)[0] == 0
    said = json.loads((run / "pair.json").read_text())
    assert OPTIONS.items() <= said["about"].items()
    pair = said["early"], said["late"]
    assert picked(run, options=Options(**OPTIONS)) == pair and picked(run) is None


@pytest.mark.parametrize("tuning", [Full, LoRA])
def test_half_precision_surveys_a_run_too(run, mug_photos, tmp_path, tuning):
    """As on a GPU: the base is the one that the run was tuned from, whatever it is cast to."""
    made = run if tuning is Full else tmp_path / "run"
    if tuning is LoRA:
        fit("sandbox", mug_photos, made, LoRA(rank=2), steps=[1, 2])
    made = survey.Survey(made, ["a {subject} on the moon"], [7], Region(), num_inference_steps=1)
    made.dtype = "bf16"
    base, singles = made.singles()
    assert base["step"] == 0 and len(singles) >= 2 and base["subject"] is not None


def test_a_pair_of_other_snapshots_is_not_taken(run, tmp_path):
    from shutil import copytree, rmtree

    from dreamblend.selection import command as pick

    copy = Path(copytree(run, tmp_path / "run"))
    weights = {str(n): "-" for n in (1, 5, 12)}
    about = {
        "blend": Region().settings,
        "guidance_scale": 4.0,
        "grid": None,
        "num_inference_steps": 25,
    }
    (copy / "pair.json").write_text(
        json.dumps({"early": 1, "late": 12, "weights": weights, "about": about})
    )
    assert pick.picked(copy) is None
    (copy / "pair.json").write_text(
        json.dumps(
            {"early": 1, "late": 12, "weights": pick._weights(open_run(copy)), "about": about}
        )
    )
    assert pick.picked(copy) == (1, 12)
    sized = (Region(), 4.0, None, 96, 64)
    for other in ((CAG(),), (Region(weight=1.0),), (Region(), 7.5), (Region(), 4.0, 16), sized):
        assert pick.picked(copy, *other) is None
    for name, value in OPTIONS.items():
        assert pick.picked(copy, options=Options(**{name: value})) is None
    sampled = {"early": 1, "late": 12, "weights": pick._weights(open_run(copy))}
    (copy / "pair.json").write_text(json.dumps({**sampled, "about": {**about, **OPTIONS}}))
    assert pick.picked(copy) is None and pick.last_picked(copy) == (1, 12)
    assert pick.picked(copy, options=Options(**OPTIONS)) == (1, 12)
    rmtree(step(copy, 5))
    assert pick.picked(copy) is pick.last_picked(copy) is None
    (copy / "pair.json").write_text("{")
    assert pick.picked(copy) is None


@pytest.mark.parametrize(
    "words, say",
    [
        (["predict", "--prompts", "[a]"], "--run"),
        (["predict", "--run", "{run}", "--early", "1", "--prompts", "[a]"], "name both"),
        (["select", "--run", "nowhere"], "nowhere"),
        (["select", "--run", "{run}", "--judges", "nobody"], "nobody"),
        (["select", "--run", "{run}", "--seeds", "x"], "seeds"),
    ],
)
def test_wrong_input_is_one_sentence(run, words, say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = command(main, *[w.format(run=run) for w in words])
    assert status == 2 and say in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_a_run_whose_photos_are_gone_says_so(mug_photos, tiny_base, tmp_path):
    from shutil import copytree, rmtree

    photos = copytree(mug_photos, tmp_path / "photos")
    fit(tiny_base, photos, tmp_path / "run", steps=[1, 2])
    rmtree(photos)
    status, _, err = command(main, "select", "--run", tmp_path / "run")
    assert status == 2 and str(photos) in err and "put them back" in err
