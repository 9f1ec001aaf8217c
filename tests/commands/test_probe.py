"""What is measured while training goes on is what the snapshots show afterwards, and training does
not notice.
"""

from __future__ import annotations

import csv

import pytest
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from tiny_runs import contents, fit, step

from dreamblend.callbacks import Probe
from dreamblend.errors import InputError
from dreamblend.evaluation.bench import Bench, means
from dreamblend.models import load_backbone
from dreamblend.storage import snapshots
from dreamblend.tuning import Full, restore


def test_curves_are_those_of_the_snapshots_and_training_does_not_notice(
    tiny_base, mug_photos, tmp_path
):
    logger = CSVLogger(tmp_path / "logs")
    probe = Probe(
        ["a {subject} on the beach", "a {subject}"],
        seeds=2,
        num_inference_steps=2,
        judges="sandbox",
    )
    options = dict(tuning=Full(text_encoder=True), steps=[1, 3])
    module = fit(
        tiny_base,
        mug_photos,
        tmp_path / "a",
        callbacks=(EMAWeightAveraging(decay=0.5), probe),
        trainer={"logger": logger},
        **options,
    )
    fit(
        tiny_base, mug_photos, tmp_path / "b", callbacks=(EMAWeightAveraging(decay=0.5),), **options
    )
    assert all(m.training for m in module.trained)

    def weights(run):
        return {k: v for k, v in contents(step(run, 3)).items() if k.endswith("safetensors")}

    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    logger.save()
    with open(next(tmp_path.rglob("metrics.csv"))) as file:
        logged = {
            int(row["step"]): {k[6:]: float(v) for k, v in row.items() if k.startswith("probe/")}
            for row in csv.DictReader(file)
            if row["probe/subject"]
        }
    assert list(logged) == [0, 1, 3] and logged[0] != logged[3]
    base = load_backbone(str(tiny_base))
    bench = Bench(
        mug_photos, "sks", "mug", ["a sks mug on the beach", "a sks mug"], [1000, 1001], 2
    )
    for number, curve in logged.items():
        wanted = means(
            bench.single(
                base
                if number == 0
                else restore(snapshots.read(step(tmp_path / "a", number)), base, "restored")
            )
        )
        assert {
            "subject",
            "prompt_fidelity",
            "diversity",
            "overlap",
            "context_mass",
            "prior",
        } <= curve.keys()
        assert {k: v for k, v in curve.items() if k != "prior"} == pytest.approx(
            {k: v for k, v in wanted.items() if v is not None}, abs=1e-4
        )


def test_what_stops_it_is_told_before_training(tiny_base, mug_photos, tmp_path):
    for callback, options, told in (
        (Probe(), {"logger": CSVLogger(tmp_path)}, "cannot load the evaluator"),
        (Probe(judges="sandbox"), {}, "logger"),
    ):
        with pytest.raises(InputError, match=told):
            fit(
                tiny_base,
                mug_photos,
                tmp_path / "run",
                steps=[1],
                callbacks=(callback,),
                trainer=options,
            )
    assert not (tmp_path / "run/snapshots").exists() or not list(
        (tmp_path / "run/snapshots").iterdir()
    )
    with pytest.raises(InputError, match="at least 1"):
        Probe(seeds=0)
