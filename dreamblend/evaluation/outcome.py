"""The outcome of a benchmark's measured points: fronts with their hypervolumes and their prompt
fidelity at fixed subject fidelities, and how each differs from the sweep of plain snapshots.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dreamblend.evaluation.measures import COMPARED, DIAGNOSED
from dreamblend.evaluation.statistics import (
    Estimate,
    Statistic,
    above,
    difference,
    estimate,
    hypervolume,
    reached,
)

# of the hypervolume, in subject and prompt fidelity: a point that shows neither counts for nothing
REFERENCE = (0.0, 0.0)
# of the way in subject fidelity from a method's base to its late snapshot
SHARES = (0.5, 0.75, 0.9)
KEPT = tuple(dict.fromkeys((*COMPARED, *DIAGNOSED)))  # what is known of a point, where it is


def prompt_at(means: NDArray, share: float) -> NDArray:
    """The prompt fidelity (...) of a front (..., n, 2) at a share of the way in subject fidelity
    from its first point, the base, to its last one, the late snapshot.

    It is read from the straight lines between the front's points (`statistics.reached`). Every
    front has the base and the late snapshot, so none ends before the place.
    """
    base, late = means[..., 0, 0], means[..., -1, 0]
    return reached(means, base + share * (late - base))


# What is said of a front, by name: of the means over subjects of its points, the base first and the
# late snapshot last.
MEASURED: dict[str, Statistic] = {
    "hypervolume": lambda means: hypervolume(means, REFERENCE),
    **{f"prompt at {s:.0%}": partial(prompt_at, share=s) for s in SHARES},
}


def outcome(
    rows: dict[tuple[str, str], dict[str, dict]],
    blends: dict[str, dict],
    pairs: dict[str, tuple[int, int] | None],
) -> dict:
    """Points, fronts and comparisons of a study.

    Args:
        rows: (subject, method) -> point -> its means over images; a point is a step, or a blend's
            label.
        blends: label -> the blend's settings; `early` and `late` among them are the pair, where it
            is not the method's own, and `shown` is what readers call it, where that is not the
            label.
        pairs: method -> early and late step of its blends.

    Returns a dictionary for JSON. subjects; reference; points: name, what is shown of it, method,
    kind (single or the blend's), dial, early, late, means by subject, and of a blend's point by how
    much prompt fidelity it lies `above` its method's base and snapshots; front: a family (a
    method's snapshots, or a blend of one pair over its settings) with the base, the pair itself,
    which whoever blends has, too, and the method's late snapshot (ends), and the estimates of
    `MEASURED`; sweep: how much more a blend has of each than the snapshots of its own method. An
    estimate is a value and its 95 % interval over subjects, or no interval for fewer than five.
    """
    subjects = list(dict.fromkeys(s for s, _ in rows))
    points: list[dict[str, Any]] = []
    for method, pair in pairs.items():
        for name in rows[subjects[0], method]:
            single = name.isdecimal()
            settings = {} if single else dict(blends[name])
            early, late = (
                settings.pop(end, of) for end, of in zip(("early", "late"), pair or (None, None))
            )
            kind = "single" if single else settings.pop("blend")
            points.append(
                {
                    "name": f"{method} {name}",
                    "shown": f"{method} {settings.pop('shown', name)}",
                    "method": method,
                    "kind": kind,
                    "dial": int(name) if single else settings,
                    "early": None if single else early,
                    "late": None if single else late,
                    "means": {s: {m: rows[s, method][name].get(m) for m in KEPT} for s in subjects},
                }
            )
    families: dict[str, list[dict]] = {}
    for point in points:
        families.setdefault(_family(point, pairs[point["method"]]), []).append(point)
    at = {p["name"]: p for p in points}
    for point in points:
        if point["kind"] != "single":
            point["above"] = said(above_sweep(point, families[point["method"]], subjects))
    front: list[dict[str, Any]] = []
    sweep: list[dict[str, Any]] = []
    values = {}
    for family, of in families.items():
        method, kind = of[0]["method"], of[0]["kind"]
        late = (pairs[method] or [max(p["dial"] for p in families[method])])[-1]
        ends = _ends(of, f"{method} 0", f"{method} {late}")
        # the base first and the late snapshot last
        names = [n for n in dict.fromkeys([*(p["name"] for p in of), *ends]) if n not in ends]
        values[family] = _values([at[n] for n in (ends[0], *names, *ends[1:])], subjects)
        front.append(
            {
                "name": family,
                "kind": kind,
                "points": [p["name"] for p in of],
                "ends": [] if kind == "single" else ends,
                "measured": {
                    name: said(estimate(values[family], statistic))
                    for name, statistic in MEASURED.items()
                },
            }
        )
        if kind != "single":
            sweep.append(
                {
                    "a": family,
                    "b": method,
                    "measured": {
                        name: said(difference(values[family], values[method], statistic))
                        for name, statistic in MEASURED.items()
                    },
                }
            )
    return {
        "subjects": subjects,
        "reference": list(REFERENCE),
        "points": points,
        "front": front,
        "sweep": sweep,
    }


def above_sweep(point: dict, sweep: list[dict], subjects: list[str], **settings: Any) -> Estimate:
    """How much more prompt fidelity a point has than the points of a sweep reach at its subject
    fidelity; settings are those of `statistics.estimate`.
    """
    values = _values([point, *sweep], subjects)
    return estimate(values, lambda means: above(means[..., 0, :], means[..., 1:, :]), **settings)


def said(estimate: Estimate) -> dict[str, Any]:
    """An estimate for JSON: its value and its interval, None where there is none."""
    value, low, high = (float(end) for end in estimate)
    return {"value": value, "interval": None if np.isnan(low) else [low, high]}


def _family(point: dict, pair: tuple[int, int] | None) -> str:
    """The front that a point is of: its method's snapshots, or a blend of one pair, which is named
    where it is not the method's own.
    """
    if point["kind"] == "single":
        return point["method"]
    own = (point["early"], point["late"])
    return f"{point['method']} {point['kind']}" + (f" of {own[0]}+{own[1]}" if own != pair else "")


def _ends(points: list[dict], base: str, late: str) -> list[str]:
    """The base, the pair of the points, and the method's late snapshot, each once."""
    method = points[0]["method"]
    own = [f"{method} {p[end]}" for end in ("early", "late") for p in points if p[end] is not None]
    return [*dict.fromkeys(name for name in (base, *own) if name != late), late]


def _values(points: list[dict], subjects: list[str]) -> NDArray:
    """(subjects, points, 2): subject and prompt fidelity."""
    return np.array(
        [
            [[p["means"][s]["subject"], p["means"][s]["prompt_fidelity"]] for p in points]
            for s in subjects
        ],
        np.float64,
    )
