"""The sandbox world: small captioned scenes, and the subjects that live in it.

A scene is one or two things in a place. A caption can name a thing's class noun, its colour, what
it wears and holds, the view, which of two things is left, and the place; it has no words for
patterns, accents, proportions and in-between colours. Those make an instance: a subject whose look
no caption can express, which is what fine-tuning has to learn. Everything is deterministic in the
`random.Random` that is passed in.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from random import Random

from PIL import Image

from dreamblend.sandbox.drawing import SIZE, Scene, draw, render
from dreamblend.sandbox.looks import (
    COLOURS,
    PATTERNS,
    RGB,
    Extra,
    Look,
    Thing,
    random_colour,
    random_extra,
    random_look,
)
from dreamblend.sandbox.places import PLACES as _PLACES
from dreamblend.sandbox.shapes import (
    HOLDABLES,
    NOUNS,
    PROPS,
    SHAPES,
    STANDING_OUT,
    WEARABLES,
    WIDTHS,
)

__all__ = [
    "COLOURS",
    "HOLDABLES",
    "NOUNS",
    "PATTERNS",
    "PROPS",
    "SHAPES",
    "SIZE",
    "STANDING_OUT",
    "WEARABLES",
    "Extra",
    "Look",
    "Scene",
    "Thing",
    "draw",
    "random_colour",
    "random_extra",
    "random_look",
    "render",
]

PLACES = tuple(_PLACES)
HOME_PLACES = (
    "on a wooden floor",
    "in a kitchen",
)  # where a subject's photos are taken; prompts ask for the others
VIEWS = ("close up", "far away", "upside down", "on its side")
SIDES = ("left of", "right of")
IDENTIFIERS = ("sks", "zwx", "ohwx", "xjy", "qvt")  # words that mean nothing in this world


# ------------------------------------------------------------------------------------------- scenes
def pose(
    rng: Random,
    look: Look,
    wears: Extra | None = None,
    slot: int | None = None,
    height: tuple[float, float] = (32, 44),
    holds: Extra | None = None,
    view: str | None = None,
) -> Thing:
    """Put a look somewhere: alone near the middle, or in the left (`slot` 0) or right (1) half. A
    scene is 64 wide and high.
    """
    if view in ("close up", "far away"):
        height = (50, 56) if view == "close up" else (15, 19)
    if slot is None:
        x, h = rng.uniform(26, 38), rng.uniform(*height)
    else:
        x, h = (rng.uniform(15.5, 18) if slot == 0 else rng.uniform(46, 48.5)), rng.uniform(28, 34)
    wide = look.aspect * WIDTHS.get(look.noun, 1.0)
    h = min(h, (60 if slot is None else 31) / wide)
    if wears or holds:
        h *= 0.88
    y = min(rng.uniform(36, 46), 61 - h / 2)
    tilt = rng.uniform(-7, 7)
    if view == "upside down":
        tilt += 180
    if view == "on its side":
        tilt += rng.choice((-90, 90))
    return Thing(look, x, y, h, tilt, rng.random() < 0.5, wears, holds)


def random_scene(rng: Random, things: int | None = None, extras: bool = True) -> Scene:
    """A scene of one or two things of different classes in a place; with `extras`, things wear and
    hold something now and then, and a thing alone is seen in an unusual pose.
    """
    count = things or (1 if rng.random() < 0.5 else 2)
    nouns = [rng.choice(NOUNS)]
    if count == 2:
        nouns.append(rng.choice([n for n in SHAPES if n not in nouns]))
    placed, slots = [], [0, 1]
    rng.shuffle(slots)  # the thing named first is not always the left one
    view = rng.choice(VIEWS) if extras and count == 1 and rng.random() < 0.2 else None
    for i, noun in enumerate(nouns):
        look = random_look(rng, noun, rng.choice(tuple(COLOURS)) if rng.random() < 0.7 else None)
        wears = holds = None
        if extras and noun in NOUNS and view is None and rng.random() < 0.3 / count + 0.05:
            kind = rng.randrange(7)
            wears = random_extra(rng, WEARABLES) if kind < 4 else None
            holds = random_extra(rng, HOLDABLES) if kind > 2 else None
        slot = slots[i] if count == 2 else None
        placed.append(pose(rng, look, wears, slot, holds=holds, view=view))
    return Scene(tuple(placed), rng.choice(PLACES), rng.getrandbits(32), view)


def crowded_scene(rng: Random, things: int = 4) -> Scene:
    """Things of any look all over a place, one before the other: more looks to an image than a
    captioned scene has.
    """
    placed = [
        replace(
            pose(
                rng,
                random_look(rng, rng.choice(tuple(SHAPES))),
                random_extra(rng, WEARABLES) if rng.random() < 0.2 else None,
                holds=random_extra(rng, HOLDABLES) if rng.random() < 0.2 else None,
                height=(22, 46),
            ),
            x=rng.uniform(8, 56),
            y=rng.uniform(12, 54),
        )
        for _ in range(things)
    ]
    placed = [t if t.look.noun in NOUNS else replace(t, wears=None, holds=None) for t in placed]
    return Scene(tuple(placed), rng.choice(PLACES), rng.getrandbits(32))


# ----------------------------------------------------------------------------------------- captions
@dataclass(frozen=True)
class Captioned:
    """A caption, and for each word of it the index of the thing it speaks of (-1: the place, None:
    neither).
    """

    text: str
    owners: tuple[int | None, ...]


def caption(rng: Random, scene: Scene, plain: bool = False) -> Captioned:
    """Say what a scene shows. `plain` names everything that has a word; otherwise some of it is
    left out.
    """
    words: list[tuple[str, int | None]] = []

    def say(text: str, owner: int | None = None) -> None:
        words.extend((word, owner) for word in text.split())

    def named(colour: str | None) -> str | None:
        return colour if colour and (plain or rng.random() < 0.88) else None

    if not plain and rng.random() < 0.3:
        say(rng.choice(("a photo of", "a picture of")))
    for i, thing in enumerate(scene.things):
        if i:
            left = scene.things[0].x < thing.x
            say(rng.choice(("and", "next to", SIDES[0] if left else SIDES[1])))
        colour = named(thing.look.colour)
        meaningless = rng.choice(IDENTIFIERS) if not plain and rng.random() < 0.08 else None
        say("an" if (colour or meaningless or thing.look.noun)[0] in "aeiou" else "a")
        say(colour or "", i)
        say(meaningless or "")
        say(thing.look.noun, i)
        for verb, extra in (("wearing", thing.wears), ("holding", thing.holds)):
            if extra:
                colour = named(extra.colour)
                say(f"{verb} an" if colour and colour[0] in "aeiou" else f"{verb} a")
                say(f"{colour or ''} {extra.name}", i)
    say(scene.view or "")
    if plain or rng.random() < 0.94:
        *link, last = scene.place.split()
        say(" ".join(link))
        say(last, -1)
        words = [(w, -1 if w in ("cobblestone", "brick", "city") else o) for w, o in words]
    return Captioned(" ".join(w for w, _ in words), tuple(o for _, o in words))


# ----------------------------------------------------------------------------------------- subjects
def _look(
    noun: str, body: str, accent: str, pattern: str, pitch: float = 0.22, aspect: float = 1.0
) -> Look:
    return Look(noun, _rgb(body), _rgb(accent), pattern, pitch, aspect)


def _rgb(code: str) -> RGB:
    red, green, blue = bytes.fromhex(code)
    return red, green, blue


SUBJECTS: dict[str, Look] = {
    "teal_mug": _look("mug", "1e9c94", "e0219b", "dots", 0.26),
    "pink_teapot": _look("teapot", "f29ab8", "3a4fa8", "stripes", 0.2, 1.05),
    "olive_backpack": _look("backpack", "7d8433", "f2c14e", "checks", 0.22, 0.95),
    "lilac_vase": _look("vase", "c3a6e6", "2f7d4f", "bars", 0.22, 0.95),
    "mint_lamp": _look("lamp", "9fe3c1", "b5482e", "dots", 0.24, 1.05),
    "brown_boot": _look("boot", "7a4a2a", "5fd0e8", "stripes", 0.22, 1.0),
    "tan_dog": _look("dog", "cfa772", "5a2f86", "dots", 0.2, 1.05),
    "navy_cat": _look("cat", "223366", "f08a5d", "stripes", 0.19, 0.95),
    "coral_robot": _look("robot", "f2715f", "17706e", "checks", 0.2, 0.95),
    "turquoise_car": _look("car", "2fc4c9", "8c1c3a", "halves", 0.2, 1.05),
    "maroon_clock": _look("clock", "6e1730", "b7d968", "bars", 0.19, 1.0),
    "salmon_duck": _look("duck", "f5a48b", "27506b", "checks", 0.2, 1.0),
    "grey_mug": _look("mug", "8a9099", "e8762c", "stripes", 0.24, 0.88),
    "magenta_cat": _look("cat", "c62a88", "d9e021", "dots", 0.22, 1.08),
    "khaki_robot": _look("robot", "b8b06a", "a3208f", "bars", 0.22, 1.08),
    "rust_backpack": _look("backpack", "a8502a", "8fd3f4", "dots", 0.24, 1.08),
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
                (pose(rng, look, height=(40, 46)),),
                HOME_PLACES[i % len(HOME_PLACES)],
                rng.getrandbits(32),
            )
        )[0]
        for i in range(count)
    ]
