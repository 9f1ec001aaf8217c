"""What the families have in common in which image and text look at each other in one sequence."""

from __future__ import annotations

import re

from torch import nn

from dreamblend.errors import InputError
from dreamblend.models.backbone import Site

READ = 6  # blocks whose maps are read where nobody says


def joint_sites(
    denoiser: nn.Module,
    pattern: str,
    size: tuple[int, int],
    grid: int | None,
    base: str,
    rows: slice,
    columns: slice,
) -> dict[str, Site]:
    """A few attention layers in the middle, evenly spaced over the middle half of the blocks: the
    first ones still mix the text, and the last ones draw the details.

    Args:
        pattern: of the names of the layers, in the order they run.
        size: height and width of the grid of image tokens, which is the same in all blocks.
        grid: rows of a grid that was asked for.
    """
    if grid not in (None, size[0]):
        raise InputError(
            f"no attention site of grid {grid} in {base}: it has [{size[0]}]; set `grid` to it"
        )
    return {name: Site(*size, rows, columns) for name in middle_of(denoiser, pattern)}


def middle_of(denoiser: nn.Module, pattern: str) -> list[str]:
    """At most READ of the layers of these names, evenly spaced over the middle half."""
    names = [name for name, _ in denoiser.named_modules() if re.fullmatch(pattern, name)]
    first, count = len(names) // 4, max(1, -(-len(names) // 2))
    middle = names[first : first + count]
    return middle[:: max(1, len(middle) // READ)][:READ]
