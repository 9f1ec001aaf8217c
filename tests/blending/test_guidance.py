"""The map distance, its gradient through a real (tiny) UNet, and the step on the latents."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from dreamblend.attention.recording import record
from dreamblend.blending.guidance import (
    distance_and_gradient,
    guidance_step,
    map_distance,
    map_energy,
)
from dreamblend.models import load_backbone

PROMPTS = ["a sks mug on the beach", "a red sks mug", "a photo of a sks mug in the snow"]
TOKENS = torch.tensor([[2, 3, 6], [2, 3, 4], [5, 6, 9]])
T = torch.tensor(400)


@pytest.fixture(scope="module")
def model(tiny_base):
    """A tiny base whose maps have peaks, in double precision: what is left of a difference is not
    rounding.
    """
    model = load_backbone(str(tiny_base)).to(dtype=torch.float64)
    with torch.no_grad():
        for site in model.sites():
            model.denoiser.get_submodule(site).to_q.weight.mul_(12)
    return model


def latents(model, seed: int, n: int = 3) -> torch.Tensor:
    return torch.randn(
        n, *model.latent_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def reader(
    model,
    prompts: list[str] = PROMPTS,
    tokens: torch.Tensor = TOKENS,
    scale=lambda z: z,
    grid: int | None = None,
):
    text, sites = model.encode_prompts(prompts), model.sites(grid)

    def read(z):
        with record(model.denoiser, sites, tokens, stop_at_last=True) as maps:
            model.denoise(scale(z), T, text)
        return maps

    return read


@pytest.fixture(scope="module")
def reference(model):
    """The maps of other latents: what the latents of the tests are pulled towards."""
    with torch.no_grad():
        return reader(model)(latents(model, 99))


def maps_near(model, z: torch.Tensor, amount: float = 0.05) -> dict[str, torch.Tensor]:
    """The maps a little way off."""
    with torch.no_grad():
        return reader(model)(z + amount * latents(model, 99))


def move(
    read, z: torch.Tensor, target: dict, strength: float = 0.5, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """What one guidance step adds to the latents, which must be within its limit."""
    distance, gradient = distance_and_gradient(read, z, target, weights)
    energy = map_energy(target, weights)
    found = guidance_step(z, distance, gradient, energy, strength) - z
    assert (
        found.flatten(1).norm(dim=1)
        <= 0.501 * strength * z.flatten(1).norm(dim=1) * (distance / energy).sqrt()
    ).all()
    return found


# ----------------------------------------------------------------------------------------- distance
def test_distance_is_the_formula_on_maps_made_by_hand():
    # one head, two queries, two tokens
    maps = {
        "a": torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]]),
        "b": torch.tensor([[[[0.2, 0.2], [0.2, 0.2]]]]),
    }
    reference = {
        "a": torch.tensor([[[[0.5, 0.1], [0.4, 0.0]]]]),
        "b": torch.tensor([[[[0.2, 0.2], [0.2, 0.7]]]]),
    }
    torch.testing.assert_close(
        map_distance(maps, reference), torch.tensor([(0.4**2 + 0.6**2) / 2 + 0.5**2 / 2])
    )


def test_distance_does_not_grow_with_resolution_or_heads():
    torch.manual_seed(0)
    maps, reference = torch.rand(2, 2, 16, 3), torch.rand(2, 2, 16, 3)

    def finer(m):
        return {"site": m.repeat_interleave(4, 2).repeat(1, 3, 1, 1)}

    torch.testing.assert_close(
        map_distance(finer(maps), finer(reference)),
        map_distance({"site": maps}, {"site": reference}),
    )


def test_distance_is_fp32_whatever_the_maps_are():
    maps = {"site": torch.rand(2, 1, 4, 3).bfloat16()}
    assert map_distance(maps, {"site": torch.rand(2, 1, 4, 3)}).dtype == torch.float32


def test_tokens_of_no_weight_do_not_count(model, reference):
    """A sample's padding is what longer prompts of its batch leave; its position points at some
    token.
    """
    z, padded = latents(model, 0), torch.cat([TOKENS, torch.tensor([[0, 0], [7, 1], [3, 3]])], 1)
    weights = torch.tensor([[1.0, 1, 1, 0, 0]]).expand(3, -1)
    with torch.no_grad():
        target = reader(model, tokens=padded)(latents(model, 99))
    distance, gradient = distance_and_gradient(reader(model, tokens=padded), z, target, weights)
    expected_distance, expected = distance_and_gradient(reader(model), z, reference)
    torch.testing.assert_close(distance, expected_distance)
    torch.testing.assert_close(
        gradient, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
    )
    assert not torch.allclose(
        distance_and_gradient(reader(model, tokens=padded), z, target)[0], expected_distance
    )  # they would


# ----------------------------------------------------------------------------------------- gradient
def distance_in_double(model, z: torch.Tensor, reference: dict) -> torch.Tensor:
    """The sum over the batch of the map distance by diffusers' own attention scores, nowhere
    rounded to fp32.
    """
    seen, text = {}, model.encode_prompts(PROMPTS)
    layers = {site: model.denoiser.get_submodule(site) for site in model.sites()}

    def see(site):
        return lambda m, args, kwargs: seen.update(
            {site: (args[0], kwargs["encoder_hidden_states"])}
        )

    hooks = [
        layer.register_forward_pre_hook(see(site), with_kwargs=True)
        for site, layer in layers.items()
    ]
    with torch.no_grad():
        model.denoise(z, T, text)
        total = 0
        for site, layer in layers.items():
            q, k = (
                layer.head_to_batch_dim(project(x))
                for project, x in zip((layer.to_q, layer.to_k), seen[site])
            )
            maps = (q @ k.transpose(1, 2) * layer.scale).softmax(-1).unflatten(0, (len(z), -1))
            chosen = torch.stack([m[..., t] for m, t in zip(maps, TOKENS)])
            total = total + ((chosen - reference[site].double()) ** 2).sum(3).mean((1, 2)).sum()
    for hook in hooks:
        hook.remove()
    return total


def test_gradient_agrees_with_central_finite_differences(model, reference):
    z = latents(model, 0)
    distance, gradient = distance_and_gradient(reader(model), z, reference)
    torch.testing.assert_close(
        distance.sum().double(), distance_in_double(model, z, reference), rtol=1e-5, atol=0
    )
    step = 1e-5
    for seed in range(6):
        direction = latents(model, 10 + seed)
        if seed == 5:  # and the gradient's own direction
            direction = gradient / gradient.norm() * direction.norm()
        ahead, behind = (
            distance_in_double(model, z + sign * step * direction, reference) for sign in (1, -1)
        )
        slope = (gradient * direction).sum()
        assert (
            abs((ahead - behind) / (2 * step) - slope) < 1e-4 * gradient.norm() * direction.norm()
        )


def test_gradient_of_a_sample_does_not_depend_on_the_others(model, reference):
    z = latents(model, 0)
    distance, gradient = distance_and_gradient(reader(model), z, reference)
    for i in range(3):
        one = slice(i, i + 1)
        alone, expected = distance_and_gradient(
            reader(model, PROMPTS[one], TOKENS[one]),
            z[one],
            {s: m[one] for s, m in reference.items()},
        )
        torch.testing.assert_close(distance[one], alone, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            gradient[one], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
        )


def test_gradient_is_taken_inside_no_grad_and_leaves_nothing_behind(model, reference):
    z = latents(model, 0)
    with torch.no_grad():
        distance, gradient = distance_and_gradient(reader(model), z, reference)
    assert gradient.abs().max() > 0 and not gradient.requires_grad and not distance.requires_grad
    assert not z.requires_grad and z.grad is None
    for module in model.modules():
        assert all(not p.requires_grad and p.grad is None for p in module.parameters())


def test_gradient_is_of_the_unscaled_latents_of_a_sigma_scheduler(model, reference):
    scheduler = EulerDiscreteScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(5)
    t, sigma = scheduler.timesteps[1], scheduler.sigmas[1].item()
    scheduler.scale_model_input(latents(model, 0), scheduler.timesteps[0])
    scheduler.step(latents(model, 0), scheduler.timesteps[0], latents(model, 0))
    z = latents(model, 0) * (sigma**2 + 1) ** 0.5
    distance, gradient = distance_and_gradient(
        reader(model, scale=lambda z: scheduler.scale_model_input(z, t)), z, reference
    )
    inside, of_the_input = distance_and_gradient(
        reader(model), z / (sigma**2 + 1) ** 0.5, reference
    )
    torch.testing.assert_close(distance, inside, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient,
        of_the_input / (sigma**2 + 1) ** 0.5,
        rtol=1e-4,
        atol=1e-5 * gradient.abs().max().item(),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_survives_a_model_of_low_precision(model, dtype):
    """The derivative of a mean over many queries is below the smallest number of fp16 (6e-8) if it
    is not scaled.
    """
    low = model.replaced(unet=copy.deepcopy(model.denoiser))
    low.denoiser.to(dtype)
    z = latents(model, 0)
    with torch.no_grad():  # a near reference: a small distance, and a smaller gradient
        reference = reader(model, grid=8)(z + 0.001 * latents(model, 1))
        shift = {
            site: m - n
            for (site, m), n in zip(
                reader(low, grid=8)(z).items(), reader(model, grid=8)(z).values()
            )
        }
    expected = distance_and_gradient(reader(model, grid=8), z, reference)[1]
    gradient = distance_and_gradient(
        reader(low, grid=8), z.float(), {site: reference[site] + shift[site] for site in reference}
    )[1]
    cosine = torch.cosine_similarity(gradient.flatten(1).double(), expected.flatten(1))
    ratio = gradient.flatten(1).double().norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert cosine.min() > 0.99 and (ratio - 1).abs().max() < 0.2


# --------------------------------------------------------------------------------------------- step
def test_energy_is_the_distance_from_nothing():
    reference = {
        "a": torch.tensor([[[[0.5, 0.1], [0.4, 0.0]]]]),
        "b": torch.tensor([[[[0.2, 0.2], [0.2, 0.7]]]]),
    }
    zeros = {site: torch.zeros_like(m) for site, m in reference.items()}
    weights = torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(map_energy(reference), map_distance(zeros, reference))
    torch.testing.assert_close(
        map_energy(reference, weights), map_distance(zeros, reference, weights)
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strength", [0.05, 0.3])
@pytest.mark.parametrize("amount", [0.05, 1.0])
def test_a_step_lowers_the_distance_of_every_sample(model, seed, strength, amount):
    z = latents(model, seed)
    target = maps_near(model, z, amount)
    before = distance_and_gradient(reader(model), z, target)[0]
    after = distance_and_gradient(
        reader(model), z + move(reader(model), z, target, strength), target
    )[0]
    assert (after < before).all()


def test_repeated_steps_bring_the_maps_close(model, reference):
    z = latents(model, 0)
    first = distance_and_gradient(reader(model), z, reference)[0]
    for _ in range(15):
        z = z + move(reader(model), z, reference, 0.5)
    assert (distance_and_gradient(reader(model), z, reference)[0] < 0.5 * first).all()


def test_the_step_is_the_formula(model):
    """g / (|g|^2 / d + e / (strength |z|)^2), each sample by its own distance and gradient."""
    z = latents(model, 0)
    target = maps_near(model, z)
    distance, gradient = distance_and_gradient(reader(model), z, target)
    energy = map_energy(target)
    for i in range(3):
        expected = -gradient[i] / (
            gradient[i].square().sum() / distance[i] + energy[i] / (0.5 * z[i].norm()) ** 2
        )
        torch.testing.assert_close(
            move(reader(model), z, target)[i], expected, rtol=1e-4, atol=1e-6
        )


def test_a_great_strength_is_polyaks_step_and_a_small_one_the_plain_gradient():
    torch.manual_seed(0)
    z = torch.randn(2, 4, 8, 8)
    gradient = torch.randn(2, 4, 8, 8)
    distance = torch.tensor([0.1, 0.3])
    energy = torch.tensor([1.0, 2.0])

    def wide(x):
        return x.view(-1, 1, 1, 1)

    def size(x):
        return x.flatten(1).norm(dim=1)

    def step(strength):
        return z - guidance_step(z, distance, gradient, energy, strength)

    torch.testing.assert_close(
        step(1e3), wide(distance / size(gradient) ** 2) * gradient, rtol=1e-2, atol=1e-6
    )
    z = 1e-3 * z
    torch.testing.assert_close(
        step(0.01), wide((0.01 * size(z)) ** 2 / energy) * gradient, rtol=1e-2, atol=1e-9
    )


def test_no_distance_no_move(model):
    z = latents(model, 0)
    with torch.no_grad():
        own = reader(model)(z)
    assert distance_and_gradient(reader(model), z, own)[0].max() < 1e-12  # they are rounded apart
    assert move(reader(model), z, own, 1.0).abs().max() < 1e-5


def test_the_move_vanishes_as_the_maps_come_to_agree(model):
    z = latents(model, 0)
    moves = [
        move(reader(model), z, maps_near(model, z, nearness)).flatten(1).norm(dim=1)
        for nearness in (1e-1, 1e-2, 1e-3)
    ]
    assert (moves[1] < 0.3 * moves[0]).all() and (moves[2] < 0.3 * moves[1]).all()


def test_no_strength_no_move(model, reference):
    z = latents(model, 0)
    assert torch.equal(move(reader(model), z, reference, 0.0), torch.zeros_like(z))


def test_the_move_grows_with_the_strength(model):
    z = latents(model, 0)
    target = maps_near(model, z)
    lengths = [
        move(reader(model), z, target, strength).flatten(1).norm(dim=1)
        for strength in (0.05, 0.1, 0.3, 1.0, 10.0)
    ]
    assert all((a < b).all() for a, b in zip(lengths, lengths[1:]))


@pytest.mark.parametrize("factor", [1e-8, 1e-3, 1e4])
def test_the_move_does_not_depend_on_the_scale_of_the_distance(model, factor):
    z = latents(model, 0)
    target = maps_near(model, z)
    expected = move(reader(model), z, target)
    found = move(reader(model), z, target, weights=torch.full((3, 3), factor))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_the_move_does_not_depend_on_how_often_a_site_is_counted(model):
    z, read = latents(model, 0), reader(model)
    target = maps_near(model, z)

    def twice(maps):
        return {**maps, **{f"{site} again": m for site, m in maps.items()}}

    expected = move(read, z, target)
    found = move(lambda z: twice(read(z)), z, twice(target))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_the_move_goes_with_the_scale_of_the_latents(model):
    """As a sigma scheduler's latents are larger than the model's input by a factor, so is the move
    on them.
    """
    z, read = latents(model, 0), reader(model)
    target = maps_near(model, z)
    expected = move(read, z, target)
    wide = move(lambda z: read(z / 20), 20 * z, target)
    torch.testing.assert_close(
        wide / 20, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()
    )


def test_the_move_is_small_where_there_is_nothing_to_steer():
    z, distance = torch.ones(3, 4, 2, 2), torch.tensor([1.0, 1.0, 0.0])
    gradient = torch.stack(
        [torch.full((4, 2, 2), 1e-9), torch.zeros(4, 2, 2), torch.zeros(4, 2, 2)]
    )
    found = (guidance_step(z, distance, gradient, torch.ones(3), 1.0) - z).flatten(1).norm(dim=1)
    assert (found < 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_move_keeps_shape_and_dtype_and_the_latents_as_they_were(dtype):
    torch.manual_seed(0)
    z, gradient = torch.randn(2, 4, 8, 8).to(dtype), torch.randn(2, 4, 8, 8).to(dtype)
    before = z.clone()
    moved = guidance_step(z, torch.tensor([0.1, 3.0]), gradient, torch.ones(2), 0.5)
    assert (
        moved.dtype == dtype
        and moved.shape == z.shape
        and torch.equal(z, before)
        and moved.isfinite().all()
        and not torch.equal(moved, z)
    )


def test_a_reference_without_its_padding_is_as_far_away_to_the_bit():
    source = torch.Generator().manual_seed(0)
    maps, reference = ({"a": torch.rand(2, 3, 16, 77, generator=source)} for _ in range(2))
    weights = (torch.arange(77) < torch.tensor([[5], [7]])).float()
    kept = {"a": reference["a"][..., :7]}
    whole, short = (map_distance(maps, r, weights) for r in (reference, kept))
    assert torch.equal(whole, short)
    assert torch.equal(map_energy(reference, weights), map_energy(kept, weights))
