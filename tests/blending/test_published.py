"""The published samplers on a pair: each is its formula, written out over plain predictions; each
takes the passes that it says; and at their ends they are one model alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler
from test_blends import assert_apart, assert_near, batch_of, full_pair, lora_pair, sharpened

from dreamblend.attention import record
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import (
    CAG,
    Autoguidance,
    Blend,
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
)
from dreamblend.blending.models import Models
from dreamblend.errors import InputError
from dreamblend.models import Backbone, load_backbone
from dreamblend.models.placement import Turns, place

PROMPTS = ["a sks mug on the beach", "a red sks mug"]
OF_CLASS = {"a sks mug on the beach": "a mug on the beach", "a red sks mug": "a red mug"}
SCALE = 4.0
Prediction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def base(tiny_base) -> Backbone:
    base = sharpened(tiny_base)
    base.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    return base


@pytest.fixture(scope="module")
def full(base) -> Models:
    return full_pair(base)


@pytest.fixture(scope="module")
def lora(base) -> Models:
    return lora_pair(base)


@pytest.fixture(params=["full", "lora"])
def pair(request) -> Models:
    return request.getfixturevalue(request.param)


def drawn(models: Models, blend: Blend, **options) -> torch.Tensor:
    return blend.draw(batch_of(models, **{"steps": 2, **options})).latents


# ------------------------------------------------------------------------------------- the formulas
def plain(model: Backbone, prompt: str) -> Prediction:
    text = model.encode_prompts([prompt])
    return lambda z, t: model.denoise(z, t, text)


@torch.no_grad()
def by_hand(
    models: Models, formula: Callable[[str], Callable[[torch.Tensor, torch.Tensor, int], tuple]]
) -> torch.Tensor:
    """What a formula draws, one sample at a time."""
    batch, rows = batch_of(models, steps=2, scale=SCALE), []
    for i, prompt in enumerate(batch.prompts):
        predict, z = formula(prompt), batch.noise[i : i + 1]
        scheduler = copy.deepcopy(models.late.scheduler)
        scheduler.set_timesteps(batch.num_inference_steps)
        for step, t in enumerate(scheduler.timesteps):
            z = scheduler.step(predict(z, t, step), t, z).prev_sample
        rows.append(z)
    return torch.cat(rows)


def the_base(models: Models) -> Backbone:
    return models.base.bind({}) if models.late.adapters else models.base


@pytest.mark.parametrize("start, weight", [("base", 0.5), ("early", 0.25)])
def test_personalization_guides_away_from_the_weak_models_empty_prompt(pair, start, weight):
    def formula(prompt):
        late = plain(pair.late, prompt)
        weak = plain(between(pair, start, weight), "")

        def predict(z, t, step):
            w = weak(z, t)
            return w + SCALE * (late(z, t) - w)

        return predict

    found = drawn(pair, Personalization(weight, start))
    assert_near(found, by_hand(pair, formula))
    assert_apart(found, drawn(pair, Late()))


def between(models: Models, start: str, weight: float) -> Backbone:
    """A model with its weights between two others', made by hand."""
    if models.late.adapters:
        own = {"early": 1 - weight} if start == "early" else {}
        return models.base.bind({**own, "late": weight})
    first, mixed = getattr(models, start), {}
    for name, part in models.late.parts().items():
        mixed[name] = copy.deepcopy(part)
        with torch.no_grad():
            for p, q in zip(mixed[name].parameters(), first.parts()[name].parameters()):
                p.copy_((1 - weight) * q + weight * p)
    return models.late.replaced(**mixed)


def test_autoguidance_extrapolates_from_early_over_late(full):
    def formula(prompt):
        halves = [plain(model, p) for model in (full.early, full.late) for p in ("", prompt)]

        def predict(z, t, step):
            eu, ec, lu, lc = (half(z, t) for half in halves)
            early, late = eu + SCALE * (ec - eu), lu + SCALE * (lc - lu)
            return early + 2.0 * (late - early)

        return predict

    assert_near(drawn(full, Autoguidance(2.0)), by_hand(full, formula))
    assert torch.equal(drawn(full, Autoguidance(2.0)), drawn(full, Score(2.0)))


@pytest.mark.parametrize("start", ["base", "early"])
def test_reward_adds_what_late_has_beyond_what_draws_the_scene(pair, start):
    def formula(prompt):
        late, model = plain(pair.late, prompt), the_base(pair) if start == "base" else pair.early
        empty = plain(model, "")
        scene = plain(model, OF_CLASS[prompt] if start == "base" else prompt)

        def predict(z, t, step):
            u, c = empty(z, t), scene(z, t)
            return u + SCALE * (c - u) + 1.5 * (late(z, t) - c)

        return predict

    assert_near(drawn(pair, Reward(1.5, start)), by_hand(pair, formula))


def test_masked_mixes_both_prompts_where_the_class_word_attends(full):
    """By the paper's form: both prompts' scales add up to the whole one inside the mask."""
    inside, outside, blend = [], [], Masked(start=0.5, quantile=0.6, share=0.25)
    model, sites = full.late, full.late.sites(4)

    def formula(prompt):
        texts = ("", OF_CLASS[prompt], prompt)
        empty, of_class, own = (plain(model, text) for text in texts)
        (token,) = next(s.tokens for s in model.spans(OF_CLASS[prompt]) if s.word == "mug")

        def predict(z, t, step):
            u, p = empty(z, t), own(z, t)
            with record(model.denoiser, sites) as maps:
                c = of_class(z, t)
            outside_it = u + SCALE * (c - u)
            if step < 1:
                return outside_it
            map_ = torch.stack([m[0, :, :, token].mean(0) for m in maps.values()]).mean(0)
            fine = torch.nn.functional.interpolate(
                map_.view(1, 1, 4, 4), z.shape[2:], mode="bilinear"
            )
            mask = fine > fine.quantile(0.6)
            inside.append(mask.float().mean())
            outside.append((~mask).float().mean())
            return torch.where(
                mask, u + 0.25 * SCALE * (p - u) + 0.75 * SCALE * (c - u), outside_it
            )

        return predict

    assert_near(drawn(full, blend), by_hand(full, formula))
    assert min(inside) > 0.3 and min(outside) > 0.3


@pytest.mark.parametrize("recentre, patch", [(0.0, 2), (0.3, 3)])
def test_similarity_weighs_each_patch_by_how_little_it_is_like_the_base(full, recentre, patch):
    """With patches that do not fit into the latents, too."""

    def formula(prompt):
        models = (full.base, full.early, full.late)
        halves = [plain(model, p) for p in ("", prompt) for model in models]

        def predict(z, t, step):
            bu, eu, lu, b, e, late = (half(z, t) for half in halves)
            c, u = torch.empty_like(z), torch.empty_like(z)
            for top in range(0, z.shape[2], patch):
                for left in range(0, z.shape[3], patch):
                    at = (..., slice(top, top + patch), slice(left, left + patch))
                    like = torch.stack(
                        [
                            torch.cosine_similarity(x[at].flatten(), b[at].flatten(), 0)
                            for x in (e, late)
                        ]
                    )
                    of_early, of_late = torch.softmax(-like / 0.2, 0)
                    c[at] = of_early * e[at] + of_late * late[at]
                    mixed = of_early * eu[at] + of_late * lu[at]
                    u[at] = recentre * bu[at] + (1 - recentre) * mixed
            return u + SCALE * (c - u)

        return predict

    assert_near(drawn(full, Similarity(patch, 0.2, recentre)), by_hand(full, formula))


# --------------------------------------------------------------------------------------- their ends
@pytest.mark.parametrize(
    "blend",
    [
        Personalization(0.3, "early"),
        Autoguidance(3.0),
        Reward(2.0, "early"),
        Similarity(recentre=0.0),
    ],
)
def test_a_blend_of_two_equal_snapshots_is_that_snapshot(full, blend):
    alone = Models(full.late, full.late, full.base)
    assert_near(drawn(alone, blend), drawn(full, Late()))


@pytest.mark.heavy
def test_at_their_ends_they_are_one_model_alone(pair):
    late = drawn(pair, Late())
    assert_near(drawn(pair, Personalization(1.0)), late)
    assert_near(drawn(pair, Autoguidance(1.0)), late)
    of_class = [(OF_CLASS[p], seed) for p, seed in zip(PROMPTS, (3, 8))]
    assert_near(drawn(pair, Masked(share=0.0)), drawn(pair, Late(), pairs=of_class))
    base = Models(the_base(pair), the_base(pair), pair.base)
    assert_near(drawn(pair, Reward(0.0)), drawn(base, Late(), pairs=of_class))
    assert_near(drawn(pair, Reward(0.0, "early")), drawn(pair, Early()))


def test_without_the_identifier_in_the_prompt_masked_is_the_late_snapshot(full):
    pairs = [("a red ball on the beach", 1), ("of the", 2)]
    assert_near(drawn(full, Masked(), pairs=pairs), drawn(full, Late(), pairs=pairs))


# ----------------------------------------------------------------------------------- what they cost
@pytest.mark.parametrize(
    "blend",
    [
        *(Early(), Late(), Switch(0.5), Merge(), Score(), Region(), Personalization()),
        *(CAG(window=(0.25, 0.75), repeats=2), CAG(strength=0), Autoguidance(), Reward()),
        *(Reward(start="early"), Masked(start=0.25)),
        *(Similarity(recentre=share) for share in (0.0, 0.5, 1.0)),
    ],
    ids=lambda blend: blend.name,
)
def test_a_blend_takes_the_passes_that_it_says(lora, blend):
    """Both snapshots and the base share the denoiser that counts."""
    batch, rows = batch_of(lora, steps=12), []
    hook = lora.base.denoiser.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        blend.draw(batch)
    finally:
        hook.remove()
    assert sum(rows) / len(batch.prompts) / batch.calls == pytest.approx(blend.passes)


def test_only_a_blend_that_wants_the_base_brings_it_beside_a_full_pair(tiny_base):
    models = full_pair(load_backbone(str(tiny_base)))
    expected = drawn(models, Reward())
    models = full_pair(load_backbone(str(tiny_base)))
    models.to("cpu", torch.bfloat16)
    for blend in (Region(), Personalization(), Autoguidance(), Masked(), Reward(start="early")):
        drawn(models, blend)
        assert models.base.denoiser.dtype == torch.float32
    found = drawn(models, Reward())
    assert models.base.denoiser.dtype == torch.bfloat16
    assert (found - expected).abs().mean() < 0.1 * expected.abs().mean()
    models.to("cpu", torch.float32)
    drawn(models, Reward()), drawn(models, Personalization())  # all are of one dtype again


def test_the_base_takes_turns_with_the_snapshots(tiny_base):
    models = full_pair(load_backbone(str(tiny_base)))
    blends = (Reward(), Similarity(), Personalization())
    expected = [drawn(models, blend) for blend in blends]
    models, turns = full_pair(load_backbone(str(tiny_base))), Turns(torch.device("cpu"))
    for model in (models.early, models.late):
        place(model, "cpu", turns=turns)
    for blend, latents in zip(blends, expected):
        assert torch.equal(drawn(models, blend), latents)
    assert models.base.denoiser._hf_hook is turns


# ----------------------------------------------------------------------------------------- settings
def test_personalization_says_where_there_is_no_guidance_to_change(lora):
    for scale in (0.0, 1.0):
        with pytest.raises(InputError, match=f"guidance_scale is {scale}.*another blend"):
            drawn(lora, Personalization(), scale=scale)
    distilled = Models(lora.early, lora.late.bind(lora.late.adapters or {}), lora.base)
    distilled.late.distilled = True
    with pytest.raises(InputError, match="is distilled.*another blend"):
        drawn(distilled, Personalization())


@pytest.mark.parametrize("blend", [Autoguidance(), Reward(), Masked(), Similarity()])
def test_without_guidance_the_others_mix_the_prompts_own_predictions(lora, blend):
    batch = batch_of(lora, scale=1.0)
    rows: list[int] = []
    hook = lora.base.denoiser.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        latents = blend.draw(batch).latents
    finally:
        hook.remove()
    assert latents.isfinite().all() and set(rows) == {2}  # no empty prompts
    assert_apart(latents, drawn(lora, blend))


def test_the_class_prompt_is_the_prompt_without_the_identifier(lora):
    batch: Batch = batch_of(lora).of_class
    assert batch.prompts == list(OF_CLASS.values())
    for prompt, subject in zip(batch.prompts, batch.subject):
        words = [span.word for span in lora.late.spans(prompt)]
        assert [word for word, is_it in zip(words, subject) if is_it] == ["mug"]
