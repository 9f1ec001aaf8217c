"""What the families with a UNet have in common: their sizes, and where the image looks at the
text.
"""

from __future__ import annotations

from typing import Any

from dreamblend.errors import InputError
from dreamblend.models.backbone import Site, named


def native_size(unet: Any, vae: Any, base: str) -> tuple[tuple[int, int, int], int]:
    """The shape of the latents that a UNet was trained on, and the pixels of a side of its
    images.
    """
    shrinks = 2 ** (len(vae.config.block_out_channels) - 1)
    side = unet.config.sample_size
    if side is None:
        side = vae.config.sample_size // shrinks
    if not isinstance(side, int):  # [height, width]
        if len(set(side)) != 1:
            raise InputError(
                f"the base {base} makes images of {side[1] * shrinks} x {side[0] * shrinks}"
                " pixels: only square ones can be trained and drawn"
            )
        side = side[0]
    return (unet.config.in_channels, side, side), side * shrinks


def unet_sites(
    unet: Any, latent_size: tuple[int, int], grid: int | None, layers: list[str] | None, base: str
) -> dict[str, Site]:
    """The cross-attention layers in the order they run; only those of a grid of `grid` rows and
    those that `layers` names, if given.
    """
    levels = len(unet.config.block_out_channels)
    sites = {}
    for name, _ in unet.named_modules():
        if not name.endswith(".attn2"):
            continue
        part, number = name.split(".")[:2]
        if part == "mid_block":
            level = levels - 1
        else:
            level = int(number) if part == "down_blocks" else levels - 1 - int(number)
        # the halving convolutions round up
        sites[name] = Site(*(-(-side // 2**level) for side in latent_size))
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    sites = dict(sorted(sites.items(), key=lambda item: order[item[0].split(".")[0]]))
    if layers is not None:
        sites = {name: sites[name] for name in named(list(sites), layers, base)}
    chosen = {name: site for name, site in sites.items() if grid in (None, site.height)}
    if not chosen:
        raise InputError(
            f"no attention site of grid {grid} in {base}: it has"
            f" {sorted({site.height for site in sites.values()})}; set `grid` to one of them"
        )
    return chosen
