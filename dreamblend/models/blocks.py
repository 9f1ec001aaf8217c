"""Which blocks of a transformer are read: all of them see one grid of image tokens."""

from __future__ import annotations

import re

from torch import nn

from dreamblend.errors import InputError
from dreamblend.models.backbone import Site, named

READ = 6  # blocks whose maps are read where nobody says


def block_sites(
    denoiser: nn.Module,
    pattern: str,
    size: tuple[int, int],
    grid: int | None,
    layers: list[str] | None,
    base: str,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> dict[str, Site]:
    """The attention layers that are named; else at most READ, evenly spaced over the middle half of
    the blocks: the first ones still mix the text, and the last ones draw the details.

    Args:
        pattern: of the names of the layers, in the order they run.
        size: height and width of the grid of image tokens.
        grid: rows of a grid that was asked for.
        layers: which of them are read (`named`).
        rows, columns: where image and text lie in joint attention; all of both in cross-attention.
    """
    if grid not in (None, size[0]):
        raise InputError(
            f"no attention site of grid {grid} in {base}: it has [{size[0]}]; set `grid` to it"
        )
    names = [name for name, _ in denoiser.named_modules() if re.fullmatch(pattern, name)]
    if layers is not None:
        return {name: Site(*size, rows, columns) for name in named(names, layers, base)}
    first, count = len(names) // 4, max(1, -(-len(names) // 2))
    middle = names[first : first + count]
    read = middle[:: max(1, len(middle) // READ)][:READ]
    return {name: Site(*size, rows, columns) for name in read}
