"""The places of the sandbox world: each draws a background, varied by the random stream it is
given. Places are calm: what stands in them must stand out.
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


def _specks(draw, rng, n, top, bottom, count, colour, r) -> None:
    for _ in range(count):
        x, y, s = rng.uniform(0, n), rng.uniform(top, bottom), rng.uniform(0.6, 1.0) * r
        draw.ellipse((x - s, y - s, x + s, y + s), fill=colour)


def _oval(draw, x, y, rx, ry, colour) -> None:
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)


def _beach(draw, rng, n):
    u = n / 64
    horizon, shore = n * rng.uniform(0.24, 0.32), n * rng.uniform(0.46, 0.54)
    draw.rectangle((0, 0, n, horizon), fill=_shade(rng, (168, 216, 242), 8))
    _oval(draw, rng.uniform(8 * u, n - 8 * u), 8 * u, 5 * u, 5 * u, (255, 240, 160))
    draw.rectangle((0, horizon, n, shore), fill=_shade(rng, (64, 152, 196), 10))
    draw.rectangle((0, shore, n, n), fill=_shade(rng, (240, 220, 170), 8))
    swell = [(x * n / 16, shore + 0.9 * u * math.sin(x * 1.2 + rng.random())) for x in range(17)]
    draw.line(swell, fill=(246, 250, 250), width=round(2.2 * u))


def _snow(draw, rng, n):
    u, horizon = n / 64, n * rng.uniform(0.4, 0.5)
    draw.rectangle((0, 0, n, horizon), fill=_shade(rng, (176, 194, 214), 8))
    for k in range(3):
        x, h = n * (k + rng.uniform(0.2, 0.8)) / 3, rng.uniform(11, 18) * u
        green = _shade(rng, (92, 128, 122), 8)
        for lift in (0, 0.3):
            draw.polygon(
                (
                    *(x - h * (0.36 - lift / 3), horizon - h * lift),
                    *(x, horizon - h * (0.7 + lift)),
                    *(x + h * (0.36 - lift / 3), horizon - h * lift),
                ),
                fill=green,
            )
    draw.rectangle((0, horizon, n, n), fill=_shade(rng, (240, 244, 250), 4))
    for _ in range(2):
        _oval(draw, rng.uniform(0, n), horizon, 22 * u, 3 * u, (240, 244, 250))
    _specks(draw, rng, n, 0, horizon, 14, (255, 255, 255), 1.1 * u)


def _cobbles(draw, rng, n):
    u, top = n / 64, n * rng.uniform(0.32, 0.4)
    draw.rectangle((0, 0, n, top), fill=_shade(rng, (186, 160, 134), 12))
    for x in range(rng.randint(1, 6), 64, 15):
        draw.rectangle((x * u, top * 0.25, (x + 6) * u, top * 0.8), fill=(120, 108, 108))
    draw.rectangle((0, top, n, n), fill=(112, 112, 116))
    size = 8 * u
    for row in range(int((n - top) / size) + 1):
        for col in range(-1, 9):
            x, y = (col + row % 2 * 0.5) * size, top + row * size
            draw.rounded_rectangle(
                (x + u * 0.5, y + u * 0.5, x + size - u * 0.5, y + size - u * 0.5),
                radius=2.4 * u,
                fill=_shade(rng, (146, 146, 150), 8),
            )


def _jungle(draw, rng, n):
    u = n / 64
    draw.rectangle((0, 0, n, n), fill=_shade(rng, (44, 92, 54), 6))
    for _ in range(18):
        x, y, r, a = (
            rng.uniform(0, n),
            rng.uniform(0, n),
            rng.uniform(7, 12) * u,
            rng.uniform(0, 6.3),
        )
        dx, dy = math.cos(a) * r, math.sin(a) * r
        draw.polygon(
            (
                *(x - dx, y - dy, x - dy * 0.4, y + dx * 0.4),
                *(x + dx, y + dy, x + dy * 0.4, y - dx * 0.4),
            ),
            fill=_shade(rng, (62, 122, 66), 12),
        )


def _wood(draw, rng, n):
    u, top = n / 64, n * rng.uniform(0.32, 0.42)
    draw.rectangle((0, 0, n, top), fill=_shade(rng, (230, 220, 204), 8))
    draw.rectangle((0, top - 2 * u, n, top), fill=(246, 240, 230))
    plank = 7 * u
    for row in range(int((n - top) / plank) + 1):
        y = top + row * plank
        draw.rectangle((0, y, n, y + plank), fill=_shade(rng, (176, 128, 84), 7))
        draw.line((0, y, n, y), fill=(140, 98, 62), width=round(u * 0.8))


def _bricks(draw, rng, n):
    u = n / 64
    draw.rectangle((0, 0, n, n), fill=(198, 172, 158))
    h, w = 7 * u, 14 * u
    for row in range(10):
        for col in range(-1, 6):
            x, y = (col + row % 2 * 0.5) * w, row * h
            draw.rectangle((x, y, x + w - u, y + h - u), fill=_shade(rng, (174, 98, 80), 8))
    draw.rectangle((0, n * 0.86, n, n), fill=_shade(rng, (150, 146, 142), 6))


def _night(draw, rng, n):
    u, ground = n / 64, n * 0.82
    draw.rectangle((0, 0, n, n), fill=_shade(rng, (26, 28, 66), 5))
    _oval(draw, rng.uniform(0.1, 0.9) * n, 7 * u, 4 * u, 4 * u, (240, 236, 206))
    x = -2 * u
    while x < n:
        w, top = rng.uniform(11, 14) * u, n * rng.uniform(0.2, 0.48)
        draw.rectangle((x, top, x + w, ground), fill=_shade(rng, (52, 50, 84), 7))
        for wy in range(int(top + 3 * u), int(ground - 5 * u), int(7 * u)):
            for wx in (0.22, 0.6):
                if rng.random() < 0.6:
                    draw.rectangle(
                        (x + wx * w, wy, x + wx * w + 2.4 * u, wy + 3 * u), fill=(224, 196, 120)
                    )
        x += w + u
    draw.rectangle((0, ground, n, n), fill=(40, 40, 50))


def _moon(draw, rng, n):
    u, horizon = n / 64, n * rng.uniform(0.38, 0.48)
    draw.rectangle((0, 0, n, horizon), fill=(14, 14, 24))
    _specks(draw, rng, n, 0, horizon, 12, (230, 230, 240), 0.6 * u)
    x = rng.uniform(8 * u, n - 8 * u)
    _oval(draw, x, 8 * u, 5 * u, 5 * u, (86, 134, 196))
    _oval(draw, x - u, 7 * u, 2.4 * u, 1.6 * u, (132, 178, 140))
    draw.rectangle((0, horizon, n, n), fill=_shade(rng, (164, 164, 168), 6))
    for _ in range(6):
        r = rng.uniform(3, 6) * u
        _oval(draw, rng.uniform(0, n), rng.uniform(horizon + 4 * u, n), r, r * 0.4, (138, 138, 144))


def _kitchen(draw, rng, n):
    u, counter, tile = n / 64, n * rng.uniform(0.6, 0.68), n / 8
    a, b = _shade(rng, (232, 240, 240), 4), _shade(rng, (190, 220, 224), 6)
    for row in range(8):
        for col in range(8):
            draw.rectangle(
                (col * tile, row * tile, col * tile + tile, row * tile + tile),
                fill=a if (row + col) % 2 else b,
            )
    draw.rectangle((0, counter, n, n), fill=_shade(rng, (220, 206, 190), 6))
    draw.rectangle((0, counter, n, counter + 3 * u), fill=(158, 130, 108))


def _sea(draw, rng, n):
    u = n / 64
    for i in range(16):
        draw.rectangle(
            (0, i * n / 16, n, (i + 1) * n / 16), fill=(24 + i, 128 - i * 4, 184 - i * 4)
        )
    for _ in range(4):
        x, h = rng.uniform(0, n), rng.uniform(12, 22) * u
        points = [(x + 2.2 * u * math.sin(k * 1.1), n - h * k / 8) for k in range(9)]
        draw.line(points, fill=_shade(rng, (40, 122, 92), 8), width=round(2.6 * u), joint="curve")
    for _ in range(7):
        x, y, r = rng.uniform(0, n), rng.uniform(0, n * 0.8), rng.uniform(1.2, 2.4) * u
        draw.ellipse((x - r, y - r, x + r, y + r), outline=(176, 218, 236), width=round(u * 0.7))


def _meadow(draw, rng, n):
    u, horizon = n / 64, n * rng.uniform(0.36, 0.46)
    draw.rectangle((0, 0, n, horizon), fill=_shade(rng, (156, 208, 248), 8))
    for k in range(2):
        x, y = n * (k + rng.uniform(0.2, 0.8)) / 2, rng.uniform(5 * u, horizon * 0.55)
        for dx, r in ((-4, 2.6), (0, 3.6), (4, 2.6)):
            _oval(draw, x + dx * u, y, r * 1.3 * u, r * u, (248, 250, 252))
    draw.rectangle((0, horizon, n, n), fill=_shade(rng, (132, 194, 96), 8))
    for colour in ((250, 236, 130), (250, 250, 250), (240, 150, 170)):
        _specks(draw, rng, n, horizon + 3 * u, n, 5, colour, 1.3 * u)


def _desert(draw, rng, n):
    u, horizon = n / 64, n * rng.uniform(0.38, 0.46)
    draw.rectangle((0, 0, n, horizon), fill=_shade(rng, (252, 224, 172), 8))
    for base, tone in ((horizon, (226, 160, 104)), (horizon + 12 * u, (212, 140, 86))):
        colour = _shade(rng, tone, 6)
        draw.rectangle((0, base, n, n), fill=colour)
        _oval(draw, rng.uniform(0, n), base + 9 * u, 36 * u, 15 * u, colour)
    x, h = rng.uniform(6 * u, n - 6 * u), rng.uniform(15, 19) * u
    green, foot = _shade(rng, (96, 148, 98), 6), horizon + 4 * u
    width = round(3 * u)
    for points in (
        ((x, foot), (x, foot - h)),
        ((x - 4.5 * u, foot - h * 0.75), (x - 4.5 * u, foot - h * 0.45), (x, foot - h * 0.45)),
        ((x + 4.5 * u, foot - h * 0.85), (x + 4.5 * u, foot - h * 0.6), (x, foot - h * 0.6)),
    ):
        draw.line(points, fill=green, width=width, joint="curve")


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
