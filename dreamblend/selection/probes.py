"""The prompts and seeds that snapshots are measured with, and how what they draw is recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports diffusers, which --help does without
    from dreamblend.blending.options import Options

# Contexts that any base knows. Neither a benchmark nor configs/prompts.txt asks for them: a pair
# must be good for prompts that it was not chosen by.
PROBES = (
    "a picture of a {subject} in front of a brick wall",
    "a picture of a {subject} on the moon",
    "a picture of a {subject} under the sea",
    "a picture of a {subject} in a meadow",
    "a picture of a {subject} in the desert",
)
SEEDS = range(1000, 1002)  # apart from those that people begin with
# options of drawing that the best pair depends on
DRAWN = ("scheduler", "negative_prompt", "guidance_rescale")


def drawn_with(options: Options | None) -> dict[str, object]:
    """Those options that a pair is picked for, where they are set."""
    return {name: value for name in DRAWN if (value := getattr(options, name, None))}
