"""Tuning methods. `restore` puts any snapshot back into a backbone."""

from __future__ import annotations

import torch

from dreamblend.errors import InputError
from dreamblend.models import Backbone
from dreamblend.storage.snapshots import Snapshot
from dreamblend.tuning.custom_diffusion import CustomDiffusion
from dreamblend.tuning.full import Full
from dreamblend.tuning.lora import LoRA
from dreamblend.tuning.method import Method
from dreamblend.tuning.t_lora import TLoRA
from dreamblend.tuning.textual_inversion import TextualInversion

__all__ = [
    "CustomDiffusion",
    "Full",
    "LoRA",
    "METHODS",
    "Method",
    "TLoRA",
    "TextualInversion",
    "restore",
]

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Full, LoRA, TLoRA, CustomDiffusion, TextualInversion)
}


def restore(
    snapshot: Snapshot,
    backbone: Backbone,
    name: str,
    identifier: str | None = None,
    dtype: torch.dtype | None = None,
) -> Backbone:
    """A view of `backbone` with a snapshot in it. The backbone must be the base that it was tuned
    from.

    `dtype` is that of whole parts which replace the base's, and the base's own where None: bf16
    would swallow the small changes in a snapshot in fp32. `identifier` is what prompts will call
    the subject; the snapshot's identifier where None.
    """
    if snapshot.method not in METHODS:
        raise InputError(
            f"{snapshot.path} was made by the method {snapshot.method!r}, which this version does"
            " not know: upgrade dreamblend"
        )
    if snapshot.method == Full.name:
        return Full.restore(snapshot.path, backbone, name, identifier, dtype)
    identifier = identifier or (snapshot.about.identifier if snapshot.about else None)
    return METHODS[snapshot.method].restore(snapshot.path, backbone, name, identifier)
