"""The pair, picked: the rule on made-up measures, and the command on a short run of the sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blend import main
from dreamblend.errors import InputError
from dreamblend.evaluation import survey
from dreamblend.evaluation.bench import Bench
from dreamblend.selection import choose_earlier, choose_early, choose_late, utility
from dreamblend.tuning import Full
from tiny_runs import command, fit, step

BASE = {"name": "base", "step": 0, "subject": .3, "prompt_fidelity": 1., "diversity": 2.}


def row(number: int, subject: float, prompt: float, diversity: float | None = 2.) -> dict:
    return {"name": str(number), "step": number, "subject": subject, "prompt_fidelity": prompt, "diversity": diversity}


def blend(early: int, late: int, subject: float, prompt: float) -> dict:
    return {"name": f"{early} + {late}", "early": early, "late": late, "subject": subject, "prompt_fidelity": prompt, "diversity": 2.}


SINGLES = [row(10, .31, .99), row(25, .4, .97), row(50, .6, .96), row(100, .8, .7), row(200, .9, .4), row(400, .85, .1)]


# ------------------------------------------------------------------------------------------------ the rule
@pytest.mark.parametrize("keep, expected", [(.98, 10), (.965, 25), (.95, 50), (.6, 100), (.05, 200)])  # the last one is never early
def test_early_is_the_latest_that_keeps_the_prompt(keep, expected):
    early, why = choose_early(BASE, SINGLES, keep)
    assert early["step"] == expected and f"{early['prompt_fidelity']:.3f}" in why


def test_early_is_no_later_than_the_first_loss():
    """One that seems to recover is noise."""
    assert choose_early(BASE, [row(10, .3, 1.), row(25, .4, .8), row(50, .6, .99), row(100, .8, .5)])[0]["step"] == 10


def test_early_keeps_diversity_too_where_it_is_known():
    rows = [row(10, .3, 1., 1.9), row(25, .4, 1., .9), row(50, .6, 1., .9)]
    early, why = choose_early(BASE, rows)
    assert early["step"] == 10 and "diversity" in why
    assert choose_early({**BASE, "diversity": None}, [{**r, "diversity": None} for r in rows])[0]["step"] == 25


def test_early_of_a_run_that_forgot_at_once_is_its_first_and_says_so():
    early, why = choose_early(BASE, [row(10, .5, .6), row(25, .6, .5)])
    assert early["step"] == 10 and "earlier" in why


def test_a_pair_needs_two_snapshots():
    with pytest.raises(InputError, match="two snapshots"):
        choose_early(BASE, SINGLES[:1])


def test_late_is_the_one_whose_blend_has_both():
    blended = [blend(50, 100, .7, .95), blend(50, 200, .85, .93), blend(50, 400, .86, .3)]  # the last one takes the prompt with it
    late, why = choose_late(BASE, SINGLES, blended)
    assert late["late"] == 200 and "step 50" in why and ".850" in why and ".930" in why


@pytest.mark.parametrize("worth, expected", [(1., 50), (.98, 25), (.5, 10)])
def test_early_moves_back_as_far_as_its_blend_loses_nothing(worth, expected):
    blended = [blend(10, 200, .6, .99), blend(25, 200, .88, .97), blend(50, 200, .9, .97)]
    early, why = choose_earlier(BASE, SINGLES, blended, worth)
    assert early["early"] == expected and "step 200" in why
    assert choose_earlier(BASE, SINGLES, blended[:1])[0]["early"] == 10


def test_utility_is_one_at_its_best_zero_where_either_is_lost_and_free_of_scale():
    assert utility(row(1, .9, 1.), BASE, SINGLES) == pytest.approx(1)
    assert utility(row(1, .3, 1.), BASE, SINGLES) == utility(row(1, .9, .1), BASE, SINGLES) == utility(row(1, .2, .05), BASE, SINGLES) == 0
    clip = lambda r: {**r, "prompt_fidelity": .2 + .1 * r["prompt_fidelity"], "subject": 100 * r["subject"]}
    for r in SINGLES:
        assert utility(clip(r), clip(BASE), [clip(s) for s in SINGLES]) == pytest.approx(utility(r, BASE, SINGLES))


def test_a_run_that_learned_nothing_is_told():
    with pytest.raises(InputError, match="train longer"):
        utility(SINGLES[0], BASE, [row(10, .3, 1.), row(20, .29, 1.)])


# --------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def run(mug_photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("selected") / "run"
    fit("sandbox", mug_photos, out, Full(), steps=[1, 5, 12], rate=2e-3, data={"batch_size": 4})
    return out


FEW = ["--steps", 3, "--seeds", "7-8", "--prompts", '["a picture of a {subject} on the moon"]']


def test_select_writes_the_pair_with_its_reasons_and_predict_takes_it(run, tmp_path, monkeypatch):
    measured = []
    really = Bench.blends
    monkeypatch.setattr(Bench, "blends", lambda self, *args, **more: measured.append(1) or really(self, *args, **more))

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
    assert said["reasons"]["early"] in out and said["reasons"]["late"] in out and "<svg" in (run / "pair.html").read_text()
    assert said["about"]["prompts"] == ["a picture of a sks mug on the moon"] and said["about"]["protocol"]["name"] == "sandbox"

    # a second time nothing is drawn and nothing changes
    before = {p: p.read_bytes() for p in run.glob("*.*") if p.is_file()}
    count = len(measured)
    assert command(main, "select", "--run", run, *FEW)[0] == 0 and len(measured) == count
    assert before == {p: p.read_bytes() for p in run.glob("*.*") if p.is_file()}

    words = ["predict", "--run", run, "--prompts", '["a {subject}"]', "--seeds", 0, "--out", tmp_path, "--model.steps", 2, "--trainer.accelerator", "cpu"]
    status, out, err = command(main, *words)
    assert status == 0, err
    assert f"early {said['early']} and late {said['late']}" in out and len(measured) == count
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(line["early"], line["late"]) for line in lines} == {(str(said["early"]), str(said["late"]))}


def test_a_pair_of_other_snapshots_is_not_taken(run, tmp_path):
    from shutil import copytree, rmtree

    from dreamblend.evaluation import pick

    copy = Path(copytree(run, tmp_path / "run"))
    weights = {str(n): "-" for n in (1, 5, 12)}
    (copy / "pair.json").write_text(json.dumps({"early": 1, "late": 12, "weights": weights}))
    assert pick.picked(copy) is None
    (copy / "pair.json").write_text(json.dumps({"early": 1, "late": 12, "weights": pick._weights(copy)}))
    assert pick.picked(copy) == (1, 12)
    rmtree(step(copy, 5))
    assert pick.picked(copy) is None
    (copy / "pair.json").write_text("{")
    assert pick.picked(copy) is None


@pytest.mark.parametrize("words, say", [
    (["predict", "--prompts", "[a]"], "--run"), (["predict", "--run", "{run}", "--early", "1", "--prompts", "[a]"], "name both"),
    (["select", "--run", "nowhere"], "nowhere"), (["select", "--run", "{run}", "--judges", "nobody"], "nobody"),
    (["select", "--run", "{run}", "--seeds", "x"], "seeds"),
])
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
