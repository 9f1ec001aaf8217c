"""The sandbox world: a renderer of small captioned scenes, and the subjects that live in it.

A scene is one or two things in a place. A caption can name a thing's class noun, its colour, what
it wears, and the place; it has no words for patterns, accents, proportions and in-between colours.
Those make an instance: a subject whose look no caption can express, which is what fine-tuning has
to learn. Everything is deterministic in the `random.Random` that is passed in.
"""

from __future__ import annotations

import colorsys
import zlib
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from dreamblend.sandbox import places
from dreamblend.sandbox.places import RGB

SIZE = 64  # pixels of a finished scene
_SS = 2  # supersampling: scenes are drawn at twice the size and averaged down

Part = tuple[str, str, tuple]  # (which colour, which shape, unit coordinates; x right, y down)

# ------------------------------------------------------------------------------------------- things
# "body" carries the body colour and the pattern, "trim" the accent colour, "dark" and "light" are
# fixed.
SHAPES: dict[str, list[Part]] = {
    "mug": [
        ("trim", "ring", (0.52, 0.28, 0.98, 0.76)),
        ("body", "box", (0.12, 0.14, 0.72, 0.94)),
        ("dark", "ellipse", (0.12, 0.06, 0.72, 0.22)),
    ],
    "teapot": [
        ("trim", "ring", (0.0, 0.38, 0.38, 0.82)),
        ("body", "poly", (0.68, 0.80, 0.80, 0.42, 0.96, 0.30, 1.0, 0.38, 0.88, 0.62, 0.78, 0.90)),
        ("body", "ellipse", (0.18, 0.28, 0.82, 0.95)),
        ("trim", "ellipse", (0.42, 0.12, 0.58, 0.30)),
        ("dark", "box", (0.34, 0.28, 0.66, 0.33)),
    ],
    "backpack": [
        ("trim", "ring", (0.33, 0.0, 0.67, 0.30)),
        ("body", "round", (0.17, 0.12, 0.83, 0.97)),
        ("trim", "round", (0.27, 0.58, 0.73, 0.88)),
        ("dark", "box", (0.17, 0.36, 0.83, 0.41)),
    ],
    "vase": [
        (
            "body",
            "poly",
            (
                0.38,
                0.06,
                0.62,
                0.06,
                0.57,
                0.27,
                0.84,
                0.56,
                0.68,
                0.96,
                0.32,
                0.96,
                0.16,
                0.56,
                0.43,
                0.27,
            ),
        ),
        ("trim", "box", (0.33, 0.02, 0.67, 0.11)),
        ("trim", "box", (0.30, 0.90, 0.70, 0.97)),
    ],
    "lamp": [
        ("trim", "box", (0.45, 0.45, 0.55, 0.90)),
        ("body", "poly", (0.30, 0.06, 0.70, 0.06, 0.92, 0.54, 0.08, 0.54)),
        ("trim", "ellipse", (0.24, 0.82, 0.76, 0.98)),
    ],
    "boot": [
        ("body", "poly", (0.26, 0.06, 0.62, 0.06, 0.62, 0.54, 0.90, 0.64, 0.97, 0.86, 0.26, 0.86)),
        ("dark", "box", (0.24, 0.85, 0.97, 0.96)),
        ("trim", "box", (0.23, 0.04, 0.65, 0.18)),
    ],
    "dog": [
        ("body", "poly", (0.20, 0.60, 0.02, 0.36, 0.08, 0.32, 0.28, 0.50)),
        ("body", "box", (0.22, 0.60, 0.34, 0.96)),
        ("body", "box", (0.58, 0.60, 0.70, 0.96)),
        ("body", "ellipse", (0.14, 0.44, 0.76, 0.80)),
        ("body", "ellipse", (0.56, 0.16, 0.92, 0.54)),
        ("trim", "ellipse", (0.52, 0.16, 0.66, 0.50)),
        ("trim", "ellipse", (0.78, 0.34, 1.0, 0.52)),
        ("dark", "ellipse", (0.92, 0.34, 1.0, 0.42)),
        ("dark", "ellipse", (0.72, 0.26, 0.80, 0.34)),
    ],
    "cat": [
        ("trim", "ring", (0.60, 0.50, 0.98, 0.96)),
        ("body", "ellipse", (0.24, 0.42, 0.76, 0.98)),
        ("body", "poly", (0.28, 0.34, 0.28, 0.02, 0.48, 0.20)),
        ("body", "poly", (0.72, 0.34, 0.72, 0.02, 0.52, 0.20)),
        ("body", "ellipse", (0.25, 0.14, 0.75, 0.54)),
        ("light", "ellipse", (0.34, 0.26, 0.46, 0.38)),
        ("light", "ellipse", (0.54, 0.26, 0.66, 0.38)),
        ("dark", "ellipse", (0.38, 0.27, 0.43, 0.38)),
        ("dark", "ellipse", (0.57, 0.27, 0.62, 0.38)),
        ("trim", "ellipse", (0.45, 0.38, 0.55, 0.46)),
    ],
    "robot": [
        ("trim", "box", (0.47, 0.0, 0.53, 0.16)),
        ("trim", "box", (0.28, 0.78, 0.42, 0.98)),
        ("trim", "box", (0.58, 0.78, 0.72, 0.98)),
        ("trim", "box", (0.06, 0.42, 0.18, 0.74)),
        ("trim", "box", (0.82, 0.42, 0.94, 0.74)),
        ("body", "box", (0.18, 0.40, 0.82, 0.80)),
        ("body", "box", (0.28, 0.10, 0.72, 0.38)),
        ("light", "box", (0.34, 0.17, 0.46, 0.29)),
        ("light", "box", (0.54, 0.17, 0.66, 0.29)),
    ],
    "car": [
        (
            "body",
            "poly",
            (
                0.02,
                0.78,
                0.02,
                0.52,
                0.22,
                0.48,
                0.34,
                0.24,
                0.70,
                0.24,
                0.84,
                0.48,
                0.98,
                0.54,
                0.98,
                0.78,
            ),
        ),
        ("light", "poly", (0.28, 0.48, 0.37, 0.30, 0.50, 0.30, 0.50, 0.48)),
        ("light", "poly", (0.55, 0.48, 0.55, 0.30, 0.68, 0.30, 0.76, 0.48)),
        ("dark", "ellipse", (0.12, 0.66, 0.36, 0.92)),
        ("dark", "ellipse", (0.64, 0.66, 0.88, 0.92)),
        ("trim", "ellipse", (0.18, 0.73, 0.30, 0.85)),
        ("trim", "ellipse", (0.70, 0.73, 0.82, 0.85)),
    ],
    "clock": [
        ("trim", "ellipse", (0.08, 0.02, 0.40, 0.32)),
        ("trim", "ellipse", (0.60, 0.02, 0.92, 0.32)),
        ("dark", "box", (0.22, 0.84, 0.32, 0.98)),
        ("dark", "box", (0.68, 0.84, 0.78, 0.98)),
        ("body", "ellipse", (0.06, 0.10, 0.94, 0.94)),
        ("light", "ellipse", (0.25, 0.28, 0.75, 0.76)),
        ("dark", "box", (0.48, 0.32, 0.53, 0.54)),
        ("dark", "box", (0.48, 0.50, 0.68, 0.55)),
    ],
    "duck": [
        ("body", "poly", (0.16, 0.56, 0.0, 0.40, 0.10, 0.74)),
        ("body", "ellipse", (0.06, 0.46, 0.82, 0.96)),
        ("body", "ellipse", (0.50, 0.08, 0.88, 0.52)),
        ("trim", "poly", (0.84, 0.24, 1.0, 0.34, 0.84, 0.42)),
        ("dark", "ellipse", (0.70, 0.20, 0.78, 0.29)),
        ("trim", "ellipse", (0.20, 0.58, 0.54, 0.82)),
    ],
    "ball": [
        ("body", "ellipse", (0.06, 0.06, 0.94, 0.94)),
        ("light", "ellipse", (0.24, 0.20, 0.40, 0.34)),
    ],
    "flower": [
        ("trim", "box", (0.47, 0.50, 0.53, 0.98)),
        ("body", "ellipse", (0.34, 0.02, 0.66, 0.34)),
        ("body", "ellipse", (0.34, 0.38, 0.66, 0.70)),
        ("body", "ellipse", (0.14, 0.20, 0.48, 0.52)),
        ("body", "ellipse", (0.52, 0.20, 0.86, 0.52)),
        ("dark", "ellipse", (0.38, 0.24, 0.62, 0.48)),
    ],
}
PROPS = ("ball", "flower")  # only ever the second thing
NOUNS = tuple(n for n in SHAPES if n not in PROPS)
# Where a thing wears something: centre x, top y, width (unit coordinates).
HEADS = {
    "mug": (0.42, 0.12, 0.5),
    "teapot": (0.5, 0.2, 0.4),
    "backpack": (0.5, 0.14, 0.5),
    "vase": (0.5, 0.08, 0.34),
    "lamp": (0.5, 0.08, 0.42),
    "boot": (0.44, 0.08, 0.4),
    "dog": (0.74, 0.2, 0.34),
    "cat": (0.5, 0.18, 0.44),
    "robot": (0.5, 0.12, 0.46),
    "car": (0.52, 0.26, 0.4),
    "clock": (0.5, 0.14, 0.44),
    "duck": (0.69, 0.12, 0.36),
}
WEARABLES: dict[
    str, list[Part]
] = {  # unit coordinates of the head box: x in widths from its centre, y up from its top
    "hat": [
        ("body", "box", (-0.75, -0.16, 0.75, 0.04)),
        ("body", "box", (-0.45, -0.75, 0.45, -0.1)),
        ("dark", "box", (-0.45, -0.28, 0.45, -0.14)),
    ],
    "crown": [
        (
            "gold",
            "poly",
            (
                -0.55,
                0.05,
                -0.65,
                -0.6,
                -0.28,
                -0.28,
                0,
                -0.75,
                0.28,
                -0.28,
                0.65,
                -0.6,
                0.55,
                0.05,
            ),
        )
    ],
    "bow": [
        ("body", "poly", (0, -0.2, -0.7, -0.55, -0.7, 0.15)),
        ("body", "poly", (0, -0.2, 0.7, -0.55, 0.7, 0.15)),
        ("dark", "ellipse", (-0.15, -0.36, 0.15, -0.04)),
    ],
}
# What a colour word covers: hue, saturation and value ranges.
COLOURS: dict[str, tuple[float, float, float, float, float, float]] = {
    "red": (-0.02, 0.02, 0.75, 1.0, 0.7, 0.95),
    "orange": (0.065, 0.09, 0.8, 1.0, 0.9, 1.0),
    "yellow": (0.14, 0.165, 0.7, 1.0, 0.9, 1.0),
    "green": (0.29, 0.36, 0.6, 0.95, 0.45, 0.75),
    "blue": (0.58, 0.64, 0.7, 1.0, 0.6, 0.95),
    "purple": (0.74, 0.79, 0.5, 0.85, 0.45, 0.75),
    "white": (0.0, 1.0, 0.0, 0.05, 0.93, 1.0),
    "black": (0.0, 1.0, 0.0, 0.2, 0.05, 0.16),
}
PATTERNS = ("plain", "dots", "stripes", "bars", "checks", "halves")


@dataclass(frozen=True)
class Look:
    """How one instance looks, in any scene. `colour` is the word for `body`, or None where there is
    none.
    """

    noun: str
    body: RGB
    accent: RGB
    pattern: str = "plain"
    pitch: float = 0.22  # size of the pattern, in object widths
    aspect: float = 1.0  # width over height, relative to the class's usual one
    colour: str | None = None


@dataclass(frozen=True)
class Thing:
    """A look in a scene: centre and height in pixels, tilt in degrees."""

    look: Look
    wears: str | None
    wear_colour: RGB
    x: float
    y: float
    height: float
    tilt: float
    flip: bool


@dataclass(frozen=True)
class Scene:
    """Things in front of a place. `place_seed` varies how the place is drawn."""

    things: tuple[Thing, ...]
    place: str
    place_seed: int


@dataclass(frozen=True)
class Captioned:
    """A caption, and for each word of it the index of the thing it speaks of (-1: the place, None:
    neither).
    """

    text: str
    owners: tuple[int | None, ...]


def _hsv(h: float, s: float, v: float) -> RGB:
    r, g, b = colorsys.hsv_to_rgb(h % 1.0, s, v)
    return int(r * 255), int(g * 255), int(b * 255)


def random_colour(rng: Random, word: str | None = None) -> RGB:
    """A colour that `word` names, or any colour at all."""
    if word is None:
        return _hsv(rng.random(), rng.uniform(0.15, 1.0), rng.uniform(0.3, 1.0))
    h0, h1, s0, s1, v0, v1 = COLOURS[word]
    return _hsv(rng.uniform(h0, h1), rng.uniform(s0, s1), rng.uniform(v0, v1))


def random_look(rng: Random, noun: str, colour: str | None = None) -> Look:
    """An instance of `noun`; where `colour` is given its body is of that colour."""
    body, accent = random_colour(rng, colour), random_colour(rng)
    while sum(abs(a - b) for a, b in zip(body, accent)) < 150:  # an accent must be seen on the body
        accent = random_colour(rng)
    return Look(
        noun,
        body,
        accent,
        rng.choice(("plain", *PATTERNS)),
        rng.uniform(0.16, 0.3),
        rng.uniform(0.8, 1.2),
        colour,
    )


def pose(
    rng: Random,
    look: Look,
    wears: str | None = None,
    slot: int | None = None,
    height: tuple[float, float] = (30, 44),
) -> Thing:
    """Put a look somewhere: alone near the middle, or in the left (`slot` 0) or right (1) half."""
    if slot is None:
        x, h = rng.uniform(24, 40), rng.uniform(*height)
    else:
        x, h = (rng.uniform(15, 20) if slot == 0 else rng.uniform(44, 49)), rng.uniform(25, 31)
    y = min(rng.uniform(34, 46), 62 - h / 2)
    return Thing(look, wears, random_colour(rng), x, y, h, rng.uniform(-10, 10), rng.random() < 0.5)


# ------------------------------------------------------------------------------------------ drawing
def _draw_parts(
    draw: ImageDraw.ImageDraw,
    parts: list[Part],
    only: str | None,
    fill,
    box: tuple[float, float, float, float],
) -> None:
    """Draw unit-coordinate parts into `box` (x, y, width, height); `fill` maps a colour name to a
    fill.
    """
    x0, y0, w, h = box
    for name, shape, c in parts:
        if only is not None and name != only:
            continue
        pts = [(x0 + c[i] * w, y0 + c[i + 1] * h) for i in range(0, len(c), 2)]
        colour = fill(name)
        if shape == "poly":
            draw.polygon(pts, fill=colour)
        elif shape == "box":
            draw.rectangle(pts, fill=colour)
        elif shape == "round":
            draw.rounded_rectangle(pts, radius=w * 0.16, fill=colour)
        elif shape == "ellipse":
            draw.ellipse(pts, fill=colour)
        else:
            draw.ellipse(pts, outline=colour, width=max(2, round(w * 0.1)))


def _texture(look: Look, w: int, h: int) -> Image.Image:
    """The body's surface: its colour with the accent's pattern."""
    image = Image.new("RGB", (w, h), look.body)
    draw, p = ImageDraw.Draw(image), max(3.0, look.pitch * w)
    if look.pattern == "dots":
        for row in range(int(h / p) + 2):
            for col in range(int(w / p) + 2):
                cx, cy, r = (col + row % 2 * 0.5) * p, row * p, p * 0.3
                draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=look.accent)
    elif look.pattern == "stripes":
        for row in range(int(h / p) + 1):
            draw.rectangle((0, row * p, w, row * p + p * 0.38), fill=look.accent)
    elif look.pattern == "bars":
        for col in range(int(w / p) + 1):
            draw.rectangle((col * p, 0, col * p + p * 0.38, h), fill=look.accent)
    elif look.pattern == "checks":
        for row in range(int(h / p) + 1):
            for col in range(row % 2, int(w / p) + 1, 2):
                draw.rectangle(
                    (col * p, row * p, col * p + p * 0.9, row * p + p * 0.9), fill=look.accent
                )
    elif look.pattern == "halves":
        draw.rectangle((0, h * 0.58, w, h), fill=look.accent)
    return image


def _draw_thing(thing: Thing) -> tuple[Image.Image, tuple[int, int]]:
    """One thing as an RGBA layer and where its top left corner goes."""
    look = thing.look
    h = int(thing.height * _SS)
    w = int(h * look.aspect)
    pad = int(0.32 * h)  # room for what it wears and for tilting
    size = (w + 2 * pad, h + 2 * pad)
    fixed = {
        "dark": (28, 26, 30),
        "light": (245, 245, 240),
        "gold": (250, 200, 40),
        "trim": look.accent,
        "body": look.body,
    }
    layer = Image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    parts = SHAPES[look.noun]
    _draw_parts(draw, parts, None, lambda name: (*fixed[name], 255), (pad, pad, w, h))
    if look.pattern != "plain":
        # The pattern covers the body only: what was drawn over the body is drawn again below.
        body = Image.new("L", size)
        mask = ImageDraw.Draw(body)
        _draw_parts(mask, parts, None, lambda name: 255 if name == "body" else 0, (pad, pad, w, h))
        surface = Image.new("RGB", size)
        surface.paste(_texture(look, w, h), (pad, pad))
        layer.paste(surface, (0, 0), body)
    if thing.wears:
        cx, top, width = HEADS[look.noun]
        worn = {**fixed, "body": thing.wear_colour}
        _draw_parts(
            draw,
            WEARABLES[thing.wears],
            None,
            lambda name: (*worn[name], 255),
            (pad + cx * w, pad + top * h, width * w, width * w),
        )
    if thing.flip:
        layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layer = layer.rotate(thing.tilt, Image.Resampling.BILINEAR)
    return layer, (int(thing.x * _SS - size[0] / 2), int(thing.y * _SS - size[1] / 2))


def render(scene: Scene) -> tuple[Image.Image, np.ndarray]:
    """Draw a scene.

    Returns the RGB image (64 x 64) and boolean masks (things, 64, 64) of the pixels each thing
    covers.
    """
    n = SIZE * _SS
    canvas = Image.new("RGB", (n, n))
    places.PLACES[scene.place](ImageDraw.Draw(canvas), Random(scene.place_seed), n)
    masks = []
    for thing in scene.things:
        layer, corner = _draw_thing(thing)
        canvas.paste(layer, corner, layer)
        mask = Image.new("L", (n, n))
        mask.paste(layer.getchannel("A"), corner)
        masks.append(np.asarray(mask.reduce(_SS)) > 127)
    return canvas.reduce(_SS), np.stack(masks)


PLACES = tuple(places.PLACES)
HOME_PLACES = (
    "on a wooden floor",
    "in a kitchen",
)  # where a subject's photos are taken; prompts ask for the others

# ----------------------------------------------------------------------------------------- captions
IDENTIFIERS = ("sks", "zwx", "ohwx", "xjy", "qvt")  # words that mean nothing in this world


def caption(rng: Random, scene: Scene, plain: bool = False) -> Captioned:
    """Say what a scene shows. `plain` names everything that has a word; otherwise some of it is
    left out.
    """
    words: list[tuple[str, int | None]] = []

    def say(text: str, owner: int | None = None) -> None:
        words.extend((word, owner) for word in text.split())

    if not plain and rng.random() < 0.4:
        say(rng.choice(("a photo of", "a picture of")))
    for i, thing in enumerate(scene.things):
        if i:
            say(rng.choice(("and", "next to")))
        named = thing.look.colour if thing.look.colour and (plain or rng.random() < 0.85) else None
        meaningless = rng.choice(IDENTIFIERS) if not plain and rng.random() < 0.08 else None
        say("an" if (named or meaningless or thing.look.noun)[0] in "aeiou" else "a")
        say(named or "", i)
        say(meaningless or "")
        say(thing.look.noun, i)
        if thing.wears:
            say("wearing a")
            say(thing.wears, i)
    if plain or rng.random() < 0.93:
        *link, last = scene.place.split()
        say(" ".join(link))
        say(last, -1)
        words = [(w, -1 if w in ("cobblestone", "brick", "city") else o) for w, o in words]
    return Captioned(" ".join(w for w, _ in words), tuple(o for _, o in words))


def random_scene(rng: Random, things: int | None = None, wears: bool = True) -> Scene:
    """A scene of one or two things of different classes in a place."""
    count = things or (1 if rng.random() < 0.45 else 2)
    nouns = [rng.choice(NOUNS)]
    if count == 2:
        nouns.append(rng.choice([n for n in SHAPES if n not in nouns]))
        rng.shuffle(nouns) if nouns[1] not in PROPS else None
    placed = []
    sides = [0, 1]
    rng.shuffle(sides)  # the thing named first is not always the left one
    for i, noun in enumerate(nouns):
        look = random_look(rng, noun, rng.choice(tuple(COLOURS)) if rng.random() < 0.65 else None)
        worn = (
            rng.choice(tuple(WEARABLES)) if wears and noun in HEADS and rng.random() < 0.2 else None
        )
        placed.append(pose(rng, look, worn, sides[i] if count == 2 else None))
    return Scene(tuple(placed), rng.choice(PLACES), rng.getrandbits(32))


def crowded_scene(rng: Random, things: int = 5) -> Scene:
    """Things of any look all over a place, one before the other: more looks to an image than a
    captioned scene has.
    """
    looks = [random_look(rng, rng.choice(NOUNS)) for _ in range(things)]
    placed = [
        replace(pose(rng, look), x=rng.uniform(8, 56), y=rng.uniform(12, 54)) for look in looks
    ]
    return Scene(tuple(placed), rng.choice(PLACES), rng.getrandbits(32))


# ----------------------------------------------------------------------------------------- subjects
def _look(
    noun: str, body: str, accent: str, pattern: str, pitch: float = 0.22, aspect: float = 1.0
) -> Look:
    return Look(noun, _rgb(body), _rgb(accent), pattern, pitch, aspect)


def _rgb(code: str) -> RGB:
    red, green, blue = bytes.fromhex(code)
    return red, green, blue


SUBJECTS: dict[str, Look] = {
    "teal_mug": _look("mug", "1e9c94", "e0219b", "dots", 0.24),
    "pink_teapot": _look("teapot", "f29ab8", "3a4fa8", "stripes", 0.2, 1.1),
    "olive_backpack": _look("backpack", "7d8433", "f2c14e", "checks", 0.2, 0.9),
    "lilac_vase": _look("vase", "c3a6e6", "2f7d4f", "bars", 0.2, 0.95),
    "mint_lamp": _look("lamp", "9fe3c1", "b5482e", "dots", 0.2, 1.05),
    "brown_boot": _look("boot", "7a4a2a", "5fd0e8", "stripes", 0.2, 1.0),
    "tan_dog": _look("dog", "cfa772", "5a2f86", "dots", 0.18, 1.1),
    "navy_cat": _look("cat", "223366", "f08a5d", "stripes", 0.17, 0.9),
    "coral_robot": _look("robot", "f2715f", "17706e", "checks", 0.18, 0.95),
    "turquoise_car": _look("car", "2fc4c9", "8c1c3a", "halves", 0.2, 1.15),
    "maroon_clock": _look("clock", "6e1730", "b7d968", "bars", 0.17, 1.0),
    "salmon_duck": _look("duck", "f5a48b", "27506b", "checks", 0.18, 1.05),
    "grey_mug": _look("mug", "8a9099", "e8762c", "stripes", 0.22, 0.85),
    "magenta_cat": _look("cat", "c62a88", "d9e021", "dots", 0.2, 1.1),
    "khaki_robot": _look("robot", "b8b06a", "a3208f", "bars", 0.2, 1.1),
    "rust_backpack": _look("backpack", "a8502a", "8fd3f4", "dots", 0.22, 1.1),
    "sand_teapot": _look("teapot", "d9c08c", "6a2fb0", "dots", 0.22, 0.95),
    "plum_vase": _look("vase", "6b2d5c", "e8d44d", "checks", 0.24, 1.05),
    "slate_lamp": _look("lamp", "5b6c7d", "f4a7b9", "stripes", 0.22, 0.95),
    "ivory_boot": _look("boot", "efe6c8", "1f5fa8", "dots", 0.2, 1.0),
    "lime_car": _look("car", "a4d233", "4a2a6a", "bars", 0.18, 0.95),
    "indigo_duck": _look("duck", "3f3a8c", "f5b82e", "stripes", 0.22, 1.05),
}


def photos(subject: str, count: int = 5) -> list[Image.Image]:
    """The training photos of a subject: it alone, large, in two everyday places."""
    rng, look = Random(zlib.crc32(subject.encode())), SUBJECTS[subject]
    return [
        render(
            Scene(
                (pose(rng, replace(look), height=(38, 46)),),
                HOME_PLACES[i % len(HOME_PLACES)],
                rng.getrandbits(32),
            )
        )[0]
        for i in range(count)
    ]
