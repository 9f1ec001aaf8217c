"""Intervals over subjects hold the truth as often as they say, and what is read from a front is
what its points give.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import coverage
from dreamblend.errors import InputError
from dreamblend.evaluation.outcome import MEASURED, prompt_at
from dreamblend.evaluation.statistics import (
    above,
    difference,
    estimate,
    hypervolume,
    reached,
)


# ---------------------------------------------------------------------------------------- intervals
def test_an_interval_is_deterministic_and_narrower_with_more_subjects():
    values = np.random.default_rng(0).normal(0.5, 0.1, (64, 3))
    few, many = estimate(values[:8]), estimate(values)
    assert all(np.array_equal(*ends) for ends in zip(few, estimate(values[:8])))
    assert not np.array_equal(few.low, estimate(values[:8], seed=1).low)
    assert few.low.shape == (3,) and (many.high - many.low < few.high - few.low).all()
    np.testing.assert_allclose(many.value, values.mean(0))
    assert ((many.low < many.value) & (many.value < many.high)).all()
    # as Student's of normal values, and never much narrower; the quantiles are of 63 and of 7
    # degrees of freedom
    for of, subjects, quantile in ((many, 64, 1.998), (few, 8, 2.365)):
        error = values[:subjects].std(0, ddof=1) / subjects**0.5
        wide = (of.high - of.low) / (2 * quantile * error)
        assert (wide > 0.95).all() and (subjects < 64 or (wide < 1.05).all())
    half = estimate(values[:, 0], level=0.5)
    assert many.low[0] < half.low < half.high < many.high[0]


def test_what_has_no_interval():
    for few in ([0.7], [0.1, 0.4, 0.2, 0.9]):
        of = estimate(few)
        assert of.value == pytest.approx(np.mean(few)) and np.isnan([of.low, of.high]).all()
    same = estimate(np.full(5, 0.3))
    assert (same.low, same.value, same.high) == pytest.approx((0.3, 0.3, 0.3))
    nearly = estimate([0.0, 0, 0, 0, 0, 0, 0, 0.1])  # most resamples of one value have no error
    assert 0 < nearly.value < nearly.high < 1 and nearly.low <= nearly.value
    for bad in ([], [0.1, np.nan], 0.3):
        with pytest.raises(InputError, match="interval"):
            estimate(bad)


def test_points_on_a_fronts_lines_make_no_difference_and_no_interval():
    """Not even one of the last digit, whose standard error would be a unit for nothing."""
    of = np.random.default_rng(1).uniform(0.1, 0.9, (12, 3, 2))
    shares = np.linspace(0.05, 0.95, 7)[:, None]
    between = of[:, :1] + shares * (of[:, -1:] - of[:, :1])
    more = np.concatenate([of[:, :1], between, of[:, 1:]], 1)
    for name in ("prompt at 50%", "prompt at 90%"):
        same = difference(more, of, MEASURED[name])
        assert (same.low, same.value, same.high) == (0, 0, 0)


def test_an_interval_of_a_ratio_follows_its_scale():
    values = np.random.default_rng(3).gamma(2.0, 1.0, (9, 2))

    def ratio(means):
        return means[:, 0] / means[:, 1]

    one, ten = estimate(values, ratio), estimate(values * [10, 1], ratio)
    np.testing.assert_allclose(np.array(ten), 10 * np.array(one))


def test_a_difference_of_the_same_subjects_is_the_mean_of_differences():
    rng = np.random.default_rng(2)
    common = rng.normal(0, 1, (10, 1))
    a, b = common + rng.normal(0.1, 0.01, (10, 1)), common + rng.normal(0, 0.01, (10, 1))
    np.testing.assert_allclose(np.array(difference(a, b)), np.array(estimate(a - b)), atol=1e-12)
    assert difference(a, b).low > 0 > estimate(a).low  # what subjects have in common falls out
    fronts = rng.random((10, 3, 2)), rng.random((10, 4, 2))  # each of its own number of points
    between = difference(*fronts, lambda means: hypervolume(means, [0, 0]))
    parts = [hypervolume(front.mean(0), [0, 0]) for front in fronts]
    assert between.value == pytest.approx(parts[0] - parts[1])


@pytest.mark.parametrize("name", ["mean", "hypervolume"])
def test_the_interval_holds_more_often_than_the_percentiles(name):
    row = coverage.covered("bounded", name, 8, studies=30)
    assert row["held"]["studentised"] >= max(0.85, row["held"]["percentile"])


def test_the_command_writes_every_row(tmp_path, monkeypatch):
    out = tmp_path / "coverage.json"
    monkeypatch.setattr(coverage, "SUBJECTS", (8,))
    monkeypatch.setattr(coverage, "POPULATIONS", {"normal": coverage.POPULATIONS["normal"]})
    monkeypatch.setattr("sys.argv", ["coverage", "--studies", "1", "--out", str(out)])
    coverage.main()
    before = out.read_bytes()
    rows = json.loads(before)["rows"]
    assert list(rows) == [f"{name}, normal, 8 subjects" for name in coverage.STATISTICS]
    assert all(0 <= held <= 1 for row in rows.values() for held in row["held"].values())
    monkeypatch.setattr(coverage, "covered", None)  # nothing is simulated twice
    coverage.main()
    assert out.read_bytes() == before


# ------------------------------------------------------------------------------------------- fronts
def test_hypervolume_against_counting_cells():
    rng = np.random.default_rng(0)
    for _ in range(30):
        points, reference = rng.integers(-3, 12, (rng.integers(1, 8), 2)), rng.integers(-2, 3, 2)
        cells = sum(
            any(x + 1 <= a and y + 1 <= b for a, b in points)
            for x in range(reference[0], 12)
            for y in range(reference[1], 12)
        )
        assert hypervolume(points, reference) == cells
    assert hypervolume([[0.5, 0.4]], [0, 0]) == pytest.approx(0.2)
    assert hypervolume([[0.5, 0.4], [0.5, 0.4], [0.2, 0.1]], [0, 0]) == pytest.approx(0.2)
    assert hypervolume(rng.random((5, 3, 2)), [0, 0]).shape == (5,)
    with pytest.raises(InputError, match="points"):
        hypervolume([0.5, 0.4], [0, 0])


def test_above_is_over_the_best_line_between_two_of_the_curve_and_over_its_ends():
    falling = np.array(
        [[0.1, 1.0], [0.5, 0.9], [0.8, 0.4]]
    )  # bends outwards: the best lines are those between neighbours
    for x in np.linspace(0.1, 0.8, 15):
        assert above([x, 0.7], falling) == pytest.approx(0.7 - np.interp(x, *falling.T))
    assert above([0.5, 0.9], np.insert(falling, 1, [0.3, 0.2], 0)) == pytest.approx(
        0
    )  # a point below the others' lines changes nothing
    assert above([0.3, 0.95], np.insert(falling, 1, [0.3, 0.2], 0)) == pytest.approx(0)
    assert above([0.9, 0.5], falling) == pytest.approx(0.1) and above(
        [0.0, 0.5], falling
    ) == pytest.approx(-0.5)
    assert above([0.5, 0.5], [[0.5, 0.2], [0.5, 0.4]]) == pytest.approx(0.1)  # one above the other
    rng = np.random.default_rng(0)
    points, curves = rng.random((7, 2)), rng.random((7, 4, 2))
    np.testing.assert_allclose(above(points, curves), [above(p, c) for p, c in zip(points, curves)])


def test_the_prompt_at_a_subject_fidelity_gains_nothing_by_more_points_on_the_lines():
    front = np.array([[0.1, 0.9], [0.5, 0.8], [0.9, 0.2]])  # the base first, the late one last
    between = (front[:-1] + front[1:]) / 2
    more = np.concatenate([front[:1], between, front[1:]])
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        wanted = np.interp(0.1 + share * 0.8, *front.T)
        assert prompt_at(front, share) == pytest.approx(wanted)
        assert prompt_at(more, share) == pytest.approx(wanted)
    beyond = np.insert(front, 1, [1.2, 0.6], 0)  # a point with more subject than the late snapshot
    assert prompt_at(beyond, 1.0) == pytest.approx(np.interp(0.9, [0.5, 1.2], [0.8, 0.6]))
    assert reached(front, 2.0) == pytest.approx(0.2) and reached(front, -1.0) == pytest.approx(0.9)
    many = np.random.default_rng(0).random((6, 5, 2))
    for statistic in MEASURED.values():
        np.testing.assert_allclose(statistic(many), [statistic(m) for m in many])
