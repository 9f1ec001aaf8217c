"""The identity of a run: everything that its weights at a step depend on."""

from __future__ import annotations

import json

from dreamblend import renamed
from dreamblend.errors import InputError
from dreamblend.storage.snapshots import About


def identity(about: About) -> dict:
    """What the weights at a step depend on, from the record in a snapshot."""
    settings = {k: v for k, v in about.settings.items() if k not in ("instance_dir", "averaged")}
    run = {
        "method": about.method,
        "base_hash": about.base_hash,
        "identifier": about.identifier,
        "class_noun": about.class_noun,
        "seed": about.seed,
        **settings,
    }
    return json.loads(json.dumps(run))  # as it comes back from a file


def check_same(theirs: dict, ours: dict, where: str) -> None:
    """Raise InputError if files at `where` are from another run: if its `identity` differs from
    ours.
    """
    theirs = renamed.settings(theirs)
    if ours["num_class_images"] and ours["class_images"] is None:
        # some class images are missing, which is not checked here
        ours = {name: value for name, value in ours.items() if name != "class_images"}
    if differs := [name for name in ours if theirs.get(name) != ours[name]]:
        differences = ", ".join(
            f"{name} {theirs.get(name)} and not {ours[name]}" for name in differs
        )
        raise InputError(
            f"{where} is of a run with other settings ({differences}): give the same settings, or"
            " choose another --out"
        )
