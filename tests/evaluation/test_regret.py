"""The benchmark of the picked pair: its regret by the images that judge it, and by others."""

from __future__ import annotations

import pytest

from benchmarks.selection import APART, beside, judged


def row(subject: float, prompt: float) -> dict[str, float]:
    return {"subject": subject, "prompt_fidelity": prompt}


SINGLE = 2 * 0.5 * 0.8 / 1.3  # the utility of the best snapshot


def record(picked: tuple[int, int], *seeds: tuple[float, float]) -> dict:
    """Of two pairs, whose utilities in each seed's images are given."""
    alone = [row(0, 1), row(0.5, 0.8), row(1, 0)]  # the base first
    of = {
        str(seed): {"singles": alone, "pairs": {"1 2": row(a, a), "1 3": row(b, b)}}
        for seed, (a, b) in enumerate(seeds)
    }
    return {"seeds": of, "picked": list(picked)}


def test_regret_is_the_share_of_the_best_pairs_worth_that_is_lost():
    found = judged("mug", record((1, 3), (0.8, 0.5), (0.5, 0.7)))
    assert found["best"] == "1 2" and found["best snapshot"] == pytest.approx(SINGLE)
    assert found["its worth"] == pytest.approx(0.65) and found["worth"] == pytest.approx(0.6)
    assert found["regret"] == pytest.approx(1 - 0.6 / 0.65)


def test_a_best_pair_of_other_images_may_be_worse_than_the_picked_one():
    # of the first seed's images "1 2" is best, and worth .5 in the second's, the picked one .7
    found = judged("mug", record((1, 3), (0.8, 0.5), (0.5, 0.7)))
    assert found[APART] == pytest.approx(((1 - 0.7 / 0.5) + 0) / 2)
    assert APART not in judged("mug", record((1, 3), (0.8, 0.5)))


def test_what_a_pick_is_set_against():
    """The same pair for all, the best snapshot and the mean pair, as the best pair's share."""
    records = [record((1, 2), (1, 0.5)), record((1, 2), (0.6, 0.8))]
    rows = [judged(name, of) for name, of in zip("ab", records)]
    assert [row["regret"] for row in rows] == pytest.approx([0, 0.25])
    assert [row["best"] for row in rows] == ["1 2", "1 3"]
    assert beside(records, rows) == pytest.approx(
        {
            "1 2 for all": 0.125,
            "best snapshot": 1 - (SINGLE + SINGLE / 0.8) / 2,
            "mean pair": 1 - (0.75 + 0.7 / 0.8) / 2,
        }
    )
