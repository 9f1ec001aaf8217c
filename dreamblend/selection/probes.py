"""The prompts and seeds that snapshots are measured with, and how what they draw is recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports diffusers, which --help does without
    from dreamblend.blending.options import Options

# Contexts that any base knows. Neither a benchmark nor configs/prompts.txt asks for them: a pair
# must be good for prompts that it was not chosen by. Places alone are kept longest. What is worn,
# stands beside or has another colour is forgotten many steps before (docs/results.md), so an early
# snapshot that is chosen by places has forgotten the rest. The first three are a place,
# something worn and something beside.
PROBES = (
    "a picture of a {subject} in front of a brick wall",
    "a picture of a {subject} wearing a bow in the desert",
    "a picture of a {subject} next to a black clock on the moon",
    "a picture of a black {subject} under the sea",
    "a picture of a {subject} on the moon",
    "a picture of a {subject} wearing a bow in front of a brick wall",
    "a picture of a {subject} next to an orange clock in a meadow",
    "a picture of an orange {subject} in the desert",
)
SEEDS = range(1000, 1002)  # apart from those that people begin with
# options of drawing that the best pair depends on
DRAWN = ("scheduler", "negative_prompt", "guidance_rescale")


def drawn_with(options: Options | None) -> dict[str, object]:
    """Those options that a pair is picked for, where they are set."""
    return {name: value for name in DRAWN if (value := getattr(options, name, None))}
