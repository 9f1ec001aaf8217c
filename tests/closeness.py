"""How close two computations of the same are, whatever they are large or small of."""

from __future__ import annotations

import torch

ROUNDING = 5e-6  # of single precision over a few steps of a denoiser, as a share


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference as a share of the norm. Single elements are rounded in other ways
    by each processor, and the latents of a first step can be a thousand.
    """
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return ((found - wanted).norm() / wanted.norm()).item()
