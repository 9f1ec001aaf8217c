"""The hub's cache, which many processes share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from dreamblend.storage.files import locked


def fetching(name: str) -> AbstractContextManager[object]:
    """Around what may download the model `name`: one process does, the others that share its cache
    wait, and find it there.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    return (
        nullcontext()
        if Path(name).exists()
        else locked(Path(HF_HUB_CACHE) / ".locks" / f"dreamblend--{name.replace('/', '--')}.lock")
    )
