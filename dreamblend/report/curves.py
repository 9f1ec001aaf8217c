"""Measures over the training steps, drawn as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

from dreamblend.evaluation.measures import title
from dreamblend.report.text import number

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 326, 24, 156  # edges of the plot inside the picture

Point = tuple[int, float]  # step, value


def curve(
    measure: str, points: Sequence[Point], steps: Iterable[int], marks: dict[str, int]
) -> Markup:
    """An SVG of one measure over steps, with a vertical line at each step of `marks` (name ->
    step).

    The axis spans `steps` too: with the same for all measures, curves can be compared where one
    lacks a point.
    """
    points, steps = sorted(points), sorted({*steps, *marks.values(), *(step for step, _ in points)})
    x, logarithmic = _horizontal(steps)
    low, high, ticks = _range([value for _, value in points])

    def y(value: float) -> float:
        return _BOTTOM - (value - low) / (high - low) * (_BOTTOM - _TOP)

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{_tick(t, ticks)}</text>'
        for t in ticks
    ]
    parts += [
        f'<text x="{x(s):.1f}" y="{_BOTTOM + 15}" text-anchor="middle">{s}</text>'
        for s in _thinned(steps, x)
    ]
    parts.append(
        f'<text x="{_RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">optimizer'
        f" step{' (log)' if logarithmic else ''}</text>"
    )
    parts += _verticals(marks, x)
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    parts.append(f'<polyline class="curve" points="{line}"/>')
    parts += [
        f'<circle class="point" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5"><title>step {step}:'
        f" {number(value)}</title></circle>"
        for step, value in points
    ]
    label = escape(f"{title(measure)} over optimizer steps")
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        f' aria-label="{label}">{"".join(parts)}</svg>'
    )


def _horizontal(steps: Sequence[int]) -> tuple[Callable[[int], float], bool]:
    """step -> x, and whether it is logarithmic. Step 0 has no logarithm: it gets a place of its own
    before the others.
    """
    positive = [step for step in steps if step > 0]
    logarithmic = len(positive) > 1 and positive[-1] > 20 * positive[0]
    if not logarithmic:
        place: Callable[[int], float] = float
    else:
        gap = math.log(positive[-1] / positive[0]) / len(positive)

        def place(step: float) -> float:
            return math.log(step) if step > 0 else math.log(positive[0]) - gap

    first, last = place(steps[0]), place(steps[-1])
    if first == last:
        return lambda step: (_LEFT + _RIGHT) / 2, False
    return (
        lambda step: _LEFT + 8 + (place(step) - first) / (last - first) * (_RIGHT - _LEFT - 16),
        logarithmic,
    )


def _range(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Low end, high end and round ticks. Starts at 0 unless the curve would be a flat line far
    above it.
    """
    low, high = min(values), max(values)
    if 0 < low < 0.6 * high:
        low = 0.0
    if high - low < 1e-3 * max(
        abs(high), 1e-6
    ):  # one value, or rounding noise that must not fill the picture
        low, high = low - 0.1 * max(abs(low), 0.1), high + 0.1 * max(abs(high), 0.1)
    rough = (high - low) / 4
    unit = 10 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    """A tick's label with as many decimals as the distance of the ticks needs."""
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return f"{value:.{decimals}f}" if decimals < 5 else f"{value:.1e}"


def _thinned(steps: Iterable[int], x: Callable[[int], float]) -> list[int]:
    """The steps whose labels fit beside each other."""
    kept: list[int] = []
    for step in steps:

        def width(s: int) -> float:
            return 3.4 * len(str(s))  # half of a label's width

        if not kept or x(step) - x(kept[-1]) > width(step) + width(kept[-1]) + 5:
            kept.append(step)
    return kept


def _verticals(marks: dict[str, int], x: Callable[[int], float]) -> list[str]:
    """A dashed line and its name at each marked step; names that would touch lean away from each
    other.
    """
    places = sorted((x(step), name) for name, step in marks.items())
    close = len(places) == 2 and places[1][0] - places[0][0] < 34
    parts = []
    for i, (place, name) in enumerate(places):
        anchor = ("end", "start")[i] if close else "end" if place > _RIGHT - 14 else "middle"
        parts.append(
            f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{_TOP - 6}" y2="{_BOTTOM}"/>'
            f'<text x="{place:.1f}" y="{_TOP - 11}" text-anchor="{anchor}">{escape(name)}</text>'
        )
    return parts
