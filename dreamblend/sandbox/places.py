"""The places of the sandbox world: each draws a background, varied by the random stream it is
given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from PIL import ImageDraw

RGB = tuple[int, int, int]


def _shade(rng: Random, colour: RGB, amount: int) -> RGB:
    d = rng.randint(-amount, amount)
    return tuple(min(255, max(0, c + d)) for c in colour)  # type: ignore[return-value]


def _specks(draw, rng, n, top, bottom, count, colour, r=1.5) -> None:
    for _ in range(count):
        x, y, s = rng.uniform(0, n), rng.uniform(top, bottom), rng.uniform(0.5, 1.0) * r
        draw.ellipse((x - s, y - s, x + s, y + s), fill=colour)


def _beach(draw, rng, n):
    horizon, shore = n * rng.uniform(0.22, 0.32), n * rng.uniform(0.45, 0.55)
    draw.rectangle((0, 0, n, horizon), fill=_shade(rng, (150, 205, 240), 12))
    draw.rectangle((0, horizon, n, shore), fill=_shade(rng, (30, 130, 185), 12))
    draw.rectangle((0, shore, n, n), fill=_shade(rng, (235, 212, 155), 10))
    draw.rectangle((0, shore, n, shore + 3), fill=(240, 248, 250))
    x = rng.uniform(0, n)
    draw.ellipse((x - 9, 6, x + 9, 24), fill=(255, 236, 120))
    _specks(draw, rng, n, shore + 6, n, 24, (205, 178, 118))


def _snow(draw, rng, n):
    horizon = n * rng.uniform(0.38, 0.5)
    draw.rectangle((0, 0, n, horizon), fill=_shade(rng, (165, 180, 200), 10))
    for _ in range(4):
        x, h = rng.uniform(0, n), rng.uniform(18, 34)
        draw.polygon(
            (x - h * 0.4, horizon, x, horizon - h, x + h * 0.4, horizon),
            fill=_shade(rng, (55, 95, 85), 10),
        )
    draw.rectangle((0, horizon, n, n), fill=_shade(rng, (238, 243, 250), 5))
    _specks(draw, rng, n, 0, n, 34, (255, 255, 255), 2.4)


def _cobbles(draw, rng, n):
    top = n * rng.uniform(0.3, 0.4)
    draw.rectangle((0, 0, n, top), fill=_shade(rng, (150, 125, 100), 15))
    for x in range(rng.randint(2, 12), n, 28):
        draw.rectangle((x, top * 0.25, x + 12, top * 0.75), fill=(70, 62, 66))
    draw.rectangle((0, top, n, n), fill=(66, 66, 70))
    size = rng.uniform(11, 14)
    for row in range(int((n - top) / size) + 1):
        for col in range(-1, int(n / size) + 1):
            x, y = (col + row % 2 * 0.5) * size, top + row * size
            draw.ellipse(
                (x + 1, y + 1, x + size - 1, y + size - 1), fill=_shade(rng, (132, 132, 136), 18)
            )


def _jungle(draw, rng, n):
    draw.rectangle((0, 0, n, n), fill=_shade(rng, (24, 70, 36), 8))
    for _ in range(34):
        x = rng.uniform(0, n)
        y = rng.uniform(0, n)
        r = rng.uniform(9, 20)
        a = rng.uniform(0, math.tau)
        dx, dy = math.cos(a) * r, math.sin(a) * r
        draw.polygon(
            (
                x - dx,
                y - dy,
                x - dy * 0.35,
                y + dx * 0.35,
                x + dx,
                y + dy,
                x + dy * 0.35,
                y - dx * 0.35,
            ),
            fill=_shade(rng, (44, 120, 52), 30),
        )


def _wood(draw, rng, n):
    top = n * rng.uniform(0.3, 0.42)
    draw.rectangle((0, 0, n, top), fill=_shade(rng, (222, 210, 190), 10))
    plank = rng.uniform(11, 15)
    for row in range(int((n - top) / plank) + 1):
        y = top + row * plank
        draw.rectangle((0, y, n, y + plank), fill=_shade(rng, (158, 106, 62), 14))
        draw.line((0, y, n, y), fill=(96, 60, 34), width=2)
        x = rng.uniform(0, n)
        draw.line((x, y, x, y + plank), fill=(96, 60, 34), width=2)


def _bricks(draw, rng, n):
    draw.rectangle((0, 0, n, n), fill=(196, 180, 168))
    h, w = 11, 25
    for row in range(n // h + 1):
        for col in range(-1, n // w + 1):
            x = (col + row % 2 * 0.5) * w
            draw.rectangle(
                (x, row * h, x + w - 3, row * h + h - 3), fill=_shade(rng, (150, 66, 50), 18)
            )
    draw.rectangle((0, n * 0.86, n, n), fill=_shade(rng, (120, 116, 112), 8))


def _night(draw, rng, n):
    draw.rectangle((0, 0, n, n), fill=_shade(rng, (16, 18, 52), 6))
    _specks(draw, rng, n, 0, n * 0.4, 14, (240, 240, 220), 1.2)
    x, ground = -4, n * 0.8
    while x < n:
        w, top = rng.uniform(16, 26), n * rng.uniform(0.12, 0.45)
        draw.rectangle((x, top, x + w, ground), fill=_shade(rng, (40, 38, 66), 10))
        for wy in range(int(top) + 4, int(ground) - 4, 9):
            for wx in range(int(x) + 3, int(x + w) - 4, 8):
                if rng.random() < 0.6:
                    draw.rectangle((wx, wy, wx + 3, wy + 4), fill=(250, 214, 110))
        x += w + 2
    draw.rectangle((0, ground, n, n), fill=(28, 28, 36))


def _moon(draw, rng, n):
    horizon = n * rng.uniform(0.36, 0.48)
    draw.rectangle((0, 0, n, horizon), fill=(6, 6, 12))
    _specks(draw, rng, n, 0, horizon, 26, (250, 250, 255), 1.3)
    x = rng.uniform(10, n - 10)
    draw.ellipse((x - 8, 6, x + 8, 22), fill=(70, 120, 190))
    draw.rectangle((0, horizon, n, n), fill=_shade(rng, (150, 150, 152), 8))
    for _ in range(9):
        x, y, r = rng.uniform(0, n), rng.uniform(horizon + 6, n), rng.uniform(4, 11)
        draw.ellipse(
            (x - r, y - r * 0.45, x + r, y + r * 0.45), fill=_shade(rng, (108, 108, 112), 8)
        )


def _kitchen(draw, rng, n):
    counter, tile = n * rng.uniform(0.58, 0.68), 16
    a, b = _shade(rng, (232, 238, 240), 6), _shade(rng, (150, 196, 206), 10)
    for row in range(n // tile + 1):
        for col in range(n // tile + 1):
            draw.rectangle(
                (col * tile, row * tile, col * tile + tile, row * tile + tile),
                fill=a if (row + col) % 2 else b,
            )
    draw.rectangle((0, counter, n, n), fill=_shade(rng, (214, 200, 184), 8))
    draw.rectangle((0, counter, n, counter + 5), fill=(124, 100, 82))


def _sea(draw, rng, n):
    for i in range(8):
        draw.rectangle((0, i * n / 8, n, (i + 1) * n / 8), fill=(8 + i, 110 - i * 9, 170 - i * 9))
    for _ in range(7):
        x, h = rng.uniform(0, n), rng.uniform(20, 46)
        points = [(x + 5 * math.sin(k * 1.3), n - h * k / 6) for k in range(7)]
        draw.line(points, fill=_shade(rng, (30, 120, 80), 14), width=5)
    for _ in range(14):
        x, y, r = rng.uniform(0, n), rng.uniform(0, n), rng.uniform(2, 5)
        draw.ellipse((x - r, y - r, x + r, y + r), outline=(190, 230, 245), width=2)


def _meadow(draw, rng, n):
    horizon = n * rng.uniform(0.34, 0.46)
    draw.rectangle((0, 0, n, horizon), fill=_shade(rng, (140, 200, 250), 10))
    for _ in range(3):
        x, y = rng.uniform(0, n), rng.uniform(8, horizon * 0.6)
        draw.ellipse((x - 14, y - 6, x + 14, y + 6), fill=(248, 250, 252))
    draw.rectangle((0, horizon, n, n), fill=_shade(rng, (112, 186, 70), 12))
    for colour in ((250, 240, 90), (250, 250, 250), (240, 110, 140)):
        _specks(draw, rng, n, horizon + 4, n, 11, colour, 2.8)


def _desert(draw, rng, n):
    horizon = n * rng.uniform(0.36, 0.46)
    draw.rectangle((0, 0, n, horizon), fill=_shade(rng, (250, 214, 150), 10))
    for base, tone in ((horizon, (214, 132, 70)), (horizon + 24, (196, 108, 52))):
        x, w = rng.uniform(0, n), rng.uniform(60, 90)
        draw.rectangle((0, base, n, n), fill=_shade(rng, tone, 10))
        draw.ellipse((x - w, base - 12, x + w, base + 50), fill=_shade(rng, tone, 10))
    for _ in range(2):
        x, h = rng.uniform(8, n - 8), rng.uniform(26, 38)
        green = _shade(rng, (58, 128, 70), 10)
        draw.rectangle((x - 3, horizon + 8 - h, x + 3, horizon + 8), fill=green)
        draw.rectangle((x - 10, horizon - h * 0.45, x + 10, horizon - h * 0.45 + 5), fill=green)


PLACES: dict[
    str, Callable[[ImageDraw.ImageDraw, Random, int], None]
] = {  # phrase -> draws it on a square of that many pixels
    "on the beach": _beach,
    "in the snow": _snow,
    "on a cobblestone street": _cobbles,
    "in the jungle": _jungle,
    "on a wooden floor": _wood,
    "in front of a brick wall": _bricks,
    "in the city at night": _night,
    "on the moon": _moon,
    "in a kitchen": _kitchen,
    "under the sea": _sea,
    "in a meadow": _meadow,
    "in the desert": _desert,
}
