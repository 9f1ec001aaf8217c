"""What the things of the sandbox world are made of: shapes in unit coordinates, and the thin parts
that stand out of them.

A part's coordinates lie in the thing's box, x right and y down, both from 0 to 1; widths of lines
are in heights of the thing. Parts are drawn in their order, each over those before it.
"""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """One shape of a thing.

    `fill`: body (the thing's colour and pattern), trim (its accent), or a fixed colour. `shape`:
    poly, box, round (a box with round corners), ellipse, or line (a smooth stroke `width` heights
    wide). `name`: what a judge calls it where it stands out of the thing and can be missed.
    """

    fill: str
    shape: str
    at: tuple[float, ...]
    name: str | None = None
    width: float = 0.0


def _stroke(fill: str, width: float, *at: float, name: str | None = None) -> Part:
    return Part(fill, "line", at, name, width)


def _mirrored(part: Part) -> tuple[Part, Part]:
    """A part and its like on the other side."""
    at = tuple(1 - c if i % 2 == 0 else c for i, c in enumerate(part.at))
    if part.shape in ("box", "round", "ellipse"):
        at = (at[2], at[1], at[0], at[3])
    return part, part._replace(at=at)


SHAPES: dict[str, tuple[Part, ...]] = {
    "mug": (
        _stroke(
            "trim", 0.08, 0.68, 0.32, 0.88, 0.27, 0.99, 0.46, 0.90, 0.68, 0.66, 0.76, name="handle"
        ),
        Part("body", "poly", (0.08, 0.16, 0.74, 0.16, 0.69, 0.96, 0.13, 0.96)),
        Part("trim", "ellipse", (0.08, 0.07, 0.74, 0.25)),
        Part("dark", "ellipse", (0.14, 0.10, 0.68, 0.22)),
    ),
    "teapot": (
        _stroke(
            "trim", 0.08, 0.24, 0.42, 0.07, 0.36, 0.03, 0.58, 0.10, 0.78, 0.28, 0.80, name="handle"
        ),
        Part(
            "body",
            "poly",
            (
                0.70,
                0.60,
                0.82,
                0.54,
                0.87,
                0.34,
                1.0,
                0.26,
                1.0,
                0.36,
                0.95,
                0.42,
                0.91,
                0.70,
                0.74,
                0.86,
            ),
            "spout",
        ),
        Part("body", "ellipse", (0.17, 0.30, 0.82, 0.96)),
        Part("trim", "ellipse", (0.34, 0.26, 0.65, 0.39)),
        Part("trim", "ellipse", (0.43, 0.12, 0.56, 0.28)),
    ),
    "backpack": (
        _stroke("trim", 0.065, 0.36, 0.16, 0.38, 0.03, 0.62, 0.03, 0.64, 0.16, name="loop"),
        *_mirrored(
            _stroke("trim", 0.075, 0.20, 0.26, 0.05, 0.38, 0.04, 0.70, 0.20, 0.86, name="straps")
        ),
        Part("body", "round", (0.16, 0.11, 0.84, 0.97)),
        Part("trim", "round", (0.27, 0.58, 0.73, 0.88)),
        _stroke("dark", 0.035, 0.19, 0.42, 0.81, 0.42),
        Part("light", "box", (0.45, 0.38, 0.55, 0.48)),
    ),
    "vase": (
        *_mirrored(
            _stroke("trim", 0.065, 0.42, 0.17, 0.20, 0.12, 0.09, 0.28, 0.24, 0.46, name="handles")
        ),
        Part(
            "body",
            "poly",
            (
                0.40,
                0.06,
                0.60,
                0.06,
                0.57,
                0.25,
                0.84,
                0.56,
                0.68,
                0.95,
                0.32,
                0.95,
                0.16,
                0.56,
                0.43,
                0.25,
            ),
        ),
        Part("trim", "box", (0.34, 0.02, 0.66, 0.11)),
        Part("trim", "box", (0.30, 0.89, 0.70, 0.97)),
    ),
    "lamp": (
        _stroke("trim", 0.04, 0.78, 0.50, 0.78, 0.78, name="cord"),
        Part("trim", "ellipse", (0.72, 0.72, 0.84, 0.83), "cord"),
        Part("trim", "box", (0.45, 0.45, 0.55, 0.90)),
        Part("body", "poly", (0.30, 0.05, 0.70, 0.05, 0.94, 0.54, 0.06, 0.54)),
        Part("trim", "ellipse", (0.22, 0.85, 0.70, 0.98)),
    ),
    "boot": (
        _stroke("trim", 0.065, 0.28, 0.13, 0.10, 0.08, 0.06, 0.26, 0.28, 0.34, name="loop"),
        Part(
            "body", "poly", (0.26, 0.06, 0.62, 0.06, 0.62, 0.52, 0.90, 0.62, 0.98, 0.86, 0.26, 0.86)
        ),
        Part("dark", "box", (0.24, 0.85, 0.99, 0.96)),
        Part("trim", "box", (0.23, 0.04, 0.65, 0.18)),
        _stroke("light", 0.03, 0.48, 0.32, 0.62, 0.28),
        _stroke("light", 0.03, 0.48, 0.44, 0.62, 0.40),
    ),
    "dog": (
        _stroke("body", 0.08, 0.22, 0.58, 0.08, 0.50, 0.04, 0.26, name="tail"),
        Part("body", "round", (0.22, 0.62, 0.34, 0.97)),
        Part("body", "round", (0.58, 0.62, 0.70, 0.97)),
        Part("body", "ellipse", (0.15, 0.45, 0.76, 0.81)),
        Part("body", "ellipse", (0.56, 0.14, 0.93, 0.56)),
        Part("trim", "ellipse", (0.78, 0.33, 1.0, 0.52)),
        Part(
            "trim",
            "poly",
            (0.66, 0.14, 0.53, 0.11, 0.40, 0.22, 0.34, 0.44, 0.40, 0.56, 0.51, 0.49, 0.62, 0.30),
            "ear",
        ),
        Part("dark", "ellipse", (0.92, 0.33, 1.0, 0.42)),
        Part("dark", "ellipse", (0.73, 0.25, 0.80, 0.33)),
    ),
    "cat": (
        _stroke(
            "trim", 0.08, 0.70, 0.90, 0.90, 0.92, 0.95, 0.74, 0.87, 0.60, 0.95, 0.46, name="tail"
        ),
        Part("body", "ellipse", (0.22, 0.42, 0.76, 0.98)),
        *_mirrored(Part("trim", "poly", (0.26, 0.36, 0.24, 0.0, 0.50, 0.20), "ears")),
        Part("body", "ellipse", (0.23, 0.13, 0.77, 0.56)),
        Part("light", "ellipse", (0.33, 0.26, 0.46, 0.39)),
        Part("light", "ellipse", (0.54, 0.26, 0.67, 0.39)),
        Part("dark", "ellipse", (0.38, 0.27, 0.44, 0.39)),
        Part("dark", "ellipse", (0.56, 0.27, 0.62, 0.39)),
        Part("trim", "ellipse", (0.45, 0.40, 0.55, 0.47)),
    ),
    "robot": (
        _stroke("trim", 0.04, 0.50, 0.16, 0.50, 0.04, name="antenna"),
        Part("trim", "ellipse", (0.44, 0.0, 0.56, 0.09), "antenna"),
        *_mirrored(_stroke("trim", 0.08, 0.22, 0.47, 0.05, 0.54, 0.04, 0.76, name="arms")),
        *_mirrored(Part("trim", "box", (0.28, 0.78, 0.42, 0.98))),
        Part("body", "round", (0.18, 0.40, 0.82, 0.82)),
        Part("body", "round", (0.26, 0.13, 0.74, 0.40)),
        *_mirrored(Part("light", "box", (0.33, 0.19, 0.45, 0.30))),
        *_mirrored(Part("dark", "box", (0.37, 0.22, 0.42, 0.28))),
    ),
    "car": (
        _stroke("trim", 0.045, 0.36, 0.28, 0.27, 0.04, name="antenna"),
        Part("trim", "ellipse", (0.225, 0.0, 0.305, 0.10), "antenna"),
        _stroke("trim", 0.06, 0.10, 0.54, 0.07, 0.38, name="spoiler"),
        _stroke("trim", 0.075, 0.01, 0.37, 0.18, 0.37, name="spoiler"),
        Part(
            "body",
            "poly",
            (
                0.02,
                0.80,
                0.02,
                0.54,
                0.24,
                0.50,
                0.36,
                0.25,
                0.70,
                0.25,
                0.84,
                0.50,
                0.98,
                0.56,
                0.98,
                0.80,
            ),
        ),
        Part("light", "poly", (0.31, 0.49, 0.40, 0.32, 0.51, 0.32, 0.51, 0.49)),
        Part("light", "poly", (0.56, 0.49, 0.56, 0.32, 0.67, 0.32, 0.76, 0.49)),
        *(
            Part(fill, "ellipse", (x - r * 0.8, 0.81 - r, x + r * 0.8, 0.81 + r))
            for x in (0.24, 0.76)
            for fill, r in (("dark", 0.16), ("trim", 0.08))
        ),
    ),
    "clock": (
        _stroke("trim", 0.06, 0.30, 0.18, 0.34, 0.03, 0.66, 0.03, 0.70, 0.18, name="handle"),
        *_mirrored(_stroke("trim", 0.07, 0.30, 0.84, 0.17, 0.97, name="feet")),
        Part("body", "ellipse", (0.07, 0.12, 0.93, 0.94)),
        Part("light", "ellipse", (0.22, 0.27, 0.78, 0.80)),
        _stroke("dark", 0.04, 0.50, 0.34, 0.50, 0.54, 0.64, 0.60),
    ),
    "duck": (
        _stroke("trim", 0.05, 0.36, 0.82, 0.34, 0.97, 0.42, 0.97, name="legs"),
        _stroke("trim", 0.05, 0.56, 0.82, 0.54, 0.97, 0.62, 0.97, name="legs"),
        _stroke("trim", 0.05, 0.68, 0.14, 0.60, 0.0, name="crest"),
        _stroke("trim", 0.05, 0.70, 0.14, 0.74, 0.0, name="crest"),
        Part("body", "poly", (0.18, 0.54, 0.0, 0.38, 0.08, 0.72)),
        Part("body", "ellipse", (0.06, 0.44, 0.82, 0.90)),
        Part("trim", "poly", (0.84, 0.24, 1.0, 0.33, 0.84, 0.42)),
        Part("body", "ellipse", (0.50, 0.09, 0.88, 0.52)),
        Part("dark", "ellipse", (0.70, 0.21, 0.78, 0.30)),
        Part("trim", "ellipse", (0.20, 0.56, 0.54, 0.78)),
    ),
    "ball": (
        Part("body", "ellipse", (0.05, 0.05, 0.95, 0.95)),
        Part("light", "ellipse", (0.24, 0.20, 0.40, 0.34)),
    ),
    "flower": (
        _stroke("trim", 0.06, 0.50, 0.50, 0.50, 0.97),
        *(
            Part("body", "ellipse", (x - 0.17, y - 0.17, x + 0.17, y + 0.17))
            for x, y in ((0.5, 0.18), (0.5, 0.54), (0.31, 0.36), (0.69, 0.36))
        ),
        Part("dark", "ellipse", (0.38, 0.24, 0.62, 0.48)),
    ),
}
PROPS = ("ball", "flower")  # only ever the second thing
NOUNS = tuple(n for n in SHAPES if n not in PROPS)
STANDING_OUT: dict[str, tuple[str, ...]] = {  # what a judge looks for on each class
    noun: tuple(dict.fromkeys(p.name for p in SHAPES[noun] if p.name)) for noun in NOUNS
}
WIDTHS = {  # width over height, where it is not 1
    "vase": 0.85,
    "lamp": 0.85,
    "backpack": 0.92,
    "robot": 0.9,
    "car": 1.3,
    "teapot": 1.15,
    "duck": 1.1,
    "dog": 1.15,
    "flower": 0.8,
}
HEADS = {  # where a thing wears something: centre x, top y, width
    "mug": (0.41, 0.14, 0.5),
    "teapot": (0.5, 0.2, 0.4),
    "backpack": (0.5, 0.14, 0.5),
    "vase": (0.5, 0.07, 0.36),
    "lamp": (0.5, 0.08, 0.42),
    "boot": (0.44, 0.07, 0.42),
    "dog": (0.75, 0.18, 0.34),
    "cat": (0.5, 0.17, 0.42),
    "robot": (0.5, 0.15, 0.44),
    "car": (0.53, 0.27, 0.36),
    "clock": (0.5, 0.14, 0.44),
    "duck": (0.69, 0.13, 0.36),
}
HANDS = {  # where a thing holds something
    "mug": (0.12, 0.62),
    "teapot": (0.22, 0.74),
    "backpack": (0.12, 0.66),
    "vase": (0.22, 0.62),
    "lamp": (0.40, 0.72),
    "boot": (0.27, 0.66),
    "dog": (0.26, 0.74),
    "cat": (0.28, 0.72),
    "robot": (0.05, 0.74),
    "car": (0.06, 0.66),
    "clock": (0.09, 0.62),
    "duck": (0.14, 0.66),
}
# In widths of the head: x from its centre, y down from its top. "body" is the worn thing's colour.
WEARABLES: dict[str, tuple[Part, ...]] = {
    "hat": (
        Part("body", "round", (-0.42, -0.72, 0.42, 0.0)),
        Part("body", "round", (-0.78, -0.14, 0.78, 0.06)),
        Part("dark", "box", (-0.42, -0.30, 0.42, -0.14)),
    ),
    "crown": (
        Part(
            "body",
            "poly",
            (-0.5, 0.05, -0.64, -0.6, -0.26, -0.26, 0, -0.76, 0.26, -0.26, 0.64, -0.6, 0.5, 0.05),
        ),
        Part("gold", "ellipse", (-0.1, -0.26, 0.1, -0.06)),
    ),
    "bow": (
        Part("body", "poly", (0, -0.2, -0.72, -0.58, -0.72, 0.18)),
        Part("body", "poly", (0, -0.2, 0.72, -0.58, 0.72, 0.18)),
        Part("dark", "ellipse", (-0.16, -0.37, 0.16, -0.05)),
    ),
}
# In heights of the thing from the hand.
HOLDABLES: dict[str, tuple[Part, ...]] = {
    "balloon": (
        _stroke("dark", 0.025, 0.0, 0.08, -0.03, -0.2, -0.12, -0.4),
        Part("body", "ellipse", (-0.28, -0.82, 0.04, -0.40)),
    ),
    "flag": (
        Part("body", "poly", (-0.08, -0.80, -0.42, -0.72, -0.40, -0.50, -0.07, -0.50)),
        _stroke("wood", 0.04, 0.0, 0.1, -0.08, -0.82),
    ),
    "wand": (
        _stroke("wood", 0.04, 0.0, 0.1, -0.10, -0.56),
        Part(
            "body",
            "poly",
            (
                *(-0.11, -0.88, -0.05, -0.70, 0.12, -0.68, -0.02, -0.57, 0.02, -0.40),
                *(-0.11, -0.50, -0.24, -0.40, -0.20, -0.57, -0.34, -0.68, -0.17, -0.70),
            ),
        ),
    ),
}
