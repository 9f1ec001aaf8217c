"""The outcome of a benchmark's measured points: fronts with their hypervolumes and intervals, and
comparisons of families.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dreamblend.evaluation.measures import COMPARED
from dreamblend.evaluation.statistics import above, bootstrap, hypervolume, hypervolume_interval

# of the hypervolume, in subject and prompt fidelity: a point that shows neither counts for nothing
REFERENCE = (0.0, 0.0)


def outcome(
    rows: dict[tuple[str, str], dict[str, dict]],
    blends: dict[str, dict],
    pairs: dict[str, tuple[int, int] | None],
) -> dict:
    """Points, fronts and comparisons of a study.

    Args:
        rows: (subject, method) -> point -> its means over images; a point is a step, or a blend's
            label.
        blends: label -> the blend's settings.
        pairs: method -> early and late step of its blends.

    Returns a dictionary for JSON. subjects; reference; points: name, method, kind (single or the
    blend's), dial, early, late, means by subject, and of a blend's point by how much prompt
    fidelity it lies above its method's base and snapshots; front: a family (a method's snapshots,
    or a blend over its dial) with its hypervolume over the means of all subjects and a 95 %
    interval over subjects, where whoever blends has the base and the pair itself, too (ends);
    paired: the difference of hypervolumes of two families on the same resamples.
    """
    subjects = list(dict.fromkeys(s for s, _ in rows))
    points: list[dict[str, Any]] = []
    for method, pair in pairs.items():
        for name in rows[subjects[0], method]:
            single = name.isdecimal()
            early, late = (None, None) if single or pair is None else pair
            dial = int(name) if single else {k: v for k, v in blends[name].items() if k != "blend"}
            means = {s: {m: rows[s, method][name].get(m) for m in COMPARED} for s in subjects}
            kind = "single" if single else blends[name]["blend"]
            points.append(
                {
                    "name": f"{method} {name}",
                    "method": method,
                    "kind": kind,
                    "dial": dial,
                    "early": early,
                    "late": late,
                    "means": means,
                }
            )
    families: dict[str, list[dict]] = {}
    for point in points:
        family = (
            point["method"] if point["kind"] == "single" else f"{point['method']} {point['kind']}"
        )
        families.setdefault(family, []).append(point)
    at = {p["name"]: p for p in points}
    for point in points:
        if point["kind"] != "single":
            point["above"] = _above(point, families[point["method"]], subjects)
    ends = {family: _ends(of[0]) for family, of in families.items()}
    values = {
        family: _values(of + [at[name] for name in ends[family]], subjects)
        for family, of in families.items()
    }
    front = []
    for family, of in families.items():
        volume = float(hypervolume(values[family].mean(0), REFERENCE))
        interval = hypervolume_interval(values[family], REFERENCE)
        record = {
            "name": family,
            "kind": of[0]["kind"],
            "points": [p["name"] for p in of],
            "ends": ends[family],
        }
        front.append({**record, "hypervolume": volume, "interval": list(interval)})
    best = max(front, key=lambda f: f["hypervolume"])["name"]
    paired = [
        {"a": best, "b": other, **_difference(values[best], values[other])}
        for other in families
        if other != best
    ]
    return {
        "subjects": subjects,
        "reference": list(REFERENCE),
        "points": points,
        "front": front,
        "paired": paired,
    }


def _ends(point: dict) -> list[str]:
    """The base and the pair, of a blend's point."""
    if point["kind"] == "single":
        return []
    return list(
        dict.fromkeys(f"{point['method']} {step}" for step in (0, point["early"], point["late"]))
    )


def _values(points: list[dict], subjects: list[str]) -> np.ndarray:
    """(subjects, points, 2): subject and prompt fidelity."""
    return np.array(
        [
            [[p["means"][s]["subject"], p["means"][s]["prompt_fidelity"]] for p in points]
            for s in subjects
        ],
        np.float64,
    )


def _above(point: dict, singles: list[dict], subjects: list[str]) -> dict:
    """How much more prompt fidelity a point has than the snapshots at its subject fidelity, and its
    interval over subjects.
    """
    values = _values([point, *singles], subjects)
    return _estimate(values, lambda means: above(means[..., 0, :], means[..., 1:, :]))


def _difference(a: np.ndarray, b: np.ndarray) -> dict:
    """How much more hypervolume a has than b, (subjects, n, 2) each, and its interval where the
    same subjects are drawn for both.
    """
    n = a.shape[1]
    both = np.concatenate([a, b], 1)
    return _estimate(
        both,
        lambda means: (
            hypervolume(means[..., :n, :], REFERENCE) - hypervolume(means[..., n:, :], REFERENCE)
        ),
    )


def _estimate(values: np.ndarray, difference: Callable[[np.ndarray], np.ndarray]) -> dict:
    """A difference that is computed from means over subjects, and its interval; values (subjects,
    n, 2).
    """
    low, high = bootstrap(values, difference)
    return {"difference": float(difference(values.mean(0))), "interval": [float(low), float(high)]}
