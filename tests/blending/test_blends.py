"""The blends on pairs in memory: their ends are the snapshots alone, their settings mean what they
say, and no image depends on its company.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from torch import Tensor

from dreamblend.attention.recording import Maps, record
from dreamblend.attention.words import token_table, word_maps
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import (
    BLENDS,
    CAG,
    Autoguidance,
    Drawing,
    Early,
    Late,
    Masked,
    Merge,
    Personalization,
    Region,
    Reward,
    Score,
    Similarity,
    Switch,
    draw_reference,
)
from dreamblend.blending.guidance import guidance_step, map_distance, map_energy
from dreamblend.blending.models import Models
from dreamblend.errors import InputError
from dreamblend.models import Backbone, load_backbone
from dreamblend.models.adapters import set_adapters
from dreamblend.sampling import initial_noise
from dreamblend.storage.photos import to_images

WHOLE = (0.0, 1.0)  # the window of all steps
LATE_BY_EARLY = Personalization(0.0, "early")  # what `Region` draws inside

PAIRS = [("a sks mug on the beach", 3), ("a red sks mug", 8)]
SCHEDULERS = [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
WITH_PNDM = [*SCHEDULERS, PNDMScheduler]
ALL = [*WITH_PNDM, HeunDiscreteScheduler, UniPCMultistepScheduler]


def changed(module: torch.nn.Module, seed: int, amount: float) -> torch.nn.Module:
    """A copy with noise on its weights, in place of training."""
    other, source = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(amount * p.std(correction=0) * torch.randn(p.shape, generator=source))
    return other


def full_pair(base: Backbone, amount: float = 0.3) -> Models:
    early, late = (
        base.replaced(**{name: changed(m, seed, amount) for name, m in base.parts().items()})
        for seed in (1, 2)
    )
    return Models(early, late, base)


def lora_pair(base: Backbone, **options) -> Models:
    base = base.replaced(**{name: copy.deepcopy(m) for name, m in base.parts().items()})
    targets = (["to_q", "to_k", "to_v", "to_out.0"], ["q_proj", "k_proj", "v_proj", "out_proj"])
    for module, names in zip(base.parts().values(), targets):
        for seed, name in enumerate(("early", "late")):
            torch.manual_seed(seed)
            module.add_adapter(
                LoraConfig(
                    r=2, lora_alpha=4, target_modules=names, init_lora_weights=False, **options
                ),
                adapter_name=name,
            )
        set_adapters(module, {})
    base._active["adapters"] = {}
    return Models(base.bind({"early": 1.0}), base.bind({"late": 1.0}), base)


def scheduled(models: Models, kind: type) -> Models:
    options = (
        {"skip_prk_steps": True} if kind is PNDMScheduler else {}
    )  # as in every Stable Diffusion
    for model in (models.base, models.early, models.late):
        model.scheduler = kind.from_config(model.scheduler.config, **options)
    return models


def sharpened(folder) -> Backbone:
    """A tiny base whose maps have peaks: the queries of random weights hardly tell tokens apart."""
    base = load_backbone(str(folder))
    with torch.no_grad():
        for site in base.sites():
            base.denoiser.get_submodule(site).to_q.weight.mul_(12)
    return base


@pytest.fixture(scope="module", params=["tiny_base", "tiny_v_base"])
def base(request) -> Backbone:
    """An epsilon base, and one that predicts v."""
    return sharpened(request.getfixturevalue(request.param))


@pytest.fixture(scope="module", params=[full_pair, lora_pair])
def pair(request, tiny_base) -> Models:
    return request.param(sharpened(tiny_base))


@pytest.fixture(scope="module")
def full(tiny_base) -> Models:
    return full_pair(sharpened(tiny_base))


@pytest.fixture(scope="module")
def lora(tiny_base) -> Models:
    return lora_pair(sharpened(tiny_base))


def batch_of(
    models: Models, pairs=PAIRS, steps: int = 4, scale: float = 4.0, grid: int = 4
) -> Batch:
    return Batch.of(models, pairs, "sks", "mug", steps, scale, grid)


def drawn(models: Models, blend, **options) -> Drawing:
    return blend.draw(batch_of(models, **options))


def assert_near(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=share * expected.abs().max().item(), rtol=0)


def assert_apart(found: torch.Tensor, other: torch.Tensor) -> None:
    assert (found - other).abs().amax((1, 2, 3)).min() > 0.01 * other.abs().max()


# ----------------------------------------------------------------------------------- early and late
@pytest.mark.parametrize("scheduler", ALL)
@pytest.mark.parametrize("blend", [Early(), Late()])
@pytest.mark.holds("equals pipeline", of="stable_diffusion")
def test_a_snapshot_alone_draws_what_diffusers_draws(base, blend, scheduler):
    models = scheduled(full_pair(base), scheduler)
    model = models.early if blend.name == "early" else models.late
    pipe = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.parts()["text_encoder"],
        tokenizer=model.tokenizer,
        unet=model.denoiser,
        scheduler=model.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    noise = initial_noise(base.latent_shape, [seed for _, seed in PAIRS])
    expected = pipe(
        [p for p, _ in PAIRS],
        num_inference_steps=4,
        guidance_scale=4.0,
        latents=noise,
        output_type="latent",
    ).images
    assert_near(drawn(models, blend).latents, expected)


def test_the_two_snapshots_draw_different_images(pair):
    assert_apart(drawn(pair, Early()).latents, drawn(pair, Late()).latents)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_word_maps_are_shares_of_attention_averaged_over_the_steps(full, scale):
    batch, read = batch_of(scheduled(full, DDIMScheduler), scale=scale), []
    latents = Late().draw(batch)
    both = [full.late.encode_prompts(prompts) for prompts in ([""] * 2, batch.prompts)]
    z, scheduler = batch.noise, copy.deepcopy(full.late.scheduler)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        with record(full.late.denoiser, full.late.sites(4)) as maps, torch.no_grad():
            unguided, guided = (full.late.denoise(z, t, text) for text in both)
        read.append(torch.stack([m.mean(1) for m in maps.values()]).mean(0))
        z = scheduler.step(unguided + max(scale, 1.0) * (guided - unguided), t, z).prev_sample
    average = torch.stack(read).mean(0)
    for i, prompt in enumerate(batch.prompts):
        for j, span in enumerate(full.base.spans(prompt)):
            torch.testing.assert_close(
                latents.maps[i, j], average[i][:, list(span.tokens)].sum(1), atol=1e-4, rtol=1e-3
            )
    assert latents.maps.min() >= 0 and latents.maps.sum(1).max() < 1


# --------------------------------------------------------------------------- the ends of each blend
@pytest.mark.parametrize("scheduler", ALL)
def test_cag_of_no_strength_is_late_bit_for_bit(pair, scheduler):
    scheduled(pair, scheduler)
    found, expected = drawn(pair, CAG(strength=0)), drawn(pair, Late())
    assert (
        torch.equal(found.latents, expected.latents)
        and torch.equal(found.maps, expected.maps)
        and found.distance is None
    )


def test_cag_of_an_empty_window_is_late_bit_for_bit(pair):
    assert torch.equal(
        drawn(pair, CAG(strength=1, window=(0.5, 0.5))).latents, drawn(pair, Late()).latents
    )


@pytest.mark.parametrize("scheduler", WITH_PNDM)
@pytest.mark.parametrize("point, end", [(0.0, Late()), (1.0, Early())])
def test_switch_at_an_end_is_one_snapshot_alone(pair, scheduler, point, end):
    scheduled(pair, scheduler)
    found, expected = drawn(pair, Switch(point)), drawn(pair, end)
    assert torch.equal(found.latents, expected.latents) and torch.equal(found.maps, expected.maps)


@pytest.mark.parametrize("weight, end", [(0.0, Early()), (1.0, Late())])
def test_merge_at_an_end_is_one_snapshot_alone(pair, weight, end):
    found, expected = drawn(pair, Merge(weight)), drawn(pair, end)
    assert_near(found.latents, expected.latents, 1e-5)
    torch.testing.assert_close(found.maps, expected.maps)


@pytest.mark.parametrize("weight, end", [(0.0, Early()), (1.0, Late())])
def test_score_at_an_end_is_one_snapshot_alone(pair, weight, end):
    assert_near(drawn(pair, Score(weight)).latents, drawn(pair, end).latents)


@pytest.mark.parametrize(
    "blend", [CAG(1.0), Switch(0.5), Merge(0.5), Score(0.5), Region(edge=1.0, grow=0, margin=1.0)]
)
def test_between_its_ends_a_blend_is_neither_snapshot(pair, blend):
    scheduled(pair, DDIMScheduler)
    found = drawn(pair, blend)
    for end in (Early(), Late()):
        assert_apart(found.latents, drawn(pair, end).latents)
    assert found.maps.isfinite().all() and found.maps.shape == drawn(pair, Late()).maps.shape


# ---------------------------------------------------------------------------------- what a blend is
def test_merge_is_the_mean_of_the_weights(full):
    merged = full.merged(0.25)
    for part in (lambda m: m.denoiser, lambda m: m.parts()["text_encoder"]):
        early, late = part(full.early).state_dict(), part(full.late).state_dict()
        for name, value in part(merged).state_dict().items():
            torch.testing.assert_close(value, 0.75 * early[name] + 0.25 * late[name])


def test_merge_of_adapters_adds_their_shares(lora):
    layer = next(m for n, m in lora.base.denoiser.named_modules() if n.endswith("attn2.to_q"))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))

    def out(view: Backbone) -> torch.Tensor:
        view.activate()
        return layer(x)

    plain = out(lora.base.bind({}))
    expected = plain + 0.75 * (out(lora.early) - plain) + 0.25 * (out(lora.late) - plain)
    torch.testing.assert_close(out(lora.merged(0.25)), expected)


def test_merge_refuses_adapters_whose_weights_do_not_add(tiny_base):
    """DoRA's magnitudes: halfway between two of them is not half of each, and no weight of an end
    is that end.
    """
    models = lora_pair(load_backbone(str(tiny_base)), use_dora=True)
    with pytest.raises(InputError, match="DoRA.*score"):
        drawn(models, Merge(0.5), steps=2)
    assert torch.equal(
        drawn(models, Switch(0.0), steps=2).latents, drawn(models, Late(), steps=2).latents
    )


def test_score_of_one_step_is_linear_in_its_weight(full):
    scheduled(full, DDIMScheduler)

    def at(weight):
        return drawn(full, Score(weight), steps=1).latents

    assert_near(at(0.3), 0.7 * at(0.0) + 0.3 * at(1.0))
    assert_near(at(2.0), 2 * at(1.0) - at(0.0))


@pytest.mark.holds("region", of="stable_diffusion")
def test_region_of_one_step_lies_between_both_snapshots_by_its_share(pair):
    """The late one's end is its prompt, guided away from the early one's empty prompt."""
    scheduled(pair, DDIMScheduler)
    early, late, found = (
        drawn(pair, blend, steps=1).latents
        for blend in (Early(), LATE_BY_EARLY, Region(0.3, 0, 1.0, margin=1.0))
    )
    share = Region(0.3, 0, 1.0, margin=1.0).share(
        drawn(pair, Late(), steps=1).maps, batch_of(pair, steps=1)
    )
    assert (
        share.min() >= 0
        and (share.amax((1, 2, 3)) == 1).all()
        and (share < 0.9).flatten(1).any(1).all()
    )
    assert_near(found, early + share * (late - early))


def test_region_is_where_the_subjects_words_look_and_grows_as_its_edge_narrows(full):
    batch = batch_of(full)
    maps = torch.full((2, batch.words.shape[1], 16), 0.1)
    maps[:, :, 0] = 0.9  # where every word looks
    maps[batch.subject, 0], maps[batch.subject, 10] = 0.1, 0.9
    near, far = (
        (1, slice(5, 6), slice(5, 6)),
        (
            1,
            slice(0, 1),
            slice(0, 1),
        ),
    )  # place 10 is the third of the third row; 2 latents a place
    shares = [
        Region(edge, grow, 1.0, margin=1.0).share(maps, batch)[:, 0]
        for edge, grow in ((1.0, 0), (0.5, 0), (0.1, 0), (0.1, 1))
    ]
    assert (
        all(s[far] == 0 for s in shares)
        and shares[0][near] > 0.5
        and all(s[near] == 1 for s in shares[1:])
    )
    assert all(
        (wide >= narrow).all() and wide.sum() > narrow.sum()
        for narrow, wide in zip(shares, shares[1:])
    )


def test_region_gives_way_where_another_word_attends_more(full):
    batch = batch_of(full)
    blend, maps = Region(0.5, 4, 1.0, margin=0.2), torch.zeros(2, batch.words.shape[1], 16)
    maps[batch.subject] = torch.linspace(0, 1, 16)
    whole = blend.share(maps, batch)
    assert (whole == 1).all()  # grown over the whole grid
    other = int((batch.mask[1] & ~batch.subject[1]).nonzero()[0])
    maps[1, other] = 7 * torch.linspace(1, 0, 16)
    found = blend.share(maps, batch)
    assert torch.equal(found[0], whole[0])  # of its own prompt alone
    lead = (2 * torch.linspace(0, 1, 16) - 1).view(1, 1, 4, 4)
    fine = torch.nn.functional.interpolate(lead, found.shape[-2:], mode="bilinear")
    assert_near(found[1:], (1 + (fine + 0.2) / 0.5).clamp(0, 1))
    assert found[1].min() == 0 and found[1].max() == 1
    assert torch.equal(Region(0.5, 4, 1.0, margin=1.0).share(maps, batch), whole)


def test_the_weight_of_region_mixes_both_prompts_where_the_subject_is(full):
    scheduled(full, DDIMScheduler)

    def at(blend):
        return drawn(full, blend, steps=1).latents

    early, whole = at(Early()), at(Region(0.3, 0, 1.0, margin=1.0)) - at(Early())
    for weight in (0.0, 0.4, 1.5):
        assert_near(at(Region(0.3, 0, weight, margin=1.0)), early + weight * whole)
    everywhere = Region(1e-6, grow=4, weight=0.4, margin=1.0)  # grown over the whole grid
    assert_near(at(everywhere), torch.lerp(early, at(LATE_BY_EARLY), 0.4))
    plain = [drawn(full, blend, steps=1, scale=1.0).latents for blend in (everywhere, Score(0.4))]
    assert_near(*plain)  # without guidance there is no empty prompt


def test_region_without_a_subject_in_the_prompt_is_the_early_snapshot(full):
    scheduled(full, DDIMScheduler)
    pairs = [("of the", 1), ("a red ball on the beach", 2)]
    early = drawn(full, Early(), pairs=pairs).latents
    assert_near(drawn(full, Region(asked=1.0), pairs=pairs).latents, early)


@pytest.mark.parametrize("asked, calls, rescale", [(0.5, 2, 0.0), (2 / 3, 2, 0.7), (1.0, 3, 0.0)])
def test_region_guides_the_mixture_and_holds_what_the_empty_prompt_differs_by(
    pair, asked, calls, rescale
):
    """By hand, from single predictions: of three calls, the last one's may be held."""
    scheduled(pair, DDIMScheduler)
    batch = replace(batch_of(pair, steps=3), guidance_rescale=rescale)
    (early, late), scale = (batch.early, batch.late), batch.guidance_scale
    blend, held = Region(0.3, 0, 0.7, asked), []

    def predict(z: Tensor, t: Tensor, step: int) -> Tensor:
        prompts, empty = batch.encode(early)
        of_early = early.denoise(z, t, prompts)
        with record(late.denoiser, batch.sites, batch.tokens, mean_heads=True) as maps:
            of_late = late.denoise(z, t, batch.encode(late)[0])
        mixed = of_early + blend.share(word_maps(maps, batch.words), batch) * (of_late - of_early)
        if step < calls:
            held[:] = [early.denoise(z, t, empty) - of_early]
        away = of_early + held[0]
        found = away + scale * (mixed - away)
        sides = (1, 2, 3)
        rescaled = found * mixed.std(sides, keepdim=True) / found.std(sides, keepdim=True)
        return torch.lerp(found, rescaled, rescale)

    assert_near(blend.draw(batch).latents, batch.sample(predict))


def models_that_run(models: Models, blend, steps: int = 5) -> list[str]:
    """Which snapshot of a full pair makes each prediction of a blend."""
    batch, made = batch_of(models, steps=steps), []
    hooks = [
        getattr(models, name).denoiser.register_forward_pre_hook(
            lambda *_, name=name: made.append(name)
        )
        for name in ("early", "late")
    ]
    try:
        blend.draw(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return made


@pytest.mark.parametrize("point, early", [(0.0, 0), (0.2, 1), (0.4, 2), (0.6, 3), (1.0, 5)])
def test_switch_gives_the_first_share_of_the_steps_to_early(full, point, early):
    scheduled(full, DDIMScheduler)
    assert models_that_run(full, Switch(point)) == ["early"] * early + ["late"] * (5 - early)


def test_switch_reads_the_maps_of_the_same_steps_in_any_pair(full, lora):
    """The maps of the late snapshot's own steps, though a LoRA pair's snapshots share the layers
    they are read from.
    """
    for models in (full, lora):
        scheduled(models, DDIMScheduler)
        batch, blend, read = batch_of(models, steps=5), Switch(0.6), []
        late = drawn(models, blend, steps=5)
        text = models.late.encode_prompts(batch.prompts)
        states = []  # the latents of the last two steps, which are late's
        hook = models.late.denoiser.register_forward_pre_hook(
            lambda m, args, states=states: states.append((args[0][2:].clone(), args[1]))
        )
        blend.draw(batch)
        hook.remove()
        for z, t in states[-2:]:
            with (
                record(models.late.denoiser, models.late.sites(4), batch.tokens) as maps,
                torch.no_grad(),
            ):
                models.late.denoise(z, t, text)
            read.append(
                batch.words
                @ torch.stack([m.mean(1) for m in maps.values()]).mean(0).transpose(1, 2)
            )
        torch.testing.assert_close(late.maps, torch.stack(read).mean(0), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------- attention guidance
def guided_calls(models: Models, blend: CAG, steps: int) -> list[int]:
    """The numbers of the model's calls before which CAG moves the latents, found by passes with
    gradients.
    """
    batch, steps_guided, plain = batch_of(models, steps=steps), [], 0

    def count(m, args):
        nonlocal plain
        if torch.is_grad_enabled():
            steps_guided.append(plain)
        else:
            plain += 1

    hook = models.late.denoiser.register_forward_pre_hook(count)
    try:
        blend.draw(batch)
    finally:
        hook.remove()
    assert plain == len(models.late.schedule(steps).timesteps)
    return steps_guided


@pytest.mark.parametrize(
    "window, expected",
    [
        ((0.0, 1.0), [0, 1, 2, 3, 4]),
        ((0.0, 0.6), [0, 1, 2]),
        ((0.4, 1.0), [2, 3, 4]),
        ((0.2, 0.4), [1]),
        ((0.6, 0.6), []),
    ],
)
def test_guided_steps_are_those_of_the_window(full, window, expected):
    scheduled(full, DDIMScheduler)
    assert guided_calls(full, CAG(window=window), steps=5) == expected


@pytest.mark.parametrize(
    "scheduler, window, expected",
    [
        (PNDMScheduler, WHOLE, [0, 2, 3, 4]),
        (PNDMScheduler, (0.0, 0.2), [0]),
        (HeunDiscreteScheduler, WHOLE, [0, 2, 4, 6]),
    ],
)
def test_guidance_comes_before_the_calls_that_begin_a_step(full, scheduler, window, expected):
    """What moves the latents before the other ones is thrown away by the scheduler."""
    scheduled(full, scheduler)
    assert guided_calls(full, CAG(window=window), steps=4) == expected


@pytest.mark.parametrize(
    "scheduler", [PNDMScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler]
)
@pytest.mark.parametrize("window", [(0.0, 0.2), (0.2, 0.6)])
def test_the_guidance_of_each_step_shows_with_a_scheduler_that_keeps_latents(
    full, scheduler, window
):
    scheduled(full, scheduler)
    late, found = drawn(full, Late()).latents, drawn(full, CAG(1.0, window)).latents
    assert (found - late).abs().amax((1, 2, 3)).min() > 1e-3 * late.abs().max()


def test_repeats_are_guidance_steps_before_each_denoising_step(full):
    scheduled(full, DDIMScheduler)
    assert guided_calls(full, CAG(window=(0.0, 0.4), repeats=3), steps=5) == [0, 0, 0, 1, 1, 1]


def test_the_window_is_respected_also_where_the_reference_holds_more_steps(full):
    scheduled(full, DDIMScheduler)
    batch, blend = batch_of(full), CAG(1.0, window=(0.0, 0.5))
    reference = draw_reference(batch, [CAG(window=WHOLE), blend])
    assert len(reference.site_maps) > len(blend.guided_steps(batch.calls))
    assert torch.equal(blend.draw(batch, reference).latents, blend.draw(batch).latents)


def test_a_reference_without_the_maps_of_the_guided_steps_is_an_error_and_not_late(full):
    batch = batch_of(full)
    with pytest.raises(ValueError, match="without the maps"):
        CAG().draw(batch, draw_reference(batch, []))


def test_the_reference_is_what_early_draws_and_is_not_drawn_again(full):
    batch = batch_of(full)
    reference = draw_reference(batch, [CAG()])
    assert Early().draw(batch, reference) is reference
    assert torch.equal(Early().draw(batch).latents, reference.latents)
    assert torch.equal(Early().draw(batch).maps, reference.maps)


def test_a_reference_whose_image_is_not_wanted_ends_with_the_last_guided_step(full):
    scheduled(full, DDIMScheduler)
    batch, blend = batch_of(full), CAG(1.0, window=(0.0, 0.5))
    drawn_at: list[int] = []

    def after(z: Tensor, t: Tensor, call: int) -> Tensor:
        drawn_at.append(call)
        return z

    short = draw_reference(replace(batch, after=after), [blend], image=False)
    assert drawn_at == list(blend.guided_steps(batch.calls))
    whole = draw_reference(batch, [blend])
    assert torch.equal(blend.draw(batch, short).latents, blend.draw(batch, whole).latents)


def cag_by_hand(
    models: Models, batch: Batch, site_maps: dict[int, Maps], strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The algorithm, one sample at a time and with diffusers' modules alone: latents, and the
    distance before each step.
    """
    model, rows, distances = models.late, [], []
    for i, prompt in enumerate(batch.prompts):
        conditional, unconditional = model.encode_prompts([prompt]), model.encode_prompts([""])
        scheduler = copy.deepcopy(model.scheduler)
        scheduler.set_timesteps(batch.num_inference_steps)
        z = batch.noise[i : i + 1] * scheduler.init_noise_sigma
        tokens = torch.tensor([[t for span in model.spans(prompt) for t in span.tokens]])
        each = []
        for step, t in enumerate(scheduler.timesteps):
            if not (
                step == 1 and isinstance(scheduler, PNDMScheduler)
            ):  # whose result begins at the latents of step 0 again
                variable = z.clone().requires_grad_()
                with record(model.denoiser, model.sites(batch.grid), tokens) as maps:
                    model.denoise(scheduler.scale_model_input(variable, t), t, conditional)
                reference = {
                    site: m[i : i + 1, ..., : tokens.shape[1]]
                    for site, m in site_maps[step].items()
                }
                distance = map_distance(maps, reference)
                (gradient,) = torch.autograd.grad(distance.sum(), variable)
                z = guidance_step(z, distance.detach(), gradient, map_energy(reference), strength)
                each.append(distance.detach())
            with torch.no_grad():
                scaled = scheduler.scale_model_input(z, t)
                u, c = (model.denoise(scaled, t, text) for text in (unconditional, conditional))
                z = scheduler.step(u + batch.guidance_scale * (c - u), t, z).prev_sample
        rows.append(z)
        distances.append(torch.cat(each).mean())
    return torch.cat(rows), torch.stack(distances)


@pytest.mark.parametrize("scheduler", [*SCHEDULERS, PNDMScheduler])
def test_cag_is_the_algorithm_by_hand_for_each_sample_and_scheduler(tiny_base, scheduler):
    """Steps on the sampler's own latents, the conditional maps alone, a shorter prompt's padding
    left out.
    """
    models = scheduled(full_pair(sharpened(tiny_base), amount=0.01), scheduler)
    pairs, blend = [("a sks mug on the beach", 3), ("sks mug", 8)], CAG(0.5, WHOLE)
    batch = batch_of(models, steps=3, pairs=pairs)
    found = blend.draw(batch)
    site_maps = draw_reference(batch, [blend]).site_maps
    latents, distance = cag_by_hand(models, batch, site_maps, 0.5)
    assert_near(found.latents, latents, 2e-3)  # guidance enlarges rounding
    torch.testing.assert_close(found.distance, distance, rtol=2e-3, atol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.holds("CAG", of="stable_diffusion")
def test_cag_brings_the_late_maps_to_the_early_ones(pair, scheduler):
    """Maps while drawing with guidance are nearer to the reference than without (a step too small
    to move anything).
    """
    scheduled(pair, scheduler)
    without, with_ = (
        drawn(pair, CAG(strength, WHOLE), steps=5).distance for strength in (1e-9, 0.5)
    )
    assert (with_ < 0.95 * without).all()


def test_the_reference_is_of_the_guided_steps_and_the_chosen_tokens_alone(full):
    scheduled(full, DDIMScheduler)
    batch = batch_of(full)
    site_maps = draw_reference(batch, [CAG(window=(0.25, 0.75))]).site_maps
    assert list(site_maps) == [1, 2]
    longest = max(sum(len(s.tokens) for s in full.base.spans(p)) for p in batch.prompts)
    assert longest < batch.tokens.shape[1] / 2  # the rest is padding, which is not kept
    for maps in site_maps.values():
        assert list(maps) == list(full.base.sites(4)) and all(
            m.shape == (2, 2, 16, longest) and m.untyped_storage().nbytes() == 4 * m.numel()
            for m in maps.values()
        )


def test_a_prompt_of_no_content_words_is_drawn_as_late_draws_it(full):
    scheduled(full, DDIMScheduler)
    for pairs in ([("of the", 1)], [("of the", 1), ("", 2), ("a sks mug", 3)]):
        found, expected = drawn(full, CAG(1.0), pairs=pairs), drawn(full, Late(), pairs=pairs)
        assert (
            torch.equal(found.latents[:1], expected.latents[:1])
            and found.latents.isfinite().all()
            and found.maps.isfinite().all()
        )


def test_blending_leaves_weights_and_processors_as_they_were(pair):
    weights = {name: value.clone() for name, value in pair.late.denoiser.state_dict().items()}
    processors = {
        name: id(m.processor)
        for name, m in pair.late.denoiser.named_modules()
        if hasattr(m, "processor")
    }
    drawn(pair, CAG(1.0, repeats=2))
    assert all(
        torch.equal(weights[name], value) for name, value in pair.late.denoiser.state_dict().items()
    )
    assert processors == {
        name: id(m.processor)
        for name, m in pair.late.denoiser.named_modules()
        if hasattr(m, "processor")
    }
    for model in (pair.base, pair.early, pair.late):
        assert all(
            not p.requires_grad and p.grad is None
            for module in model.modules()
            for p in module.parameters()
        )


# ----------------------------------------------------------------------------------------- settings
MADE: list[Callable] = [
    Early,
    Late,
    CAG,
    lambda: CAG(0.3, (0.1, 0.6), 2),
    Switch,
    lambda: Switch(0.7),
    Merge,
    lambda: Merge(1.5),
    Score,
    lambda: Score(-1.0),
    Region,
    lambda: Region(1.0, 0, 0.5, 0.5, 0.4),
    Personalization,
    lambda: Personalization(0.2, "early"),
    Autoguidance,
    Reward,
    lambda: Reward(1.0, "early"),
    Masked,
    lambda: Masked(0.1, 0.5, 1.0),
    Similarity,
    lambda: Similarity(4, 1.0, 1.0),
]


@pytest.mark.parametrize("make", MADE)
def test_settings_come_back_from_json_as_the_same_blend(make):
    settings = json.loads(json.dumps(make().settings))
    name = settings.pop("blend")
    again = BLENDS[name](**settings)
    assert type(again) is type(make()) and again.settings == make().settings


@pytest.mark.parametrize(
    "make, say",
    [
        (lambda: CAG(strength=-0.1), "strength is -0.1"),
        (lambda: CAG(repeats=0), "repeats 0"),
        (lambda: CAG(window=(0.6, 0.2)), "window.*0.6, 0.2"),
        (lambda: CAG(window=(0.0, 1.2)), "window.*1.2"),
        (lambda: Switch(1.01), "point is 1.01"),
        (lambda: Switch(-0.5), "point is -0.5"),
        (lambda: CAG(strength=float("nan")), "strength is nan"),
        (lambda: Region(0.0), "edge is 0.0"),
        (lambda: Region(1.1), "edge is 1.1"),
        (lambda: Region(grow=-1), "grow -1"),
        (lambda: Region(asked=0.0), "asked is 0.0"),
        (lambda: Region(margin=1.5), "margin is 1.5"),
        *(
            (lambda b=b: b(weight=float("nan")), "weight is nan")
            for b in (Merge, Score, Region, Personalization, Autoguidance, Reward)
        ),
        (lambda: Autoguidance(0.9), "weight is 0.9.*Score"),
        (lambda: Personalization(start="late"), "start is 'late'.*base, early"),
        (lambda: Reward(start=""), "start is ''"),
        (lambda: Masked(start=1.0), "start is 1.0"),
        (lambda: Masked(quantile=1.0), "quantile 1.0"),
        (lambda: Masked(share=1.2), "share 1.2"),
        (lambda: Similarity(patch=0), "patch is 0"),
        (lambda: Similarity(temperature=0.0), "temperature 0.0"),
        (lambda: Similarity(recentre=-0.1), "recentre -0.1"),
    ],
)
def test_settings_out_of_range_are_named(make, say):
    with pytest.raises(InputError, match=say):
        make()


# ----------------------------------------------------------------------------- no leaks, no company
def test_lora_views_of_one_base_do_not_leak_into_each_other(lora):
    scheduled(lora, DDIMScheduler)
    off = Models(lora.early, lora.base.bind({}), lora.base)
    plain = Late().draw(batch_of(off)).latents
    first, late = drawn(lora, Early()).latents, drawn(lora, Late()).latents
    for blend in (Merge(0.5), CAG(1.0), Score(0.5), Switch(0.5), Region(), Reward(), Similarity()):
        drawn(lora, blend)
        assert torch.equal(drawn(lora, Early()).latents, first) and torch.equal(
            drawn(lora, Late()).latents, late
        )
    assert torch.equal(Late().draw(batch_of(off)).latents, plain)
    assert_apart(first, plain)


def test_an_image_is_the_same_whatever_was_drawn_before(full):
    scheduled(full, DDIMScheduler)
    first = drawn(full, CAG(0.5)).latents
    drawn(full, CAG(0.5), pairs=[("another sks mug", 5)], steps=3)
    torch.manual_seed(7)
    assert torch.equal(drawn(full, CAG(0.5)).latents, first)


COMPANY = [
    ("a sks mug on the beach", 0),
    ("a sks mug", 1),
    ("a photo of a red sks mug near a wonderful castle in the snow", 2),
    ("a sks mug on the beach", 3),
    ("of the", 4),
    ("sky", 5),
    ("a sks mug in the blue sky", 0),
    ("A SKS mug, naïve", 2**33),
]


def images(
    models: Models, blend, pairs: list[tuple[str, int]], batch_size: int
) -> dict[tuple[str, int], np.ndarray]:
    """The final uint8 images by pair, drawn and decoded in batches."""
    found = {}
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        with torch.no_grad():
            pixels = models.base.decode(drawn(models, blend, pairs=batch).latents)
        found |= {p: np.asarray(image).astype(int) for p, image in zip(batch, to_images(pixels))}
    return found


SHUFFLED = [COMPANY[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]


@pytest.mark.parametrize(
    "blend, scheduler",
    [
        (Late(), DDIMScheduler),
        (CAG(0.5), DDIMScheduler),
        (Region(), DDIMScheduler),
        (Masked(), DDIMScheduler),
        pytest.param(Similarity(), DDIMScheduler, marks=pytest.mark.heavy),
        (CAG(0.5), EulerAncestralDiscreteScheduler),
    ],
)
def test_an_image_does_not_depend_on_its_batch(full, blend, scheduler):
    """But for rounding: the kernels of convolutions and products differ with the size of the batch,
    so a value may round to the next level.
    """
    scheduled(full, scheduler)
    alone = images(full, blend, COMPANY, 1)
    for found in (
        images(full, blend, COMPANY, 8),
        images(full, blend, SHUFFLED, 8),
        images(full, blend, SHUFFLED, 3),
    ):
        for p in COMPANY:
            difference = np.abs(found[p] - alone[p])
            assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_an_image_does_not_depend_on_its_place_in_the_batch(full):
    """Byte for byte, in batches of one size."""
    scheduled(full, DDIMScheduler)
    expected, found = (images(full, CAG(0.5), pairs, 8) for pairs in (COMPANY, SHUFFLED))
    assert all(np.array_equal(found[p], expected[p]) for p in COMPANY)


def test_the_token_table_of_a_batch_starts_with_each_prompts_own(full):
    tokens, words = token_table(full.base, [p for p, _ in COMPANY])
    for i, (prompt, _) in enumerate(COMPANY):
        own_tokens, own_words = token_table(full.base, [prompt])
        n, m = own_tokens.shape[1], own_words.shape[1]
        assert (
            torch.equal(tokens[i, :n], own_tokens[0])
            and torch.equal(words[i, :m, :n], own_words[0])
            and words[i, :, n:].sum() == 0
        )
