"""The sandbox world: a renderer of small captioned scenes, and the subjects that live in it.

A scene is one or two things in a place. A caption can name a thing's class noun, its colour, what it
wears, and the place; it has no words for patterns, accents, proportions and in-between colours. Those make
an instance: a subject whose look no caption can express, which is what fine-tuning has to learn.
Everything is deterministic in the `random.Random` that is passed in.
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

# --------------------------------------------------------------------------------------------- things
# "body" carries the body colour and the pattern, "trim" the accent colour, "dark" and "light" are fixed.
SHAPES: dict[str, list[Part]] = {
    "mug": [("trim", "ring", (.52, .28, .98, .76)), ("body", "box", (.12, .14, .72, .94)), ("dark", "ellipse", (.12, .06, .72, .22))],
    "teapot": [("trim", "ring", (.0, .38, .38, .82)), ("body", "poly", (.68, .80, .80, .42, .96, .30, 1., .38, .88, .62, .78, .90)),
               ("body", "ellipse", (.18, .28, .82, .95)), ("trim", "ellipse", (.42, .12, .58, .30)), ("dark", "box", (.34, .28, .66, .33))],
    "backpack": [("trim", "ring", (.33, .0, .67, .30)), ("body", "round", (.17, .12, .83, .97)), ("trim", "round", (.27, .58, .73, .88)),
                 ("dark", "box", (.17, .36, .83, .41))],
    "vase": [("body", "poly", (.38, .06, .62, .06, .57, .27, .84, .56, .68, .96, .32, .96, .16, .56, .43, .27)), ("trim", "box", (.33, .02, .67, .11)),
             ("trim", "box", (.30, .90, .70, .97))],
    "lamp": [("trim", "box", (.45, .45, .55, .90)), ("body", "poly", (.30, .06, .70, .06, .92, .54, .08, .54)), ("trim", "ellipse", (.24, .82, .76, .98))],
    "boot": [("body", "poly", (.26, .06, .62, .06, .62, .54, .90, .64, .97, .86, .26, .86)), ("dark", "box", (.24, .85, .97, .96)),
             ("trim", "box", (.23, .04, .65, .18))],
    "dog": [("body", "poly", (.20, .60, .02, .36, .08, .32, .28, .50)), ("body", "box", (.22, .60, .34, .96)), ("body", "box", (.58, .60, .70, .96)),
            ("body", "ellipse", (.14, .44, .76, .80)), ("body", "ellipse", (.56, .16, .92, .54)), ("trim", "ellipse", (.52, .16, .66, .50)),
            ("trim", "ellipse", (.78, .34, 1., .52)), ("dark", "ellipse", (.92, .34, 1., .42)), ("dark", "ellipse", (.72, .26, .80, .34))],
    "cat": [("trim", "ring", (.60, .50, .98, .96)), ("body", "ellipse", (.24, .42, .76, .98)), ("body", "poly", (.28, .34, .28, .02, .48, .20)),
            ("body", "poly", (.72, .34, .72, .02, .52, .20)), ("body", "ellipse", (.25, .14, .75, .54)), ("light", "ellipse", (.34, .26, .46, .38)),
            ("light", "ellipse", (.54, .26, .66, .38)), ("dark", "ellipse", (.38, .27, .43, .38)), ("dark", "ellipse", (.57, .27, .62, .38)),
            ("trim", "ellipse", (.45, .38, .55, .46))],
    "robot": [("trim", "box", (.47, .0, .53, .16)), ("trim", "box", (.28, .78, .42, .98)), ("trim", "box", (.58, .78, .72, .98)),
              ("trim", "box", (.06, .42, .18, .74)), ("trim", "box", (.82, .42, .94, .74)), ("body", "box", (.18, .40, .82, .80)),
              ("body", "box", (.28, .10, .72, .38)), ("light", "box", (.34, .17, .46, .29)), ("light", "box", (.54, .17, .66, .29))],
    "car": [("body", "poly", (.02, .78, .02, .52, .22, .48, .34, .24, .70, .24, .84, .48, .98, .54, .98, .78)),
            ("light", "poly", (.28, .48, .37, .30, .50, .30, .50, .48)), ("light", "poly", (.55, .48, .55, .30, .68, .30, .76, .48)),
            ("dark", "ellipse", (.12, .66, .36, .92)), ("dark", "ellipse", (.64, .66, .88, .92)), ("trim", "ellipse", (.18, .73, .30, .85)),
            ("trim", "ellipse", (.70, .73, .82, .85))],
    "clock": [("trim", "ellipse", (.08, .02, .40, .32)), ("trim", "ellipse", (.60, .02, .92, .32)), ("dark", "box", (.22, .84, .32, .98)),
              ("dark", "box", (.68, .84, .78, .98)), ("body", "ellipse", (.06, .10, .94, .94)), ("light", "ellipse", (.25, .28, .75, .76)),
              ("dark", "box", (.48, .32, .53, .54)), ("dark", "box", (.48, .50, .68, .55))],
    "duck": [("body", "poly", (.16, .56, .0, .40, .10, .74)), ("body", "ellipse", (.06, .46, .82, .96)), ("body", "ellipse", (.50, .08, .88, .52)),
             ("trim", "poly", (.84, .24, 1., .34, .84, .42)), ("dark", "ellipse", (.70, .20, .78, .29)), ("trim", "ellipse", (.20, .58, .54, .82))],
    "ball": [("body", "ellipse", (.06, .06, .94, .94)), ("light", "ellipse", (.24, .20, .40, .34))],
    "flower": [("trim", "box", (.47, .50, .53, .98)), ("body", "ellipse", (.34, .02, .66, .34)), ("body", "ellipse", (.34, .38, .66, .70)),
               ("body", "ellipse", (.14, .20, .48, .52)), ("body", "ellipse", (.52, .20, .86, .52)), ("dark", "ellipse", (.38, .24, .62, .48))],
}
PROPS = ("ball", "flower")  # only ever the second thing
NOUNS = tuple(n for n in SHAPES if n not in PROPS)
# Where a thing wears something: centre x, top y, width (unit coordinates).
HEADS = {"mug": (.42, .12, .5), "teapot": (.5, .2, .4), "backpack": (.5, .14, .5), "vase": (.5, .08, .34), "lamp": (.5, .08, .42), "boot": (.44, .08, .4),
         "dog": (.74, .2, .34), "cat": (.5, .18, .44), "robot": (.5, .12, .46), "car": (.52, .26, .4), "clock": (.5, .14, .44), "duck": (.69, .12, .36)}
WEARABLES: dict[str, list[Part]] = {  # unit coordinates of the head box: x in widths from its centre, y up from its top
    "hat": [("body", "box", (-.75, -.16, .75, .04)), ("body", "box", (-.45, -.75, .45, -.1)), ("dark", "box", (-.45, -.28, .45, -.14))],
    "crown": [("gold", "poly", (-.55, .05, -.65, -.6, -.28, -.28, 0, -.75, .28, -.28, .65, -.6, .55, .05))],
    "bow": [("body", "poly", (0, -.2, -.7, -.55, -.7, .15)), ("body", "poly", (0, -.2, .7, -.55, .7, .15)), ("dark", "ellipse", (-.15, -.36, .15, -.04))],
}
# What a colour word covers: hue, saturation and value ranges.
COLOURS: dict[str, tuple[float, float, float, float, float, float]] = {
    "red": (-.02, .02, .75, 1., .7, .95), "orange": (.065, .09, .8, 1., .9, 1.), "yellow": (.14, .165, .7, 1., .9, 1.), "green": (.29, .36, .6, .95, .45, .75),
    "blue": (.58, .64, .7, 1., .6, .95), "purple": (.74, .79, .5, .85, .45, .75), "white": (.0, 1., .0, .05, .93, 1.), "black": (.0, 1., .0, .2, .05, .16),
}
PATTERNS = ("plain", "dots", "stripes", "bars", "checks", "halves")


@dataclass(frozen=True)
class Look:
    """How one instance looks, in any scene. `colour` is the word for `body`, or None where there is none."""

    noun: str
    body: RGB
    accent: RGB
    pattern: str = "plain"
    pitch: float = .22  # size of the pattern, in object widths
    aspect: float = 1.  # width over height, relative to the class's usual one
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
    """A caption, and for each word of it the index of the thing it speaks of (-1: the place, None: neither)."""

    text: str
    owners: tuple[int | None, ...]


def _hsv(h: float, s: float, v: float) -> RGB:
    r, g, b = colorsys.hsv_to_rgb(h % 1., s, v)
    return int(r * 255), int(g * 255), int(b * 255)


def random_colour(rng: Random, word: str | None = None) -> RGB:
    """A colour that `word` names, or any colour at all."""
    if word is None:
        return _hsv(rng.random(), rng.uniform(.15, 1.), rng.uniform(.3, 1.))
    h0, h1, s0, s1, v0, v1 = COLOURS[word]
    return _hsv(rng.uniform(h0, h1), rng.uniform(s0, s1), rng.uniform(v0, v1))


def random_look(rng: Random, noun: str, colour: str | None = None) -> Look:
    """An instance of `noun`; where `colour` is given its body is of that colour."""
    body, accent = random_colour(rng, colour), random_colour(rng)
    while sum(abs(a - b) for a, b in zip(body, accent)) < 150:  # an accent must be seen on the body
        accent = random_colour(rng)
    return Look(noun, body, accent, rng.choice(("plain", *PATTERNS)), rng.uniform(.16, .3), rng.uniform(.8, 1.2), colour)


def pose(rng: Random, look: Look, wears: str | None = None, slot: int | None = None, height: tuple[float, float] = (30, 44)) -> Thing:
    """Put a look somewhere: alone near the middle, or in the left (`slot` 0) or right (1) half."""
    if slot is None:
        x, h = rng.uniform(24, 40), rng.uniform(*height)
    else:
        x, h = (rng.uniform(15, 20) if slot == 0 else rng.uniform(44, 49)), rng.uniform(25, 31)
    y = min(rng.uniform(34, 46), 62 - h / 2)
    return Thing(look, wears, random_colour(rng), x, y, h, rng.uniform(-10, 10), rng.random() < .5)


# --------------------------------------------------------------------------------------------- drawing
def _draw_parts(draw: ImageDraw.ImageDraw, parts: list[Part], only: str | None, fill, box: tuple[float, float, float, float]) -> None:
    """Draw unit-coordinate parts into `box` (x, y, width, height); `fill` maps a colour name to a fill."""
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
            draw.rounded_rectangle(pts, radius=w * .16, fill=colour)
        elif shape == "ellipse":
            draw.ellipse(pts, fill=colour)
        else:
            draw.ellipse(pts, outline=colour, width=max(2, round(w * .1)))


def _texture(look: Look, w: int, h: int) -> Image.Image:
    """The body's surface: its colour with the accent's pattern."""
    image = Image.new("RGB", (w, h), look.body)
    draw, p = ImageDraw.Draw(image), max(3., look.pitch * w)
    if look.pattern == "dots":
        for row in range(int(h / p) + 2):
            for col in range(int(w / p) + 2):
                cx, cy, r = (col + row % 2 * .5) * p, row * p, p * .3
                draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=look.accent)
    elif look.pattern == "stripes":
        for row in range(int(h / p) + 1):
            draw.rectangle((0, row * p, w, row * p + p * .38), fill=look.accent)
    elif look.pattern == "bars":
        for col in range(int(w / p) + 1):
            draw.rectangle((col * p, 0, col * p + p * .38, h), fill=look.accent)
    elif look.pattern == "checks":
        for row in range(int(h / p) + 1):
            for col in range(row % 2, int(w / p) + 1, 2):
                draw.rectangle((col * p, row * p, col * p + p * .9, row * p + p * .9), fill=look.accent)
    elif look.pattern == "halves":
        draw.rectangle((0, h * .58, w, h), fill=look.accent)
    return image


def _draw_thing(thing: Thing) -> tuple[Image.Image, tuple[int, int]]:
    """One thing as an RGBA layer and where its top left corner goes."""
    look = thing.look
    h = int(thing.height * _SS)
    w = int(h * look.aspect)
    pad = int(.32 * h)  # room for what it wears and for tilting
    size = (w + 2 * pad, h + 2 * pad)
    fixed = {"dark": (28, 26, 30), "light": (245, 245, 240), "gold": (250, 200, 40), "trim": look.accent, "body": look.body}
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
        _draw_parts(draw, WEARABLES[thing.wears], None, lambda name: (*worn[name], 255), (pad + cx * w, pad + top * h, width * w, width * w))
    if thing.flip:
        layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    layer = layer.rotate(thing.tilt, Image.Resampling.BILINEAR)
    return layer, (int(thing.x * _SS - size[0] / 2), int(thing.y * _SS - size[1] / 2))


def render(scene: Scene) -> tuple[Image.Image, np.ndarray]:
    """Draw a scene.

    Returns the RGB image (64 x 64) and boolean masks (things, 64, 64) of the pixels each thing covers.
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
HOME_PLACES = ("on a wooden floor", "in a kitchen")  # where a subject's photos are taken; prompts ask for the others

# --------------------------------------------------------------------------------------------- captions
IDENTIFIERS = ("sks", "zwx", "ohwx", "xjy", "qvt")  # words that mean nothing in this world


def caption(rng: Random, scene: Scene, plain: bool = False) -> Captioned:
    """Say what a scene shows. `plain` names everything that has a word; otherwise some of it is left out."""
    words: list[tuple[str, int | None]] = []

    def say(text: str, owner: int | None = None) -> None:
        words.extend((word, owner) for word in text.split())

    if not plain and rng.random() < .4:
        say(rng.choice(("a photo of", "a picture of")))
    for i, thing in enumerate(scene.things):
        if i:
            say(rng.choice(("and", "next to")))
        named = thing.look.colour if thing.look.colour and (plain or rng.random() < .85) else None
        meaningless = rng.choice(IDENTIFIERS) if not plain and rng.random() < .08 else None
        say("an" if (named or meaningless or thing.look.noun)[0] in "aeiou" else "a")
        say(named or "", i)
        say(meaningless or "")
        say(thing.look.noun, i)
        if thing.wears:
            say("wearing a")
            say(thing.wears, i)
    if plain or rng.random() < .93:
        *link, last = scene.place.split()
        say(" ".join(link))
        say(last, -1)
        words = [(w, -1 if w in ("cobblestone", "brick", "city") else o) for w, o in words]
    return Captioned(" ".join(w for w, _ in words), tuple(o for _, o in words))


def random_scene(rng: Random, things: int | None = None, wears: bool = True) -> Scene:
    """A scene of one or two things of different classes in a place."""
    count = things or (1 if rng.random() < .45 else 2)
    nouns = [rng.choice(NOUNS)]
    if count == 2:
        nouns.append(rng.choice([n for n in SHAPES if n not in nouns]))
        rng.shuffle(nouns) if nouns[1] not in PROPS else None
    placed = []
    sides = [0, 1]
    rng.shuffle(sides)  # the thing named first is not always the left one
    for i, noun in enumerate(nouns):
        look = random_look(rng, noun, rng.choice(tuple(COLOURS)) if rng.random() < .65 else None)
        worn = rng.choice(tuple(WEARABLES)) if wears and noun in HEADS and rng.random() < .2 else None
        placed.append(pose(rng, look, worn, sides[i] if count == 2 else None))
    return Scene(tuple(placed), rng.choice(PLACES), rng.getrandbits(32))


def crowded_scene(rng: Random, things: int = 5) -> Scene:
    """Things of any look all over a place, one before the other: more looks to an image than a captioned scene has."""
    looks = [random_look(rng, rng.choice(NOUNS)) for _ in range(things)]
    placed = [replace(pose(rng, look), x=rng.uniform(8, 56), y=rng.uniform(12, 54)) for look in looks]
    return Scene(tuple(placed), rng.choice(PLACES), rng.getrandbits(32))


# --------------------------------------------------------------------------------------------- subjects
def _look(noun: str, body: str, accent: str, pattern: str, pitch: float = .22, aspect: float = 1.) -> Look:
    return Look(noun, tuple(bytes.fromhex(body)), tuple(bytes.fromhex(accent)), pattern, pitch, aspect)  # type: ignore[arg-type]


SUBJECTS: dict[str, Look] = {
    "teal_mug": _look("mug", "1e9c94", "e0219b", "dots", .24),
    "pink_teapot": _look("teapot", "f29ab8", "3a4fa8", "stripes", .2, 1.1),
    "olive_backpack": _look("backpack", "7d8433", "f2c14e", "checks", .2, .9),
    "lilac_vase": _look("vase", "c3a6e6", "2f7d4f", "bars", .2, .95),
    "mint_lamp": _look("lamp", "9fe3c1", "b5482e", "dots", .2, 1.05),
    "brown_boot": _look("boot", "7a4a2a", "5fd0e8", "stripes", .2, 1.),
    "tan_dog": _look("dog", "cfa772", "5a2f86", "dots", .18, 1.1),
    "navy_cat": _look("cat", "223366", "f08a5d", "stripes", .17, .9),
    "coral_robot": _look("robot", "f2715f", "17706e", "checks", .18, .95),
    "turquoise_car": _look("car", "2fc4c9", "8c1c3a", "halves", .2, 1.15),
    "maroon_clock": _look("clock", "6e1730", "b7d968", "bars", .17, 1.),
    "salmon_duck": _look("duck", "f5a48b", "27506b", "checks", .18, 1.05),
    "grey_mug": _look("mug", "8a9099", "e8762c", "stripes", .22, .85),
    "magenta_cat": _look("cat", "c62a88", "d9e021", "dots", .2, 1.1),
    "khaki_robot": _look("robot", "b8b06a", "a3208f", "bars", .2, 1.1),
    "rust_backpack": _look("backpack", "a8502a", "8fd3f4", "dots", .22, 1.1),
}


def photos(subject: str, count: int = 5) -> list[Image.Image]:
    """The training photos of a subject: it alone, large, in two everyday places."""
    rng, look = Random(zlib.crc32(subject.encode())), SUBJECTS[subject]
    return [
        render(Scene((pose(rng, replace(look), height=(38, 46)),), HOME_PLACES[i % len(HOME_PLACES)], rng.getrandbits(32)))[0] for i in range(count)
    ]
