"""Weights of low rank: mixed and reduced without loss where nothing need be lost, and with the
least loss where something must.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dreamblend.errors import InputError
from dreamblend.export import low_rank
from dreamblend.export.kohya_lora import joined
from dreamblend.export.low_rank import Factors
from dreamblend.models.original_names import Original


def factors(outputs=12, inputs=(9,), rank=3, alpha=5.0, seed=0, **more) -> Factors:
    source = torch.Generator().manual_seed(seed)
    ones = [1] * (len(inputs) - 1)
    down = torch.randn(rank, *inputs, generator=source)
    return Factors(down, torch.randn(outputs, rank, *ones, generator=source), alpha, **more)


def truncated(change: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest of a rank, of dense weights."""
    u, values, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
    return ((u[:, :rank] * values[:rank]) @ v[:rank]).reshape(change.shape)


def of(one: Factors) -> low_rank.LowRank:
    return {"unet": {"layer": one}}


def delta(weights: low_rank.LowRank) -> torch.Tensor:
    return weights["unet"]["layer"].delta()


@pytest.mark.parametrize("inputs", [(9,), (5, 3, 3)])
def test_a_mixture_is_the_interpolation_of_the_merged_weights(inputs):
    """Of other ranks and scales."""
    a, b = factors(inputs=inputs), factors(inputs=inputs, rank=4, alpha=1.0, seed=1)
    found = low_rank.mixed([(0.3, of(a)), (0.7, of(b))])
    assert found["unet"]["layer"].rank == 7
    torch.testing.assert_close(
        delta(found), torch.lerp(a.delta(), b.delta(), 0.7), atol=1e-6, rtol=0
    )


def test_a_layer_that_one_lacks_has_the_others_share_alone():
    found = low_rank.mixed([(0.3, {"unet": {}}), (0.7, of(factors()))])
    torch.testing.assert_close(delta(found), 0.7 * factors().delta())


@pytest.mark.parametrize("inputs", [(9,), (5, 3, 3)])
def test_a_reduction_is_the_best_of_its_rank_and_exact_at_the_whole_one(inputs):
    one = factors(inputs=inputs, rank=6)
    found, kept = low_rank.reduced(of(one), 6)
    torch.testing.assert_close(delta(found), one.delta(), atol=1e-5, rtol=1e-5)
    assert kept == pytest.approx(1)
    found, kept = low_rank.reduced(of(one), 2)
    assert found["unet"]["layer"].rank == 2
    best = truncated(one.delta(), 2)
    torch.testing.assert_close(delta(found), best, atol=1e-5, rtol=1e-5)
    assert kept == pytest.approx((best.norm() / one.delta().norm()).item() ** 2, abs=1e-5)


def test_an_extraction_is_the_best_of_its_rank_and_says_what_it_leaves_out():
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(9, 12), nn.LayerNorm(12), nn.Conv2d(4, 6, 3))
    after = copy.deepcopy(before)
    with torch.no_grad():
        for value in after.parameters():
            value += 0.1 * torch.randn_like(value)
    changes = {
        name: value.detach() - before.get_parameter(name).detach()
        for name, value in after.named_parameters()
    }
    whole = sum(change.square().sum() for change in changes.values())
    for rank in (2, 9):
        found, kept = low_rank.extracted({"unet": before}, {"unet": after}, rank)
        assert found["unet"].keys() == {"0", "2"}
        deltas = {name: one.delta() for name, one in found["unet"].items()}
        for name, own in deltas.items():
            wanted = truncated(changes[f"{name}.weight"], rank)
            torch.testing.assert_close(own, wanted, atol=1e-6, rtol=1e-5)
        assert kept == pytest.approx(
            (sum(d.square().sum() for d in deltas.values()) / whole).item()
        )
        assert kept < 1  # biases and norms have changed too


def test_layers_that_are_one_elsewhere_lie_in_blocks_whatever_their_ranks_and_scales():
    denoiser = nn.ModuleDict({name: nn.Linear(9, 12) for name in ("q", "k", "v")})
    original = Original(("q", "k", "v"))
    q, v = factors(alpha=3.0), factors(rank=2, alpha=7.0, seed=1)
    found = joined(original, [q, None, v], denoiser)
    wanted = torch.cat([q.delta(), torch.zeros(12, 9), v.delta()])
    assert found.rank == 5
    torch.testing.assert_close(found.delta(), wanted, atol=1e-6, rtol=1e-6)
    same = joined(original, [q, None, factors(rank=2, alpha=2.0)], denoiser)
    assert same.scale == q.scale and torch.equal(same.up[:12, :3], q.up)  # nothing is rounded


def test_the_lengths_of_a_dora_are_those_of_the_layers_also_of_one_without():
    denoiser = nn.ModuleDict({name: nn.Linear(9, 12) for name in "qk"})
    length = 1.3 * denoiser["q"].weight.detach().norm(dim=1)
    one = factors(magnitude=length)
    found = joined(Original(("q", "k")), [one, None], denoiser)
    whole = nn.ModuleDict({"qk": nn.Linear(9, 24)})
    weights = [denoiser[name].weight.detach() for name in "qk"]
    whole["qk"].weight.data = torch.cat(weights)
    added = low_rank.added({"unet": {"qk": found}}, {"unet": whole})["unet"]
    row = weights[0] + one.delta()
    wanted = torch.cat([length[:, None] * row / row.norm(dim=1, keepdim=True), weights[1]])
    torch.testing.assert_close(added["qk"].weight.detach(), wanted)


def test_what_belongs_to_its_own_factors_is_neither_mixed_nor_reduced():
    dora = of(factors(magnitude=torch.ones(12)))
    with pytest.raises(InputError, match="DoRA adapters cannot be added"):
        low_rank.mixed([(0.5, dora), (0.5, dora)])
    with pytest.raises(InputError, match="rank of a DoRA cannot be reduced"):
        low_rank.reduced(dora, 1)


def test_the_bias_of_an_adapter_has_its_scale():
    bias = torch.arange(12.0)
    one = factors(bias=bias)
    layer = nn.Sequential()
    layer.add_module("layer", nn.Linear(9, 12))
    wanted = layer.layer.bias.detach() + 5 / 3 * bias
    for weights in (of(one), low_rank.reduced(of(one), 3)[0], low_rank.mixed([(1.0, of(one))])):
        added = low_rank.added(weights, {"unet": layer})["unet"]
        torch.testing.assert_close(added.layer.bias.detach(), wanted)
