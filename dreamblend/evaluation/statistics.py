"""How sure a result is: intervals over subjects that hold for few of them. How good a trade-off is:
its hypervolume, and the prompt fidelity that it reaches at a given subject fidelity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dreamblend.errors import InputError

Statistic = Callable[[NDArray], NDArray]  # of means (..., values) over subjects to values (...)
FEWEST = 5  # subjects of an interval: a resample of fewer is too often one subject alone
_AT_ONCE = 50_000  # numbers: what fits into a cache


class Estimate(NamedTuple):
    """A value and its interval, each of the statistic's shape; NaN ends where there is none."""

    value: NDArray
    low: NDArray
    high: NDArray


def estimate(
    values: ArrayLike,
    statistic: Statistic | None = None,
    level: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Estimate:
    """A statistic of the mean over subjects, with its studentised bootstrap interval (Efron and
    Tibshirani 1993, section 12.5). There is no interval of fewer than five subjects.

    Subjects are drawn with replacement, not images: what is to be known is how other subjects would
    do. A resample's deviation counts in units of its own standard error (by the jackknife), as for
    8 to 16 subjects the resamples themselves lie too near to each other: `python -m
    benchmarks.coverage` shows how often either kind of interval holds the truth.

    Args:
        values: (subjects, ...), one entry a subject.
        statistic: of means (n, ...) to values (n, ...); the mean itself where None.
        level: how often the interval is to hold the true value.

    Raises InputError where a value is unknown.
    """
    values = np.asarray(values, np.float64)
    if values.ndim == 0 or not len(values) or np.isnan(values).any():
        raise InputError(
            f"an interval needs a known value for at least one subject, and got {values.shape} with"
            f" {np.isnan(values).sum()} unknown"
        )
    subjects = len(values)
    statistic = _rounded(statistic or (lambda means: means))
    if subjects < FEWEST:
        value = statistic(values.mean(0)[None])[0]
        return Estimate(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
    value, error = (of[0] for of in _with_error(np.ones((1, subjects)), values, statistic))
    counts = np.random.default_rng(seed).multinomial(
        subjects, np.full(subjects, 1 / subjects), size=resamples
    )
    parts = max(1, counts.size * values[0].size // _AT_ONCE)
    drawn, errors = (
        np.concatenate(of)
        for of in zip(
            *(_with_error(some, values, statistic) for some in np.array_split(counts, parts))
        )
    )
    # A resample in which nothing varies has no error of its own: it counts by the largest one.
    errors = np.where(errors > 0, errors, errors.max(0))
    deviations = np.divide(drawn - value, errors, out=np.zeros_like(drawn), where=errors > 0)
    high, low = np.quantile(deviations, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Estimate(value, value - low * error, value - high * error)


def _rounded(statistic: Statistic) -> Statistic:
    """The same to twelve digits: two lines through the same points differ in the last of theirs,
    and a standard error made of those would be a unit for nothing.
    """
    return lambda means: np.round(statistic(means), 12)


def _with_error(counts: NDArray, values: NDArray, statistic: Statistic) -> tuple[NDArray, NDArray]:
    """The statistic of resamples that draw each subject so many times (resamples, subjects), and
    its standard error in each, by the jackknife.
    """
    subjects = len(values)
    means = np.tensordot(counts / subjects, values, 1)
    without = (subjects * means[:, None] - values) / (subjects - 1)  # one of its draws
    left = statistic(without.reshape(-1, *values.shape[1:]))
    left = left.reshape(*counts.shape, *left.shape[1:])
    times = counts.reshape(*counts.shape, *[1] * (left.ndim - 2))
    spread = (times * (left - (times * left).sum(1, keepdims=True) / subjects) ** 2).sum(1)
    return statistic(means), np.sqrt(spread * (subjects - 1) / subjects)


def difference(a: ArrayLike, b: ArrayLike, statistic: Statistic | None = None) -> Estimate:
    """How much more of a statistic a has than b, and its interval, where the same subjects are
    drawn for both: a and b are (subjects, ...), each of its own shape, of the same subjects in the
    same order.
    """
    statistic = statistic or (lambda means: means)
    parts = np.asarray(a, np.float64), np.asarray(b, np.float64)
    shapes = [part.shape[1:] for part in parts]
    both = np.concatenate([part.reshape(len(part), -1) for part in parts], 1)
    cut = both.shape[1] - parts[1][0].size

    def apart(means: NDArray) -> NDArray:
        first, second = (
            statistic(half.reshape(len(means), *shape))
            for half, shape in zip((means[:, :cut], means[:, cut:]), shapes)
        )
        return first - second

    return estimate(both, apart)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> NDArray:
    """Area (...) that points (..., n, 2) dominate above the `reference` point (2,), exactly. Both
    axes: higher is better.

    Zitzler and Thiele (1998). The reference must be stated with the number: nothing below it
    counts.
    """
    points = np.asarray(points, np.float64) - np.asarray(reference, np.float64)
    if points.ndim < 2 or points.shape[-1] != 2:
        raise InputError(f"a hypervolume needs points (n, 2), and got the shape {points.shape}")
    # A point with one coordinate below the reference dominates nothing above it.
    x, y = np.moveaxis(np.where((points > 0).all(-1, keepdims=True), points, 0.0), -1, 0)
    order = np.argsort(-x, axis=-1, kind="stable")
    x, y = (np.take_along_axis(v, order, -1) for v in (x, y))
    width = x - np.concatenate(
        [x[..., 1:], np.zeros_like(x[..., :1])], -1
    )  # of the strip up to the next point
    return (width * np.maximum.accumulate(y, -1)).sum(-1)


def reached(curve: ArrayLike, first: ArrayLike) -> NDArray:
    """The second value (...) that a curve's points (..., n, 2) have at a first value (...).

    The straight line between any two of the points counts: images taken from both of them in turn
    have those means. The best line at the place is taken, so a curve gains nothing by more points
    on its lines; beyond the curve's ends, the end.
    """
    curve = np.asarray(curve, np.float64)
    x, y = np.moveaxis(curve, -1, 0)
    at = np.clip(np.asarray(first, np.float64), x.min(-1), x.max(-1))[..., None]
    a, b = np.triu_indices(x.shape[-1])  # every two, and a point with itself
    width = x[..., b] - x[..., a]
    share = np.clip((at - x[..., a]) / np.where(width, width, 1.0), 0.0, 1.0)
    there = (np.minimum(x[..., a], x[..., b]) <= at) & (at <= np.maximum(x[..., a], x[..., b]))
    return np.where(there, y[..., a] + share * (y[..., b] - y[..., a]), -np.inf).max(-1)


def above(point: ArrayLike, curve: ArrayLike) -> NDArray:
    """By how much a point (..., 2) is better in its second value than what the points (..., n,
    2) of a curve reach at its first.
    """
    first, second = np.moveaxis(np.asarray(point, np.float64), -1, 0)
    return second - reached(curve, first)
