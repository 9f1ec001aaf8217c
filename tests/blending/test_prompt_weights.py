"""Weighted and long prompts: the states are compel's own, and every word keeps its place."""

from __future__ import annotations

import functools

import pytest
import torch
from compel import Compel, CompelForSDXL
from compel.embeddings_provider import ReturnedEmbeddingsType
from families import save_family
from test_blends import full_pair

from dreamblend.attention.words import subject_words, token_table
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import CAG, Late, Region
from dreamblend.blending.models import Models
from dreamblend.blending.options import Options
from dreamblend.blending.prompts import read_prompts
from dreamblend.errors import InputError
from dreamblend.models import Backbone, load_backbone
from dreamblend.tuning import TextualInversion

WEIGHTED = Options(prompt_weighting="compel")
PLAIN = "a photo of sks mug in the snow"
WEIGHTS = [
    "a (red)1.5 sks mug",
    "a red-- sks mug in (snow)0.4",
    "(sks mug)1.2 under a (house++)0.9",
]
# 100 words of a token each, and no two chunks alike
LONG = " ".join(["a photo of dog cat in on grass under red blue house with"] * 8)[: -len(" with")]
EXACT = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def load(tmp_path_factory, tiny_base):
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def read(name: str) -> Backbone:
        return load_backbone(str(tiny_base if name == "sd" else save_family(name, root)))

    def fresh(name: str, options: Options = WEIGHTED) -> Backbone:
        model = read(name).bind({})
        options.check(model, 4.0)
        options.apply(Models(model, model, model))
        return model

    return fresh


def own(model: Backbone, prompts: list[str]) -> torch.Tensor:
    """What compel makes of prompts over the modules of diffusers' own pipeline."""
    pipe = model.pipe
    if "text_encoder_2" in model.parts():
        return CompelForSDXL(pipe)(prompts).embeds
    kind = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
    compel = Compel(
        pipe.tokenizer,
        pipe.text_encoder,
        truncate_long_prompts=False,
        returned_embeddings_type=kind,
    )
    return compel(prompts)


# ------------------------------------------------------------------------------------------ states
@pytest.mark.parametrize("name", ["sd", "sdxl"])
@torch.no_grad()
def test_a_plain_prompt_has_the_states_that_it_has_without(load, name):
    with_it, without = (
        load(name, options).encode_prompts([PLAIN]) for options in (WEIGHTED, Options())
    )
    torch.testing.assert_close(with_it.states, without.states, **EXACT)
    for key, value in without.extras.items():
        torch.testing.assert_close(with_it.extras[key], value, **EXACT)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@torch.no_grad()
def test_states_are_compels_own(load, name):
    model = load(name)
    for prompts in ([PLAIN], WEIGHTS, [LONG, *WEIGHTS]):
        torch.testing.assert_close(
            model.encode_prompts(prompts).states, own(model, prompts), **EXACT
        )


@torch.no_grad()
def test_weights_act_on_layers_that_clip_skip_leaves(load):
    """A prompt without weights has the states of diffusers' clip_skip, the negative one all."""
    model, usual = load("sd"), load("sd", Options(clip_skip=1))
    model.clip_skip = 1
    torch.testing.assert_close(
        model.encode_prompts([PLAIN]).states, usual.encode_prompts([PLAIN]).states, **EXACT
    )
    torch.testing.assert_close(
        model.encode_negative([PLAIN]).states, usual.encode_negative([PLAIN]).states, **EXACT
    )
    weighted = model.encode_prompts([WEIGHTS[0]]).states
    assert not torch.allclose(weighted, model.encode_prompts(["a red sks mug"]).states, atol=1e-3)


# ------------------------------------------------------------------------------------------- words
@pytest.mark.parametrize("name", ["sd", "sdxl"])
@torch.no_grad()
def test_a_weighted_word_keeps_its_place_and_changes_its_states(load, name):
    model, usual = load(name), load(name, Options())
    weighted, bare = "a (red)1.5 sks mug++", "a red sks mug"
    assert model.spans(weighted) == usual.spans(bare)
    (red,) = [span for span in model.spans(weighted) if span.word == "red"]
    states = [usual.encode_prompts([bare]).states, model.encode_prompts([weighted]).states]
    changed = (states[0] - states[1]).abs().amax((0, 2)) > 1e-4
    mug = [column for span in model.spans(weighted) if span.word == "mug" for column in span.tokens]
    assert changed.nonzero().flatten().tolist() == [*red.tokens, *mug]
    subject = subject_words(model, [weighted], "sks", "mug", 5)
    assert subject.tolist() == [[False, True, True, False, False]]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@torch.no_grad()
def test_the_words_of_a_long_prompt_have_their_places_in_its_chunks(load, name):
    model, length = load(name), load(name).length
    spans = model.spans(f"{LONG} mug")
    last = spans[-1]
    assert last.word == "mug" and len(LONG.split()) >= 100
    assert not model.dropped_words(f"{LONG} mug") and load(name, Options()).dropped_words(LONG)
    columns = model.columns(f"{LONG} mug")
    assert columns % length == 0 and columns - length < last.tokens[0] < columns
    tokens = [column for span in spans for column in span.tokens]
    assert tokens == sorted(set(tokens))
    before, after = (model.encode_prompts([f"{LONG} {word}"]).states for word in ("mug", "dog"))
    changed = (before - after).abs().amax((0, 2)) > 1e-6
    assert changed.nonzero()[0].item() == last.tokens[0]
    positions, _ = token_table(model, [f"{LONG} mug"])
    assert last.tokens[-1] in positions


@torch.no_grad()
def test_parts_that_are_joined_follow_each_other(load):
    model, length = load("sd"), load("sd").length
    prompt = '("a red mug", "a (blue)1.3 house").and(1, 0.5)'
    words = {span.word: span.tokens[0] for span in model.spans(prompt)}
    assert words["red"] < words["mug"] < length < words["blue"] < words["house"]
    torch.testing.assert_close(model.encode_prompts([prompt]).states, own(model, [prompt]), **EXACT)


# ------------------------------------------------------------------------------------------ images
@torch.no_grad()
def images(model: Backbone, prompts: list[str], blend=Late(), **more) -> torch.Tensor:
    models = more.pop("models", None) or Models(model, model, model)
    pairs = [(prompt, 3) for prompt in prompts]
    batch = Batch.of(models, pairs, "sks", "mug", 2, 4.0, size=(model.size,) * 2, **more)
    return blend.draw(batch).latents


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_weight_changes_the_image_and_a_prompt_without_does_not(load, name):
    model, usual = load(name), load(name, Options())
    plain = images(usual, ["a red sks mug"])
    torch.testing.assert_close(images(model, ["a red sks mug"]), plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(images(model, ["a (red)1.8 sks mug"]), plain, atol=1e-3)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@torch.no_grad()
def test_the_shorter_of_prompt_and_negative_prompt_is_padded(load, name):
    """With the empty prompt, as compel does it; but SDXL's zeros for no prompt stay zeros."""
    model = load(name)
    batch = Batch.of(Models(model, model, model), [(PLAIN, 0)], "sks", "mug", 2, 4.0)
    batch.negative_prompt = LONG
    prompts, negative = batch.encode(model)
    expected = own(model, [PLAIN, LONG])
    torch.testing.assert_close(prompts.states, expected[:1], **EXACT)
    torch.testing.assert_close(negative.states, expected[1:], **EXACT)
    batch.negative_prompt, batch.prompts = None, [LONG]
    prompts, negative = batch.encode(model)
    assert prompts.states.shape == negative.states.shape
    if name == "sdxl":
        assert not negative.states.any()
    else:
        torch.testing.assert_close(negative.states, own(model, ["", LONG])[:1], **EXACT)


@pytest.mark.parametrize("blend", [Region(), CAG()], ids=lambda blend: blend.name)
def test_blends_draw_long_and_weighted_prompts(tiny_base, blend):
    models = full_pair(load_backbone(str(tiny_base)))
    WEIGHTED.apply(models)
    found = images(models.late, [f"{LONG} (mug)1.3"], blend, models=models)
    other = images(models.late, [f"{LONG} dog"], blend, models=models)
    assert found.isfinite().all() and not torch.allclose(found, other, atol=1e-4)


# ----------------------------------------------------------------------------------------- refused
def test_a_family_without_clip_and_a_learned_word_are_refused(load, tiny_base):
    with pytest.raises(InputError, match="prompt_weighting.*of another family"):
        load("sana")
    model = load_backbone(str(tiny_base))
    TextualInversion().attach(model, "sks", "mug")
    with pytest.raises(InputError, match="the word 'sks'"):
        WEIGHTED.check(model, 4.0)


def test_what_a_blend_cannot_read_is_refused():
    for prompt, said in (
        ('("a cat", "a dog").blend(1, 2)', "has no place"),
        ("a cat.swap(dog)", "has no place"),
        ("a cat withLora(name, 0.5)", "names a LoRA"),
        ("a cat <|endoftext|> dog", "the ends of a chunk"),
        ("()1.3", "weights no words"),
    ):
        with pytest.raises(InputError, match=said):
            read_prompts([prompt], "sks", "mug", "compel")
        with pytest.raises(InputError, match=said):
            Options(prompt_weighting="compel", negative_prompt=prompt)
    with pytest.raises(InputError, match="it is compel"):
        Options(prompt_weighting="a1111")


def test_only_the_syntax_of_other_tools_is_warned_of(recwarn):
    read_prompts(["a mug++ and a (red)1.3 house"], "sks", "mug", "compel")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="other tools"):
        read_prompts(["a (mug:1.3)"], "sks", "mug", "compel")
    with pytest.warns(UserWarning, match="other tools"):
        read_prompts(["a mug++"], "sks", "mug")
