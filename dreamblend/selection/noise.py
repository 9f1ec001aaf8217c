"""How much of a difference between rows of measures may be noise. Rows in, standard errors out."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

from dreamblend.evaluation.measures import TRADE_OFF

Row = dict[str, Any]
SURE = 2  # standard errors of a difference, below which it is noise: about 95 %


def jackknife(statistic: Callable[[list[Row]], float], rows: list[Row]) -> float | None:
    """Standard error of a statistic of rows' means (Efron and Tibshirani 1993, chapter 11); None
    where it cannot be estimated.

    One prompt after another (with one prompt, one seed) is left out of all rows at once. So the
    rows' common part in a prompt cancels in their differences, and images of one prompt do not
    count as independent.
    """
    if not all(row.get("images") for row in rows):
        return None
    unit = "prompt" if len({image["prompt"] for image in rows[0]["images"]}) > 1 else "seed"
    parts = sorted({image[unit] for row in rows for image in row["images"]})
    without = [
        [_means([image for image in row["images"] if image[unit] != part]) for row in rows]
        for part in parts
    ]
    try:
        values = [statistic(some) for some in without]
    except (KeyError, TypeError):  # a measure is of too few images
        return None
    if len(values) < 2:
        return None
    middle = fmean(values)
    return math.sqrt(
        (len(values) - 1) / len(values) * sum((value - middle) ** 2 for value in values)
    )


def standard_errors(row: Row) -> dict[str, float | None]:
    """Of a row's means."""

    def error(name: str) -> float | None:
        return jackknife(lambda rows: rows[0][name], [row])

    return {name: error(name) for name in TRADE_OFF}


def _means(images: list[Row]) -> Row:
    known = {
        name: [image[name] for image in images if image[name] is not None] for name in TRADE_OFF
    }
    return {name: fmean(values) for name, values in known.items() if values}


def noise_of(statistic: Callable[[list[Row]], float], rows: list[Row]) -> float | None:
    """The size below which a statistic's value may be noise."""
    error = jackknife(statistic, rows)
    return None if error is None else SURE * error
