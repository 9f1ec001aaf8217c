"""How far the attention of a snapshot has collapsed: maps in, measures out. Tensors only.

In a collapsed snapshot every content word attends to the subject ("catastrophic attention
collapse", Ram et al., WACV 2025). All functions take word maps (batch, words, queries): the share
of each query's attention that a word gets, averaged over heads, sites of one grid, and steps; the
mask (batch, words) marks real words, and `subject` (batch, words) the words of the subject.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MEASURES = ("overlap", "effective_rank", "entropy", "subject_mass", "context_mass")


def spatial(maps: Tensor) -> Tensor:
    """Normalise each word's map over space: (batch, words, queries), rows sum to 1."""
    return maps / maps.sum(-1, keepdim=True).clamp(min=1e-12)


def subject_map(maps: Tensor, mask: Tensor, subject: Tensor) -> Tensor:
    """Where the words that name the subject attend together: (batch, queries)."""
    return (maps * (subject & mask).unsqueeze(-1)).sum(1)


def overlap(maps: Tensor, mask: Tensor, subject: Tensor) -> Tensor:
    """Mean cosine of the subject's centred map with every other word's: (batch,). 1 is collapsed.

    Maps are centred over space first: two maps that are both nearly flat share no place.
    """
    unit = F.normalize(spatial(maps) - 1 / maps.shape[-1], dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    pairs = (subject & mask).unsqueeze(2) & (mask & ~subject).unsqueeze(1)
    return (cosine * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def effective_rank(maps: Tensor, mask: Tensor) -> Tensor:
    """exp(entropy of the squared singular values) of the stacked maps, over the word count:
    (batch,), 1/n is collapsed.

    Roy and Vetterli (2007).
    """
    energy = torch.linalg.svdvals(F.normalize(spatial(maps), dim=-1) * mask.unsqueeze(-1)) ** 2
    p = energy / energy.sum(-1, keepdim=True).clamp(min=1e-12)
    return torch.special.entr(p).sum(-1).exp() / mask.sum(-1).clamp(min=1)


def entropy(maps: Tensor, mask: Tensor) -> Tensor:
    """Mean entropy of the words' spatial maps over log(queries): (batch,), 1 is flat."""
    each = torch.special.entr(spatial(maps)).sum(-1) / torch.log(
        torch.tensor(float(maps.shape[-1]))
    )
    return (each * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def subject_mass(maps: Tensor, mask: Tensor, subject: Tensor) -> Tensor:
    """The share of the other words' attention inside the subject's region: (batch,).

    The region is where the subject's own map is above the midpoint of its range.
    """
    own = subject_map(spatial(maps), mask, subject)
    middle = (own.amax(-1, keepdim=True) + own.amin(-1, keepdim=True)) / 2
    inside = (own >= middle).float()
    share = (spatial(maps) * inside.unsqueeze(1)).sum(-1)
    others = mask & ~subject
    return (share * others).sum(-1) / others.sum(-1).clamp(min=1)


def context_mass(maps: Tensor, mask: Tensor, subject: Tensor) -> Tensor:
    """The share of all attention that the words other than the subject's get: (batch,)."""
    return (maps.mean(-1) * (mask & ~subject)).sum(-1)


def measure(maps: Tensor, mask: Tensor, subject: Tensor) -> dict[str, Tensor]:
    """Every measure of MEASURES for word maps (batch, words, queries): name -> (batch,)."""
    return {
        "overlap": overlap(maps, mask, subject),
        "effective_rank": effective_rank(maps, mask),
        "entropy": entropy(maps, mask),
        "subject_mass": subject_mass(maps, mask, subject),
        "context_mass": context_mass(maps, mask, subject),
    }


def divergence(maps: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each word's spatial map from the reference's, in bits: (batch,
    words), 0 to 1.
    """
    p, q = spatial(maps), spatial(reference)
    middle = (p + q) / 2
    bits = (
        torch.special.entr(middle).sum(-1)
        - (torch.special.entr(p).sum(-1) + torch.special.entr(q).sum(-1)) / 2
    )
    return bits / torch.log(torch.tensor(2.0)) * mask


def prompt_sensitivity(predictions: Tensor) -> Tensor:
    """How much predictions (contexts, batch, ...) change with the context words: their spread over
    their size, (batch,).

    0 where there is one context only.
    """
    flat = predictions.float().flatten(2)
    return flat.std(0, correction=min(1, len(flat) - 1)).norm(dim=-1) / flat.norm(dim=-1).mean(
        0
    ).clamp(min=1e-12)
