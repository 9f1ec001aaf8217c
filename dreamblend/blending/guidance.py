"""Cross-attention guidance: the distance between two sets of maps, and the step on the latents that
lowers it.

The idea is pix2pix-zero's (Parmar et al., 2023), which pulls an edit's cross-attention maps to the
original's; DreamBlend (Ram et al., WACV 2025) pulls the late snapshot's to the early one's. Tensors
only: no models, no files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamblend.attention.recording import Maps


def map_distance(maps: Maps, reference: Maps, weights: Tensor | None = None) -> Tensor:
    """How far maps are from their reference, for each sample: (batch,), fp32.

    The sum over the sites of the mean over heads and queries of the sum over chosen tokens of
    (M - M_ref)^2.

    Args:
        maps: site -> (batch, heads, queries, tokens).
        reference: the same; it may end before columns that weigh nothing.
        weights: (batch, tokens), 1 for a chosen token and 0 for padding; all count where None.
    """

    def of_site(site: str) -> Tensor:
        there = reference[site].float()
        if weights is not None:  # sums are rounded alike, however many columns were kept
            there = F.pad(there, (0, weights.shape[1] - there.shape[3]))
        squared = (maps[site].float() - there) ** 2
        if weights is not None:
            squared = squared * weights[:, None, None]
        return squared.sum(3).mean((1, 2))

    return reduce(torch.add, map(of_site, reference))


def map_energy(reference: Maps, weights: Tensor | None = None) -> Tensor:
    """The distance of a reference from maps that are zero, for each sample: (batch,), the scale of
    `map_distance`.
    """
    return map_distance(
        {site: target.new_zeros(()) for site, target in reference.items()}, reference, weights
    )


def distance_and_gradient(
    read: Callable[[Tensor], Maps], z: Tensor, reference: Maps, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The map distance at latents z and its gradient there: (batch,) and the shape of z. Samples do
    not mix.

    `read` runs the late snapshot on latents and gives its maps; its weights need no gradients.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        distance = map_distance(read(z), reference, weights)
        # The distance is a mean of small squares. Its derivatives would leave the range of fp16 in
        # the backward pass, so they are scaled up.
        lift = distance.detach().clamp(min=1e-12).rsqrt()
        (gradient,) = torch.autograd.grad(distance, z, lift)
    return distance.detach(), gradient / lift.view(-1, *[1] * (z.ndim - 1))


def guidance_step(
    z: Tensor, distance: Tensor, gradient: Tensor, energy: Tensor, strength: float
) -> Tensor:
    """Move latents against the gradient: z - g / (|g|^2 / d + e / (strength |z|)^2), a damped
    Gauss-Newton step.

    The distance d is a sum of squares, so |g|^2 / d estimates its curvature along g (Levenberg,
    1944; without the damping this is Polyak's step, 1969). The damping e / (strength |z|)^2, with
    the reference's energy e, is what the curvature would be if the maps changed as a whole over
    `strength` times the latents' norm. Where the maps follow the latents less than that, the move
    shrinks to the plain gradient's instead of growing. Free of the scale of maps and latents, it
    vanishes as the maps come to agree, and is never longer than strength |z| sqrt(d / e) / 2.

    Args:
        z: (batch, ...).
        distance, gradient: of `distance_and_gradient`.
        energy: (batch,) the reference's distance from zero, `map_energy`.
        strength: 0 leaves z as it is.
    """
    flat, size = gradient.float().flatten(1), z.float().flatten(1).norm(dim=1)
    reach = strength * size / energy.clamp(min=1e-20).sqrt()
    norm = flat.norm(dim=1).clamp(min=1e-20)  # not squared, which would leave fp32's range sooner
    slope = reach * norm / distance.clamp(min=1e-20).sqrt()  # of the maps, relative to the damping
    length = reach * distance.sqrt() * slope / (slope**2 + 1)
    return z - (length[:, None] * flat / norm[:, None]).view_as(z).to(z.dtype)
