"""What snapshots and blends are worth, on the scale of their own run, and how much of a difference
may be noise. Rows in, numbers out.
"""

from __future__ import annotations

from typing import NamedTuple

from dreamblend.errors import InputError
from dreamblend.selection.noise import Row, noise_of


class Room(NamedTuple):
    """How far the snapshots of a run spread from the base in a measure, and how much of that may be
    noise; None where the noise is not known.
    """

    spread: float
    noise: float | None

    @classmethod
    def between(cls, high: Row, low: Row, name: str) -> Room:
        noise = noise_of(lambda rows: rows[0][name] - rows[1][name], [high, low])
        return cls(high[name] - low[name], noise)

    @property
    def unit(self) -> float:
        return max(self.spread, self.noise or 0.0)

    @property
    def is_noise(self) -> bool:
        return self.noise is not None and self.spread <= self.noise


class Utility:
    """Harmonic mean of subject and prompt fidelity, each on the scale of the run; from 0, where
    either is lost, to 1.

    Subject fidelity counts from the base's (0) to the best snapshot's (1), prompt fidelity from the
    worst snapshot's (0) to the base's (1): so it means the same for a probability and for a cosine
    of CLIP, which hardly leaves .25 to .32. Values beyond an end count as the end. Where a scale is
    no wider than its noise, its unit is the noise (`noise.SURE` standard errors), so that a
    difference of .004 that may be noise is not the whole scale.

    Args:
        base: the untuned base's row.
        singles: the snapshots' rows.

    Raises InputError where no snapshot shows more of the subject than the base.
    """

    def __init__(self, base: Row, singles: list[Row]):
        best = max(singles, key=lambda s: s["subject"])
        worst = min(singles, key=lambda s: s["prompt_fidelity"])
        if best["subject"] <= base["subject"]:
            raise InputError(
                "no snapshot shows more of the subject than the base: train longer, or with a"
                " higher --model.learning_rate"
            )
        self.base = base
        self.subject = Room.between(best, base, "subject")
        self.prompt = Room.between(base, worst, "prompt_fidelity")

    def __call__(self, row: Row, base: Row | None = None) -> float:
        """Of a row; `base` stands for the base's where other images of it count."""
        base = self.base if base is None else base
        subject = _share((row["subject"] - base["subject"]) / self.subject.unit)
        lost = base["prompt_fidelity"] - row["prompt_fidelity"]
        # where nothing was forgotten, nothing is lost
        prompt = _share(1 - lost / self.prompt.unit) if self.prompt.unit > 0 else 1.0
        return 2 * subject * prompt / (subject + prompt) if subject and prompt else 0.0

    def noise(self, row: Row, other: Row) -> float | None:
        """The size below which the difference of two rows' utilities may be noise."""

        def difference(rows: list[Row]) -> float:
            return self(rows[0], rows[2]) - self(rows[1], rows[2])

        return noise_of(difference, [row, other, self.base])


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))
