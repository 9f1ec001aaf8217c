"""Draws a scene: its place, then each thing part by part, outlined, patterned and shaded.

Beside the image there is what every pixel shows: which thing, and which part of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from dreamblend.sandbox import places
from dreamblend.sandbox.looks import RGB, Extra, Look, Thing
from dreamblend.sandbox.shapes import (
    HANDS,
    HEADS,
    HOLDABLES,
    SHAPES,
    STANDING_OUT,
    WEARABLES,
    WIDTHS,
    Part,
)

SIZE = 128  # pixels of a finished scene
_SS = 2  # supersampling: scenes are drawn at twice the size and averaged down
_OUTLINE = 1.3  # pixels of a finished scene

# What a pixel can show, by its index: the place, each thing's bulk and parts, what is worn or held.
LABELS = (
    "place",
    *((noun, part) for noun in SHAPES for part in (None, *STANDING_OUT.get(noun, ()))),
    *WEARABLES,
    *HOLDABLES,
)
_LABEL = {label: i for i, label in enumerate(LABELS)}
_FIXED = {
    "dark": (34, 32, 38),
    "light": (247, 247, 243),
    "gold": (250, 205, 70),
    "wood": (128, 90, 60),
}


@dataclass(frozen=True)
class Scene:
    """Things in front of a place. `place_seed` varies how the place is drawn; `view` is the word
    for an unusual pose of the first thing.
    """

    things: tuple[Thing, ...]
    place: str
    place_seed: int
    view: str | None = None


@dataclass(frozen=True)
class Drawn:
    """An image (SIZE x SIZE, RGB), boolean masks (things, SIZE, SIZE) of the pixels that each thing
    covers with what it wears and holds, and an index into LABELS for each pixel (SIZE, SIZE).
    """

    image: Image.Image
    masks: np.ndarray
    labels: np.ndarray


class _Pen:
    """Draws one thing's parts on the canvas, and what each pixel shows on a sheet of its own."""

    def __init__(self, canvas: Image.Image, thing: Thing):
        n = canvas.width
        self.canvas, self.sheet, self.thing = canvas, Image.new("L", (n, n)), thing
        self.draws = ImageDraw.Draw(canvas), ImageDraw.Draw(self.sheet)
        self.edge = _OUTLINE * _SS
        self.h = thing.height * n / 64
        self.w = self.h * thing.look.aspect * WIDTHS.get(thing.look.noun, 1.0)
        angle = math.radians(thing.tilt)
        self.cos, self.sin = math.cos(angle), math.sin(angle)
        self.cx, self.cy = thing.x * n / 64, thing.y * n / 64

    def place(self, points: np.ndarray) -> list[tuple[float, float]]:
        """Pixels from the thing's box, (n, 2) in pixels from its middle, flipped and tilted."""
        x, y = points[:, 0] * (-1 if self.thing.flip else 1), points[:, 1]
        return list(
            zip(
                (self.cx + x * self.cos + y * self.sin).tolist(),
                (self.cy - x * self.sin + y * self.cos).tolist(),
            )
        )

    def part(
        self,
        part: Part,
        fill: RGB,
        outline: RGB,
        label: int,
        origin: tuple[float, float],
        unit: tuple[float, float],
        patterned: bool = False,
    ) -> None:
        """Draw a part whose coordinates count `unit` pixels from `origin`, which is from the
        middle.
        """
        points = self.place(_points(part) * unit + origin)
        canvas, sheet = self.draws
        if part.shape == "line":
            width = max(part.width * self.h, 1.5 * _SS)
            _stroke(canvas, points, outline, width + 2 * self.edge)
            _stroke(canvas, points, fill, width)
            _stroke(sheet, points, 2 * label, width + 2 * self.edge)
        else:
            for draw, value in ((canvas, outline), (sheet, 2 * label)):
                draw.polygon(points, fill=value)
                _stroke(draw, [*points, points[0]], value, 2 * self.edge)
            canvas.polygon(points, fill=fill)
            if patterned:
                sheet.polygon(points, fill=2 * label + 1)

    def labels(self) -> Image.Image:
        return self.sheet.point([v // 2 for v in range(256)])

    def mask(self) -> Image.Image:
        return self.sheet.point([255 * (v > 0) for v in range(256)])

    def surface(self) -> Image.Image:
        """Where the pattern goes: the body as far as nothing was drawn over it."""
        return self.sheet.point([255 * (v % 2) for v in range(256)])


def _stroke(draw: ImageDraw.ImageDraw, points: list, fill, width: float) -> None:
    draw.line(points, fill=fill, width=round(width))
    r = width / 2
    for x, y in (
        points if width > 6 or len(points) < 12 else ()
    ):  # joints of thin, dense lines close
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


@cache
def _points(part: Part) -> np.ndarray:
    """A part's outline or line as points (n, 2)."""
    at = np.array(part.at).reshape(-1, 2)
    if part.shape == "ellipse":
        turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        middle, radius = at.mean(0), (at[1] - at[0]) / 2
        return middle + radius * np.stack([np.cos(turn), np.sin(turn)], 1)
    if part.shape in ("box", "round"):
        (x0, y0), (x1, y1) = at
        if part.shape == "box":
            return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
        r = min(x1 - x0, y1 - y0) * 0.25
        corners = []
        for cx, cy, start in (
            (x1 - r, y0 + r, -0.5),
            (x1 - r, y1 - r, 0.0),
            (x0 + r, y1 - r, 0.5),
            (x0 + r, y0 + r, 1.0),
        ):
            turn = np.pi * np.linspace(start, start + 0.5, 6)
            corners.append(np.stack([cx + r * np.cos(turn), cy + r * np.sin(turn)], 1))
        return np.concatenate(corners)
    if part.shape == "line" and len(at) > 2:
        # a Catmull-Rom spline through the points
        ends = np.concatenate([[2 * at[0] - at[1]], at, [2 * at[-1] - at[-2]]])
        t = np.linspace(0, 1, 8, endpoint=False)[:, None]
        pieces = [
            0.5
            * (
                2 * b
                + (c - a) * t
                + (2 * a - 5 * b + 4 * c - d) * t**2
                + (3 * b - a - 3 * c + d) * t**3
            )
            for a, b, c, d in zip(ends, ends[1:], ends[2:], ends[3:])
        ]
        return np.concatenate([*pieces, at[-1:]])
    return at


def _pattern(pen: _Pen, look: Look) -> Image.Image:
    """The accent's pattern as a mask of the canvas's size."""
    image = Image.new("L", pen.canvas.size)
    draw = ImageDraw.Draw(image)
    w, h, p = pen.w, pen.h, max(3.0 * _SS, look.pitch * pen.w)

    def box(x0: float, y0: float, x1: float, y1: float) -> None:
        corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]) - (w / 2, h / 2)
        draw.polygon(pen.place(corners), fill=255)

    rows, columns = range(int(h / p) + 2), range(int(w / p) + 2)
    if look.pattern == "dots":
        r = p * 0.3
        centres = [((c + r_ % 2 * 0.5) * p - w / 2, r_ * p - h / 2) for r_ in rows for c in columns]
        for x, y in pen.place(np.array(centres)):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif look.pattern == "stripes":
        for row in rows:
            box(0, row * p, w, row * p + p * 0.42)
    elif look.pattern == "bars":
        for column in columns:
            box(column * p, 0, column * p + p * 0.42, h)
    elif look.pattern == "checks":
        for row in rows:
            for column in columns:
                if (row + column) % 2:
                    box(column * p, row * p, column * p + p * 0.8, row * p + p * 0.8)
    elif look.pattern == "halves":
        box(0, h * 0.58, w, h)
    return image


def _draw_thing(canvas: Image.Image, labels: Image.Image, thing: Thing) -> Image.Image:
    """Draw a thing on the canvas and the labels; gives its mask."""
    look, pen = thing.look, _Pen(canvas, thing)
    colours = {**_FIXED, "body": look.body, "trim": look.accent}
    corner, box, line = (-pen.w / 2, -pen.h / 2), (pen.w, pen.h), _darker(look.body)
    for part in SHAPES[look.noun]:
        if part.name not in look.lacks:
            label = _LABEL[look.noun, part.name]
            pen.part(part, colours[part.fill], line, label, corner, box, part.fill == "body")
    if look.pattern != "plain":
        where = ImageChops.multiply(pen.surface(), _pattern(pen, look))
        canvas.paste(look.accent, (0, 0, *canvas.size), where)
    _shade(canvas, pen.mask())
    for extra, shapes in ((thing.wears, WEARABLES), (thing.holds, HOLDABLES)):
        if extra is not None:
            _draw_extra(pen, extra, shapes)
    mask = pen.mask()
    labels.paste(pen.labels(), mask=mask)
    return mask


def _draw_extra(pen: _Pen, extra: Extra, shapes: dict[str, tuple[Part, ...]]) -> None:
    noun = pen.thing.look.noun
    if shapes is WEARABLES:
        x, y, width = HEADS[noun]
        unit = (width * pen.w, width * pen.w)
    else:
        (x, y), unit = HANDS[noun], (pen.h, pen.h)
    colours = {**_FIXED, "body": extra.body}
    for part in shapes[extra.name]:
        pen.part(
            part,
            colours[part.fill],
            _darker(extra.body),
            _LABEL[extra.name],
            ((x - 0.5) * pen.w, (y - 0.5) * pen.h),
            unit,
        )


def _darker(colour: RGB) -> RGB:
    return tuple(int(c * 0.38) for c in colour)  # type: ignore[return-value]


def _shade(canvas: Image.Image, mask: Image.Image) -> None:
    """Light falls from above: a thing is darker below."""
    box = mask.getbbox()
    if box:
        ramp = _ramp().resize((box[2] - box[0], box[3] - box[1]))
        canvas.paste((20, 16, 40), box, ImageChops.multiply(ramp, mask.crop(box)))


@cache
def _ramp() -> Image.Image:
    return Image.linear_gradient("L").point([v * 70 // 255 for v in range(256)])


def _shadow(canvas: Image.Image, thing: Thing) -> None:
    n = canvas.width
    w = thing.height * thing.look.aspect * WIDTHS.get(thing.look.noun, 1.0)
    a = math.radians(thing.tilt)
    low = thing.y + 0.5 * (thing.height * abs(math.cos(a)) + w * abs(math.sin(a))) * 0.96
    rx = 0.46 * (w * abs(math.cos(a)) + thing.height * abs(math.sin(a)))
    edges = (thing.x - rx, low - 1.6, thing.x + rx, low + 1.6)
    left, top, right, bottom = (round(v * n / 64) for v in edges)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).ellipse((0, 0, mask.width - 1, mask.height - 1), fill=80)
    canvas.paste((10, 10, 30), (left, top, right, bottom), mask)


def draw(scene: Scene) -> Drawn:
    """Draw a scene, with what every pixel shows."""
    n = SIZE * _SS
    back, labels = Image.new("RGB", (SIZE, SIZE)), Image.new("L", (n, n))
    places.PLACES[scene.place](ImageDraw.Draw(back), Random(scene.place_seed), SIZE)
    canvas, masks = back.resize((n, n), Image.Resampling.BILINEAR), []  # softer than the things
    for thing in scene.things:
        _shadow(canvas, thing)
        masks.append(_draw_thing(canvas, labels, thing))
    return Drawn(
        canvas.reduce(_SS),
        np.stack([np.asarray(mask.reduce(_SS)) > 127 for mask in masks]),
        np.asarray(labels)[::_SS, ::_SS],
    )


def render(scene: Scene) -> tuple[Image.Image, np.ndarray]:
    """The image of a scene (SIZE x SIZE), and boolean masks (things, SIZE, SIZE) of the pixels that
    each thing covers.
    """
    drawn = draw(scene)
    return drawn.image, drawn.masks
