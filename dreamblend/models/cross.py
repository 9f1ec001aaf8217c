"""What the transformers have in common whose image looks at the text across."""

from __future__ import annotations

from torch import nn

from dreamblend.errors import InputError
from dreamblend.models.backbone import Site
from dreamblend.models.joint import middle_of


def cross_sites(
    denoiser: nn.Module, size: tuple[int, int], grid: int | None, base: str
) -> dict[str, Site]:
    """A few cross-attention layers in the middle; the grid of image tokens is one in all blocks.

    Args:
        size: height and width of that grid.
        grid: rows of a grid that was asked for.
    """
    if grid not in (None, size[0]):
        raise InputError(
            f"no attention site of grid {grid} in {base}: it has [{size[0]}]; set `grid` to it"
        )
    names = middle_of(denoiser, r"transformer_blocks\.\d+\.attn2")
    return {name: Site(*size) for name in names}
