"""The figures of a comparison, for its page and for a paper: the same colour and marker for a
method, and for a kind of blend, in each of them.

Colours are Okabe and Ito's (2008), which colour-blind readers tell apart; markers and line styles
differ too, for grey print.
"""

from __future__ import annotations

import io
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamblend.evaluation.measures import title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#9A8B00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "svg.hashsalt": "dreamblend",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "text.parse_math": False,
}

Family = dict[str, Any]


def mean(point: dict, measure: str) -> float:
    """A point's mean over subjects; NaN where it is not known of all."""
    values = [of.get(measure) for of in point["means"].values()]
    return float(np.mean(values)) if values and all(v is not None for v in values) else float("nan")


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points that no other one beats in both, by the first coordinate."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept[::-1]


def fronts(families: list[Family], across: str = "subject", up: str = "prompt_fidelity") -> Figure:
    """Every family's points over two measures, joined in the order of its dial: the snapshots of
    all methods in the first panel, and the blends of each method over its snapshots in one of its
    own. A blend has one colour in all of them. Where both measures are fidelities, a band joins the
    points that no other one of all panels beats in both.
    """
    alone = [family for family in families if family["kind"] == "single"]
    blends = [family for family in families if family["kind"] != "single"]
    kinds = list(dict.fromkeys(family["kind"] for family in blends))
    methods = list(dict.fromkeys(_method(family) for family in blends))
    columns, rows = min(2, 1 + len(methods)), -(-(1 + len(methods)) // 2)
    plot, figure, axes = _figure(4.9 * columns, 3.6 * rows, columns, rows, sharex=True, sharey=True)
    axes = np.atleast_1d(axes).ravel()
    trace = partial(_trace, across=across, up=up)
    for i, family in enumerate(alone):
        trace(axes[0], family, **_style(i))
    axes[0].set_title("snapshots", fontsize=9)
    for axis, method in zip(axes[1:], methods):
        for family in (family for family in families if _method(family) == method):
            if family["kind"] == "single":
                trace(axis, family, color="#999999", marker="o")
            else:
                trace(axis, family, linestyle="--", **_style(kinds.index(family["kind"])))
        axis.set_title(f"blends of {method}", fontsize=9)
    best = pareto([(mean(p, across), mean(p, up)) for family in families for p in family["points"]])
    for axis in axes[: 1 + len(methods)]:
        if (across, up) == ("subject", "prompt_fidelity"):
            axis.plot(
                *zip(*best), color="#000", alpha=0.1, linewidth=7, solid_capstyle="round", zorder=0
            )
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
    for axis in axes[1 + len(methods) :]:
        axis.set_axis_off()
    figure.supxlabel(title(across), fontsize=9)
    figure.supylabel(title(up), fontsize=9)
    return _closed(plot, figure)


def _method(family: Family) -> str:
    return str(family["points"][0]["method"])


def _style(number: int) -> dict[str, str]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _trace(axis: Any, family: Family, across: str, up: str, **style: Any) -> None:
    """A family's points in a panel of its method; snapshots and blends of another pair than the
    method's own are open markers.
    """
    x, y = ([mean(p, m) for p in family["points"]] for m in (across, up))
    label = family["name"].removeprefix(f"{_method(family)} ")
    if label != family["kind"]:
        style["markerfacecolor"] = "white"
    axis.plot(x, y, label=label, linewidth=1, markersize=4.5, **style)


def differences(rows: list[dict[str, Any]]) -> Figure:
    """How much more each blend has than the snapshots of its own run, by each measure, with its
    interval where there is one.
    """
    measures = list(rows[0]["measured"])
    plot, figure, axes = _figure(
        2.2 + 1.5 * len(measures), 0.8 + 0.24 * len(rows), len(measures), sharey=True
    )
    for axis, measure in zip(np.atleast_1d(axes), measures):
        axis.axvline(0, color="#999999", linewidth=0.8)
        for place, row in enumerate(rows):
            said = row["measured"][measure]
            if said["interval"]:
                axis.plot(said["interval"], [place, place], color="#444444", linewidth=1)
            axis.plot(said["value"], place, marker="o", markersize=4, color=COLOURS[0])
        axis.set_title(measure, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=4)
        axis.set(yticks=range(len(rows)), yticklabels=[row["a"] for row in rows])
    np.atleast_1d(axes)[0].invert_yaxis()
    return _closed(plot, figure)


def curves(families: list[Family], measures: list[str]) -> Figure:
    """Measures of the methods' snapshots over the training steps."""
    columns = min(3, len(measures))  # more could not be read on a phone
    rows = -(-len(measures) // columns)
    plot, figure, axes = _figure(2.6 * columns, 2.4 * rows, columns, rows)
    axes = np.atleast_1d(axes).ravel()
    alone = [family for family in families if family["kind"] == "single"]
    steps = sorted({p["dial"] for family in alone for p in family["points"]})
    for axis, measure in zip(axes, measures):
        for i, family in enumerate(alone):
            points = sorted((p["dial"], mean(p, measure)) for p in family["points"])
            axis.plot(
                *zip(*points),
                **_style(i),
                markersize=3.5,
                linewidth=1,
                label=family["name"],
            )
        axis.set_xscale(
            "symlog", linthresh=max(steps[:2]), linscale=0.3
        )  # from the base to the first snapshot is one short stretch
        axis.xaxis.set(ticks=_labelled(steps), major_formatter="{x:g}")
        axis.set_xticks(steps, minor=True)
        axis.xaxis.set_minor_formatter("")
        axis.set(xlabel="step")
        axis.set_title(title(measure), fontsize=8)
    for axis in axes[len(measures) :]:
        axis.set_axis_off()
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        fontsize=8,
        frameon=False,
    )
    return _closed(plot, figure)


def _labelled(steps: list[int]) -> list[int]:
    """The steps of a logarithmic axis whose numbers have room: the last one, and before it each
    that is far enough from the next.
    """
    kept = [steps[-1]]
    for step in reversed(steps[:-1]):
        if step <= 0.6 * kept[-1]:
            kept.append(step)
    return kept


def drawn(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of an `svg` or `png` file: the same for the same numbers."""
    stream = io.BytesIO()
    with _plot().rc_context(_STYLE):
        figure.savefig(
            stream,
            format=kind,
            dpi=200,
            metadata={"Date": None} if kind == "svg" else {"Software": None},
            bbox_inches="tight",
        )
    return stream.getvalue()


def _plot() -> ModuleType:
    """matplotlib's pyplot."""
    import matplotlib  # here, as it takes long to load

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _figure(
    width: float, height: float, columns: int = 1, rows: int = 1, **shared: bool
) -> tuple[ModuleType, Figure, Any]:
    """pyplot, a figure, and its axes: one, or an array of them."""
    plot = _plot()
    with plot.rc_context(_STYLE):
        return plot, *plot.subplots(
            rows, columns, figsize=(width, height), layout="constrained", **shared
        )


def _closed(plot: ModuleType, figure: Figure) -> Figure:
    plot.close(figure)  # pyplot forgets it; it can still be drawn
    return figure
