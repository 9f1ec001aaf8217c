"""The identity of a run: everything that its weights at a step depend on."""

from __future__ import annotations

import json

from dreamblend import renamed
from dreamblend.errors import InputError
from dreamblend.storage.snapshots import About

# of a run that was trained on with a longer schedule: [[step, max_steps up to it], ...]
PARTS = "max_steps_before"


def identity(about: About) -> dict:
    """What the weights at a step depend on, from the record in a snapshot."""
    names = ("instance_dir", "averaged", "vae")  # of files, whose hashes count
    settings = {k: v for k, v in about.settings.items() if k not in names}
    run = {
        "method": about.method,
        "base_hash": about.base_hash,
        "identifier": about.identifier,
        "class_noun": about.class_noun,
        "seed": about.seed,
        **settings,
    }
    return json.loads(json.dumps(run))  # as it comes back from a file


def check_same(theirs: dict, ours: dict, where: str, going_on: bool = False) -> None:
    """Raise InputError if files at `where` are from another run: if its `identity` differs from
    ours. A run that goes on may have got more steps, which lengthen its schedule.
    """
    theirs = renamed.settings(theirs)
    if ours["num_class_images"] and ours["class_images"] is None:
        # some class images are missing, which is not checked here
        ours = {name: value for name, value in ours.items() if name != "class_images"}
        theirs = {name: value for name, value in theirs.items() if name != "class_images"}
    if going_on:
        longer = theirs.get("max_steps", 0) < ours.get("max_steps", 0)
        theirs = {**theirs, "max_steps": ours["max_steps"]} if longer else theirs
        # what was run before; the first snapshots do not know of what came later
        ours, theirs = ({k: v for k, v in of.items() if k != PARTS} for of in (ours, theirs))
    # what is not recorded is as it is where nobody sets it
    differs = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    if differs:
        differences = ", ".join(
            f"{name} {theirs.get(name)} and not {ours.get(name)}" for name in differs
        )
        mend = "give the same settings"
        if "gradient_clip_val" in differs and theirs.get("gradient_clip_val") is None:
            mend += " (--trainer.gradient_clip_val 0 does not clip)"
        raise InputError(
            f"{where} is of a run with other settings ({differences}): {mend}, or choose another"
            " --out"
        )
