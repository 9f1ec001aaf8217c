"""What every family promises, on tiny random models in its real layout: plain diffusers says what
is right.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import diffusers
import pytest
import torch
from families import CALL, FAMILIES, save_family

from dreamblend.attention import record
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import (
    CAG,
    Autoguidance,
    Early,
    Late,
    Masked,
    Personalization,
    Region,
    Reward,
    Similarity,
)
from dreamblend.blending.models import Models
from dreamblend.errors import InputError
from dreamblend.models import Backbone, load_backbone
from dreamblend.sampling import initial_noise
from dreamblend.storage import snapshots
from dreamblend.training.objective import add_noise
from dreamblend.tuning import Full, LoRA, restore

NAMES = tuple(FAMILIES)
PROMPTS = ["a photo of sks dog in the snow", "a red house"]
SEEDS = [3, 8]
SIZES = [(64, 64), (96, 64)]  # height, width
EXACT = dict(atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return functools.partial(lambda name: save_family(name, root))


VARIANTS = ("flux_schnell", "klein", "z_image_turbo")  # of families that are there


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[pytest.mark.heavy] * (n in VARIANTS)) for n in NAMES],
)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name, folder) -> Backbone:
    return load_backbone(str(folder(name)))


@pytest.fixture(scope="module")
def pipe(name, folder):
    """The same base in plain diffusers."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain(pipe, name, prompts, seeds, size, guidance_scale, steps=2) -> torch.Tensor:
    """Images (batch, 3, height, width) in [0, 1], as the pipeline itself draws them."""
    call = {"guidance_scale": guidance_scale, **CALL.get(name, {})}
    if name == "qwen_image":
        call = {"true_cfg_scale": guidance_scale, "negative_prompt": [""] * len(prompts)}
    return pipe(
        prompt=list(prompts),
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        **call,
    ).images


def scale_of(name: str) -> float:
    return CALL.get(name, {}).get("guidance_scale", 4.0)


def batch_of(models, name, pairs=tuple(zip(PROMPTS, SEEDS)), size=SIZES[0], steps=2) -> Batch:
    return Batch.of(models, list(pairs), "sks", "dog", steps, scale_of(name), size=size)


@torch.no_grad()
def images(model: Backbone, latents: torch.Tensor) -> torch.Tensor:
    return (model.decode(latents) / 2 + 0.5).clamp(0, 1)


def changed(model: Backbone, seed: int, amount: float = 0.1) -> Backbone:
    """The model with noise on its denoiser's weights, in place of training."""
    denoiser, source = copy.deepcopy(model.denoiser), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(amount * p.std(correction=0) * torch.randn(p.shape, generator=source))
    return model.replaced(**{model.denoiser_name: denoiser})


@pytest.fixture(scope="module")
def pair(model) -> Models:
    return Models(changed(model, 1), changed(model, 2), model)


# ------------------------------------------------------------------------------------------ drawing
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.holds("load", "equals pipeline")
def test_a_snapshot_alone_draws_what_its_pipeline_draws(model, pipe, name, size):
    expected = plain(pipe, name, PROMPTS, SEEDS, size, scale_of(name))
    models = Models(model, model, model)
    for blend in (Early(), Late()):
        found = blend.draw(batch_of(models, name, size=size))
        torch.testing.assert_close(images(model, found.latents), expected, **EXACT)


def test_an_image_is_the_same_alone_and_in_a_batch(model, name):
    models = Models(model, model, model)
    together = Late().draw(batch_of(models, name))
    for i, one in enumerate(zip(PROMPTS, SEEDS)):
        alone = Late().draw(batch_of(models, name, [one]))
        # as a share of the largest: PixArt's are a thousand, where a processor rounds by the batch
        largest = together.latents[i].abs().max()
        assert (alone.latents - together.latents[i]).abs().max() < 5e-6 * largest
        torch.testing.assert_close(alone.maps, together.maps[i : i + 1], **EXACT)


def test_guidance_of_one_is_the_prompts_own_prediction(model, pipe, name):
    if name in CALL or model.distilled:
        pytest.skip("the scale is an input of this model, or of no use to it")
    expected = plain(pipe, name, PROMPTS[:1], SEEDS[:1], SIZES[0], 1.0)
    batch = Batch.of(
        Models(model, model, model), [(PROMPTS[0], SEEDS[0])], "sks", "dog", 2, 1.0, size=SIZES[0]
    )
    found = images(model, Late().draw(batch).latents)
    torch.testing.assert_close(found, expected, **EXACT)


# -------------------------------------------------------------------------------------- its latents
def test_latents_come_back_as_pixels(model, pipe):
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, deviation = model.encode(pixels)
    channels, height, width = model.latent_shape
    factor = model.size // height
    assert mean.shape == deviation.shape == (2, channels, 64 // factor, 64 // factor)
    assert mean.isfinite().all() and (deviation >= 0).all()


# ---------------------------------------------------------------------------------------- its words
@pytest.mark.holds("maps")
def test_the_columns_of_a_word_are_those_of_its_tokens(model):
    for prompt, word in ((PROMPTS[0], "dog"), (PROMPTS[0], "snow"), (PROMPTS[1], "house")):
        (columns,) = [span.tokens for span in model.spans(prompt) if span.word == word]
        places, start = [model.offsets(prompt)[column] for column in columns], prompt.index(word)
        covered = {i for a, b in places for i in range(a, b) if not prompt[i].isspace()}
        assert covered == set(range(start, start + len(word)))


def test_the_identifier_and_what_a_prompt_is_about_are_words_and_the_rest_is_not(model):
    assert [span.word for span in model.spans(PROMPTS[0])] == ["sks", "dog", "snow"]
    assert model.dropped_words(PROMPTS[0]) == []


def test_words_beyond_the_end_are_dropped(model):
    long = "dog " * 1000 + "castle"
    assert model.dropped_words(long)[-1] == "castle"
    assert all(span.tokens[-1] < model.length for span in model.spans(long))


# ----------------------------------------------------------------------------------------- its maps
def noisy(model: Backbone, count: int = 2) -> torch.Tensor:
    channels, *_ = model.latent_shape
    return initial_noise((channels, *model.latent_size(*SIZES[1])), list(range(count)))


@torch.no_grad()
@pytest.mark.holds("maps")
def test_maps_are_shares_of_attention_of_the_image_grid(model):
    z, text = noisy(model), model.encode_prompts(PROMPTS)
    t = model.training_noise().timestep(torch.tensor(500))
    plain = model.denoise(z, t, text)
    sites = model.sites(None, z.shape[2:])
    with record(model.denoiser, sites) as maps:
        recorded = model.denoise(z, t, text)
    assert torch.equal(recorded, plain) and list(maps) == list(sites) != []
    everything = {name: replace(site, columns=slice(None)) for name, site in sites.items()}
    with record(model.denoiser, everything) as whole:
        model.denoise(z, t, text)
    joint = any(site.rows != slice(None) for site in sites.values())
    for name, site in sites.items():
        batch, _, queries, columns = maps[name].shape
        assert (batch, queries) == (2, site.height * site.width)
        assert columns >= max(span.tokens[-1] for p in PROMPTS for span in model.spans(p)) + 1
        shares = maps[name].sum(3)
        assert (shares < 1 + 1e-5).all() and (shares.min() < 1 - 1e-3) == joint
        # not renormalised over the text: with the image's own share a row is one
        torch.testing.assert_close(whole[name].sum(3), torch.ones_like(shares))
        assert torch.equal(whole[name][..., site.columns], maps[name])


def test_the_layers_that_are_named_are_read(model):
    """By their own name, by their block's, or by a pattern, in the order they run."""
    every = list(model.sites(model.default_grid(), None, ["*"]))
    block = every[-1].rpartition(".")[0]
    assert set(model.sites(model.default_grid())) <= set(every)
    assert list(model.sites(None, None, every[-1:])) == every[-1:]
    assert list(model.sites(None, None, [block])) == every[-1:]
    assert list(model.sites(None, None, [every[-1], every[0]])) == list(
        dict.fromkeys([every[0], every[-1]])
    )
    with pytest.raises(InputError, match=f"no attention layer 'nowhere'.*{every[-1]}"):
        model.sites(None, None, [every[0], "nowhere"])


@torch.no_grad()
@pytest.mark.parametrize("for_all", [True, False])
def test_sites_are_read_whichever_attention_backend_was_chosen(folder, for_all):
    """And it is chosen again afterwards."""
    model = load_backbone(str(folder("flux_dev")))
    z, text = noisy(model), model.encode_prompts(PROMPTS)
    site = first_site(model, z)
    t = model.training_noise().timestep(torch.tensor(500))
    with record(model.denoiser, site) as expected:
        model.denoise(z, t, text)
    processors = [getattr(m, "processor", None) for m in model.denoiser.modules()]
    chosen = None if for_all else "flex"
    with diffusers.attention_backend("flex" if for_all else "native"):
        if not for_all:
            model.denoiser.set_attention_backend("flex")
        with record(model.denoiser, site) as maps:
            model.denoise(z, t, text)
        for processor in filter(None, processors):
            assert processor._attention_backend == chosen
    torch.testing.assert_close(dict(maps), dict(expected), **EXACT)


@torch.no_grad()
def test_a_words_column_follows_its_embedding(model, name):
    """The scores of the other columns stay as they are: their ratios do, as all shares add up."""
    if name.startswith("z_image"):
        pytest.skip("its refiner mixes the text before the first block that sees the image")
    z, text = noisy(model, 1), model.encode_prompts(PROMPTS[:1])
    t = model.training_noise().timestep(torch.tensor(500))
    (column,) = [span.tokens for span in model.spans(PROMPTS[0]) if span.word == "dog"]
    first = first_site(model, z)
    moved = text.states.clone()
    moved[:, column[0]] += torch.randn(moved.shape[-1], generator=torch.Generator().manual_seed(0))
    scores = []
    for states in (text.states, moved):
        with record(model.denoiser, first) as maps:
            model.denoise(z, t, type(text)(states, text.extras))
        (found,) = maps.values()
        scores.append(found.double().log())
    ratio = scores[1] - scores[0]
    ratio = (
        ratio - ratio.nanmedian(3, keepdim=True).values
    )  # what the sum of the shares has changed
    moves = ratio.nan_to_num().abs().amax((0, 1, 2))
    assert moves.argmax() == column[0] and moves.max() > 1e-5
    moves[column[0]] = 0
    assert moves.max() < 1e-2 * ratio.nan_to_num().abs().max()


def first_site(model: Backbone, z: torch.Tensor) -> dict:
    """The first attention layer that runs, whether it is read by default or not."""
    sites = model.sites(None, z.shape[2:])
    name, site = next(iter(sites.items()))
    if site.rows == slice(None):
        return {name: site}
    stem = name.split(".")[0].removeprefix("single_")
    return {f"{stem}.0.{name.split('.', 2)[2]}": site}


# --------------------------------------------------------------------------------------- its blends
@pytest.mark.holds("region")
def test_region_with_a_share_of_one_is_late_and_of_zero_is_early(pair, name):
    """Late's prompt, guided away from early's empty prompt where there is guidance."""
    batch = batch_of(pair, name, [("a sks dog", 3), (PROMPTS[0], 8)])
    guided = batch.late.predicts_twice(batch.guidance_scale)
    inside = Personalization(0.0, "early") if guided else Late()
    late, early = (blend.draw(batch).latents for blend in (inside, Early()))
    whole = Region(edge=1e-6, grow=8, weight=1.0, asked=1.0, margin=1.0)
    torch.testing.assert_close(whole.draw(batch).latents, late, **EXACT)
    none = Region(weight=0.0, asked=1.0)
    torch.testing.assert_close(none.draw(batch).latents, early, **EXACT)
    between = Region(edge=1.0, grow=0, weight=1.0, margin=1.0).draw(batch).latents
    for end in (early, late):
        assert (between - end).abs().max() > 1e-3


@pytest.mark.heavy
def test_the_published_samplers_draw_in_every_family(pair, model, name):
    """Where all three models are one, each is that model alone but for the class prompt."""
    batch = batch_of(pair, name, [("a sks dog", 3), (PROMPTS[1], 8)])
    late = Late().draw(batch).latents
    same = replace(batch, models=Models(pair.late, pair.late, pair.late))
    kinds = [Autoguidance(), Reward(start="early"), Masked(), Similarity()]
    if model.predicts_twice(batch.guidance_scale):
        kinds.append(Personalization(1.0))
    else:
        with pytest.raises(InputError, match="(distilled|guidance_scale is 0.0).*another blend"):
            Personalization().draw(batch)
    for blend in kinds:
        found = blend.draw(same).latents
        torch.testing.assert_close(found[1:], late[1:], **EXACT)
        assert found.isfinite().all()


@pytest.mark.holds("CAG")
def test_a_guidance_step_lowers_the_distance(pair, name):
    """The second of two steps at the same latents begins nearer to the reference."""
    batch = batch_of(pair, name)
    once, again = (CAG(0.3, (0.0, 0.5), repeats).draw(batch) for repeats in (1, 2))
    assert (again.distance < once.distance).all() and (once.distance > 0).all()
    assert again.latents.isfinite().all() and not torch.equal(again.latents, once.latents)


# ------------------------------------------------------------------------------ training, snapshots
@torch.no_grad()
def predicted(model: Backbone) -> torch.Tensor:
    t = model.training_noise().timestep(torch.tensor([500, 500]))
    return model.denoise(noisy(model), t, model.encode_prompts(PROMPTS))


def tuned(model: Backbone, method) -> Backbone:
    """The model after a step of training with large weights."""
    other = model.replaced(**{n: copy.deepcopy(m) for n, m in model.parts().items()})
    method.attach(other, "sks", "dog")
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in method.parameters(other):
            p.add_(0.1 * torch.randn(p.shape, generator=source))
    return other


def written(tmp_path, model: Backbone, method) -> snapshots.Snapshot:
    about = snapshots.About(
        1, method.name, "base", model.fingerprint(), "sks", "dog", "fp32", 0, settings={}
    )
    return snapshots.read(snapshots.write(tmp_path, about, method.export(model)))


METHODS = {
    "full": lambda text: Full(text_encoder=text),
    "lora": lambda text: LoRA(rank=2, alpha=6, text_encoder=text),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.holds("snapshot in diffusers")
def test_a_snapshot_gives_back_what_was_trained_and_opens_in_diffusers(
    model, name, folder, method, tmp_path
):
    how = METHODS[method](bool(model.text_encoders))
    trained = tuned(model, how)
    wanted = predicted(trained)
    assert (wanted - predicted(model)).abs().max() > 1e-3
    snapshot = written(tmp_path, trained, how)
    back = restore(snapshot, load_backbone(str(folder(name))), "late")
    torch.testing.assert_close(predicted(back), wanted, **EXACT)

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder(name))
    if method == "lora" and not hasattr(pipe, "load_lora_weights"):
        return  # diffusers has no loader for PixArt's
    if method == "lora":
        pipe.load_lora_weights(snapshot.path)
    else:
        for part, module in model.parts().items():
            kind = type(module)
            setattr(pipe, part, kind.from_pretrained(snapshot.path, subfolder=part))
    there = type(model)(pipe, "there")
    torch.testing.assert_close(predicted(there), wanted, **EXACT)


def test_a_lora_pair_shares_one_base_and_switches(model, name, folder, tmp_path):
    base, views = load_backbone(str(folder(name))), {}
    plain = predicted(base)
    for which, seed in (("early", 1), ("late", 2)):
        how = LoRA(rank=2)
        snapshot = written(tmp_path / which, tuned_with(model, how, seed), how)
        views[which] = restore(snapshot, base, which)
    assert views["early"].denoiser is views["late"].denoiser is base.denoiser
    early, late = predicted(views["early"]), predicted(views["late"])
    assert (early - late).abs().max() > 1e-3
    torch.testing.assert_close(predicted(base.bare()), plain, **EXACT)
    assert torch.equal(predicted(views["early"]), early)


def tuned_with(model: Backbone, method, seed: int) -> Backbone:
    other = tuned(model, method)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in method.parameters(other):
            p.add_(0.1 * torch.randn(p.shape, generator=source))
    return other


def test_adding_noise_and_its_target_are_consistent(model):
    """At each level the clean image follows from the noisy one and what is to be predicted."""
    noise = model.training_noise()
    assert len(noise) == 1000 and (noise.sigma.diff() > 0).all()
    index = torch.tensor([3, 500, 999])
    z = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    eps = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    alpha, sigma = noise.alpha[index], noise.sigma[index]
    mixed = add_noise(z, eps, alpha, sigma)
    if noise.prediction == "flow_prediction":
        torch.testing.assert_close(mixed - sigma.view(-1, 1, 1, 1) * (eps - z), z)
        torch.testing.assert_close(noise.timestep(index) / 1000, sigma, atol=1e-3, rtol=0)


def test_too_few_steps_for_a_scheduler_are_refused(folder):
    """One step cannot be stretched to the last level that Qwen-Image's scheduler ends at."""
    model = load_backbone(str(folder("qwen_image")))
    with pytest.raises(InputError, match="num_inference_steps is 1, .* needs at least 2"):
        model.schedule(1)
    assert len(model.schedule(2).timesteps) == 2
