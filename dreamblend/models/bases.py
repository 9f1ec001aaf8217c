"""The bases that ship with the project, by name, and all that is special about them.

A tuning method adds its own learning rate for one by the same name (`Method.rates`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ShippedBase:
    """A base that is known by a name alone.

    Args:
        folder: a diffusers pipeline folder.
        judges: the evaluation protocol whose judges know its world.
    """

    folder: Path
    judges: str


_WEIGHTS = Path(__file__).parents[1] / "sandbox" / "weights"
SANDBOX = _WEIGHTS / "base"
SHIPPED = {
    "sandbox": ShippedBase(SANDBOX, judges="sandbox"),
    "sandbox-dit": ShippedBase(_WEIGHTS / "dit", judges="sandbox"),  # of joint attention
}


def own_judges(base: str) -> str | None:
    """The evaluation protocol that was made for a base; None for bases of the wide world."""
    return SHIPPED[base].judges if base in SHIPPED else None
