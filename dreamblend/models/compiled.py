"""Compiles a denoiser block by block (diffusers' regional compilation): one block's code serves all
of its kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# forms of one block: its sizes in a UNet, with and without gradients, by adapter
FORMS = 64


def compile_blocks(denoiser: Any, recorded: Iterable[str]) -> list[str]:
    """Compile the repeated blocks of a denoiser at their next call, and return their names.

    Those that hold a layer of `recorded`, whose attention is read, stay as they are: a recording
    wraps the layer anew at every step, and each would be compiled again.
    """
    from torch._dynamo import config  # slow to import

    kinds = getattr(denoiser, "_repeated_blocks", None) or denoiser._no_split_modules
    config.recompile_limit = max(config.recompile_limit, FORMS)
    sites, names = list(recorded), list[str]()
    for name, block in denoiser.named_modules():
        read = any(site.startswith(f"{name}.") for site in sites)
        if type(block).__name__ in kinds and not read:
            block.compile()
            names.append(name)
    return names
