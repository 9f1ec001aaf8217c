"""Tuning methods. `restore` puts any snapshot back into a backbone."""

from __future__ import annotations

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
    snapshot: Snapshot, backbone: Backbone, name: str, identifier: str | None = None
) -> Backbone:
    """A view of `backbone` with a snapshot in it. The backbone must be the base that it was tuned
    from.

    `identifier` is what prompts will call the subject; the snapshot's identifier where None.
    """
    if snapshot.method not in METHODS:
        raise InputError(
            f"{snapshot.path} was made by the method {snapshot.method!r}, which this version does"
            " not know: upgrade dreamblend"
        )
    identifier = identifier or (snapshot.about.identifier if snapshot.about else None)
    return METHODS[snapshot.method].restore(snapshot.path, backbone, name, identifier)
