"""The prompts and seeds that snapshots are measured with."""

# Contexts that any base knows and that benchmarks do not ask for; none of configs/prompts.txt in
# these words.
PROBES = (
    "a picture of a {subject} in front of a brick wall",
    "a picture of a {subject} on the moon",
    "a picture of a {subject} in the city at night",
    "a picture of a {subject} under the sea",
    "a picture of a {subject} in a meadow",
    "a picture of a {subject} in the desert",
)
SEEDS = range(1000, 1002)  # apart from those that people begin with
