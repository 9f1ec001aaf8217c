"""How an instance looks, and where it is in a scene."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from random import Random

from dreamblend.sandbox.shapes import HOLDABLES, WEARABLES

RGB = tuple[int, int, int]

# What a colour word covers: hue, saturation and value ranges.
COLOURS: dict[str, tuple[float, float, float, float, float, float]] = {
    "red": (-0.02, 0.015, 0.8, 0.95, 0.75, 0.92),
    "orange": (0.065, 0.085, 0.8, 0.95, 0.92, 1.0),
    "yellow": (0.14, 0.16, 0.65, 0.9, 0.92, 1.0),
    "green": (0.30, 0.37, 0.55, 0.85, 0.5, 0.72),
    "blue": (0.58, 0.63, 0.65, 0.9, 0.65, 0.95),
    "purple": (0.74, 0.79, 0.5, 0.75, 0.5, 0.75),
    "white": (0.0, 1.0, 0.0, 0.04, 0.95, 1.0),
    "black": (0.0, 1.0, 0.0, 0.15, 0.1, 0.18),
}
PATTERNS = ("dots", "stripes", "bars", "checks", "halves")


@dataclass(frozen=True)
class Look:
    """How one instance looks, in any scene. `colour` is the word for `body`, or None where there is
    none; `lacks` names the parts that it has lost.
    """

    noun: str
    body: RGB
    accent: RGB
    pattern: str = "plain"
    pitch: float = 0.22  # size of the pattern, in object widths
    aspect: float = 1.0  # width over height, relative to the class's usual one
    colour: str | None = None
    lacks: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Extra:
    """What a thing wears or holds, with its colour and the word for that."""

    name: str
    body: RGB
    colour: str | None = None


@dataclass(frozen=True)
class Thing:
    """A look in a scene: its centre and height (a scene is 64 wide and high), tilt in degrees."""

    look: Look
    x: float
    y: float
    height: float
    tilt: float
    flip: bool
    wears: Extra | None = None
    holds: Extra | None = None


def _hsv(h: float, s: float, v: float) -> RGB:
    r, g, b = colorsys.hsv_to_rgb(h % 1.0, s, v)
    return int(r * 255), int(g * 255), int(b * 255)


def random_colour(rng: Random, word: str | None = None) -> RGB:
    """A colour that `word` names, or any colour at all."""
    if word is None:
        return _hsv(rng.random(), rng.uniform(0.15, 0.95), rng.uniform(0.35, 1.0))
    h0, h1, s0, s1, v0, v1 = COLOURS[word]
    return _hsv(rng.uniform(h0, h1), rng.uniform(s0, s1), rng.uniform(v0, v1))


def random_look(rng: Random, noun: str, colour: str | None = None) -> Look:
    """An instance of `noun`; where `colour` is given its body is of that colour."""
    body, accent = random_colour(rng, colour), random_colour(rng)
    while sum(abs(a - b) for a, b in zip(body, accent)) < 180:  # an accent must be seen on the body
        accent = random_colour(rng)
    return Look(
        noun,
        body,
        accent,
        rng.choice(PATTERNS) if rng.random() < 0.5 else "plain",
        rng.uniform(0.18, 0.3),
        rng.uniform(0.85, 1.15),
        colour,
    )


def random_extra(rng: Random, names: dict | None = None) -> Extra:
    """Something to wear or to hold."""
    name = rng.choice(tuple(names or {**WEARABLES, **HOLDABLES}))
    colour = rng.choice(tuple(COLOURS)) if rng.random() < 0.7 else None
    return Extra(name, random_colour(rng, colour), colour)
