"""Do 95 % intervals over few subjects hold the truth 95 times in 100? `python -m
benchmarks.coverage`: simulated studies whose truth is known.

Each study draws 8, 12 or 16 subjects. A subject's values go up and down together, as those of real
subjects do. The interval of `dreamblend.evaluation.statistics` is set beside the percentile
interval and BCa (Efron and Tibshirani 1993, chapters 13 and 14).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.record import Record
from benchmarks.tables import markdown
from dreamblend.cli import entry
from dreamblend.evaluation.outcome import REFERENCE, prompt_at
from dreamblend.evaluation.statistics import Statistic, estimate, hypervolume

SUBJECTS = (8, 12, 16)
RESAMPLES = 1000
NORMAL = NormalDist()

Draw = Callable[[NDArray, NDArray], NDArray]  # of centres and standard normal effects
POPULATIONS: dict[str, Draw] = {
    "normal": lambda centre, effect: centre + 0.1 * effect,
    "skewed": lambda centre, effect: centre * np.exp(0.6 * effect - 0.18),  # log-normal
    # as fidelities are, with many subjects near the end of the scale
    "bounded": lambda centre, effect: (
        1 / (1 + np.exp(-np.log(centre / (1 - centre)) - 1.2 * effect))
    ),
}
# subject and prompt fidelity from the base to the late snapshot
FRONT = np.array([[0.1, 0.92], [0.2, 0.91], [0.4, 0.88], [0.65, 0.8], [0.75, 0.7], [0.78, 0.5]])
STATISTICS: dict[str, tuple[NDArray, Statistic]] = {  # the centres of a subject's values; of means
    "mean": (np.array([0.6]), lambda means: means[:, 0]),
    "paired difference": (np.array([0.7, 0.65]), lambda means: means[:, 0] - means[:, 1]),
    "hypervolume": (FRONT, lambda means: hypervolume(means, REFERENCE)),
    "prompt fidelity at 75 %": (FRONT, lambda means: prompt_at(means, 0.75)),
}


def subjects(draw: Draw, centres: NDArray, number: int, rng: np.random.Generator) -> NDArray:
    """Values (number, *centres) of some subjects."""
    common = rng.standard_normal((number, *[1] * centres.ndim))
    return draw(centres, 0.8 * common + 0.6 * rng.standard_normal((number, *centres.shape)))


def others(values: NDArray, statistic: Statistic, seed: int) -> dict[str, NDArray]:
    """The percentile and the BCa interval (low, high)."""
    number = len(values)
    counts = np.random.default_rng(seed).multinomial(
        number, np.full(number, 1 / number), size=RESAMPLES
    )
    drawn = statistic(np.tensordot(counts / number, values, 1))
    value = statistic(values.mean(0)[None])[0]
    left = statistic((number * values.mean(0) - values) / (number - 1))
    pulls = left.mean() - left
    acceleration = (pulls**3).sum() / (6 * (pulls**2).sum() ** 1.5)
    below = ((drawn < value).mean() + (drawn <= value).mean()) / 2
    bias = NORMAL.inv_cdf(np.clip(below, 1 / RESAMPLES, 1 - 1 / RESAMPLES))
    ends = [bias + NORMAL.inv_cdf(end) for end in (0.025, 0.975)]
    corrected = [NORMAL.cdf(bias + end / (1 - acceleration * end)) for end in ends]
    return {
        "percentile": np.quantile(drawn, [0.025, 0.975]),
        "BCa": np.quantile(drawn, corrected),
    }


def covered(population: str, name: str, number: int, studies: int) -> dict:
    """How often each kind of interval holds the truth, and how wide it is on average."""
    (centres, statistic), draw = STATISTICS[name], POPULATIONS[population]
    rng = np.random.default_rng(0)
    truth = statistic(subjects(draw, centres, 400_000, rng).mean(0)[None])[0]
    held: dict[str, list[bool]] = {}
    width: dict[str, list[float]] = {}
    for study in range(studies):
        values = subjects(draw, centres, number, rng)
        found = others(values, statistic, study)
        found["studentised"] = np.array(
            estimate(values, statistic, resamples=RESAMPLES, seed=study)[1:]
        )
        for kind, (low, high) in found.items():
            held.setdefault(kind, []).append(bool(low <= truth <= high))
            width.setdefault(kind, []).append(high - low)
    return {
        "held": {kind: float(np.mean(of)) for kind, of in held.items()},
        "width": {kind: float(np.mean(of)) for kind, of in width.items()},
    }


@entry
def main() -> None:
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("--studies", type=int, default=1000, help="of each kind")
    asked.add_argument("--out", type=Path, default=Path("runs/coverage.json"))
    args = asked.parse_args()
    settings = {"studies": args.studies, "resamples": RESAMPLES, "level": 0.95}
    record = Record(args.out, settings, rows={})
    for name, population, number in tqdm([*product(STATISTICS, POPULATIONS, SUBJECTS)]):
        kind = f"{name}, {population}, {number} subjects"
        if kind not in record["rows"]:
            record["rows"][kind] = covered(population, name, number, args.studies)
            record.save()
    print("\n" + markdown([{"kind": kind, **row["held"]} for kind, row in record["rows"].items()]))
    print(f"\nresults are in {args.out}")


if __name__ == "__main__":
    main()
