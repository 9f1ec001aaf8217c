"""How sure a result is: bootstrap intervals over subjects. How good a trade-off is: its
hypervolume, and how far a point lies above it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dreamblend.errors import InputError


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[NDArray], NDArray] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[NDArray, NDArray]:
    """Percentile interval (low, high) of a statistic of the mean over subjects (Efron and
    Tibshirani 1993, chapter 13).

    Subjects are drawn with replacement, not images: what is to be known is how another set of
    subjects would do.

    Args:
        values: (subjects, ...), one entry a subject.
        statistic: of means (resamples, ...) to values (resamples, ...); the mean itself where None.
        level: share of the resamples that the interval holds.
    """
    values = np.asarray(values, np.float64)
    if values.ndim == 0 or not len(values) or np.isnan(values).any():
        raise InputError(
            f"an interval needs a known value for at least one subject, and got {values.shape} with"
            f" {np.isnan(values).sum()} unknown"
        )
    # How often each subject was drawn, over their number: the means are one product, with no copy
    # of the values a resample.
    drawn = np.random.default_rng(seed).multinomial(
        len(values), np.full(len(values), 1 / len(values)), size=resamples
    ) / len(values)
    means = np.tensordot(drawn, values, 1)
    low, high = np.quantile(
        means if statistic is None else statistic(means), [(1 - level) / 2, (1 + level) / 2], axis=0
    )
    return low, high


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


def hypervolume_interval(
    points: ArrayLike, reference: ArrayLike, **settings: Any
) -> tuple[float, float]:
    """Bootstrap interval of the hypervolume of the points' means over subjects: points (subjects,
    n, 2).
    """
    low, high = bootstrap(points, lambda means: hypervolume(means, reference), **settings)
    return float(low), float(high)


def above(point: ArrayLike, curve: ArrayLike) -> NDArray:
    """By how much a point (..., 2) is better in its second value than a curve's points (..., n, 2)
    at its first.

    The straight line between any two of the curve's points counts as reachable, and the best line
    at the place is taken; beyond the curve's ends, the end.
    """
    curve = np.asarray(curve, np.float64)
    x, y = np.moveaxis(curve, -1, 0)
    first, second = np.moveaxis(np.asarray(point, np.float64), -1, 0)
    at = np.clip(first, x.min(-1), x.max(-1))[..., None]
    a, b = np.triu_indices(x.shape[-1])  # every two, and a point with itself
    width = x[..., b] - x[..., a]
    share = np.clip((at - x[..., a]) / np.where(width, width, 1.0), 0.0, 1.0)
    there = (np.minimum(x[..., a], x[..., b]) <= at) & (at <= np.maximum(x[..., a], x[..., b]))
    return second - np.where(there, y[..., a] + share * (y[..., b] - y[..., a]), -np.inf).max(-1)
