"""The coming sandbox: a deterministic world whose parts can be lost, and captions that say what is
drawn.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from dreamblend.models import load_backbone
from dreamblend.sandbox.v2 import world
from dreamblend.sandbox.v2.drawing import LABELS
from dreamblend.sandbox.v2.judges import PARTS, PartsJudge, claims
from dreamblend.sandbox.v2.making import autoencoder, base, data, dit
from dreamblend.sandbox.v2.making.fitting import Run


def test_a_scene_is_a_function_of_its_seed():
    def draw(seed):
        return np.asarray(world.render(world.random_scene(Random(seed)))[0])

    assert draw(5).shape == (128, 128, 3)
    assert (draw(5) == draw(5)).all() and (draw(5) != draw(6)).any()


def test_masks_cover_the_things_and_do_not_meet_much():
    rng = Random(3)
    for _ in range(50):
        masks = world.render(world.random_scene(rng, things=2, extras=False))[1]
        assert masks.shape == (2, 128, 128) and all(m.mean() > 0.02 for m in masks)
        assert (masks[0] & masks[1]).sum() < 0.15 * min(m.sum() for m in masks)


def test_labels_say_what_each_pixel_shows():
    rng = Random(8)
    for _ in range(20):
        scene = world.random_scene(rng)
        drawn = world.draw(scene)
        nouns = {thing.look.noun for thing in scene.things}
        shown = {LABELS[i] for i in np.unique(drawn.labels)}
        assert {of[0] for of in shown if isinstance(of, tuple)} == nouns
        assert ((drawn.labels > 0) == drawn.masks.any(0)).mean() > 0.97


@pytest.mark.parametrize("noun", world.NOUNS)
def test_a_lost_part_changes_the_picture_where_it_was_and_nowhere_else(noun):
    look = world.random_look(Random(1), noun)
    thing = world.pose(Random(2), look)
    whole = world.draw(world.Scene((thing,), "in a meadow", 1))
    for part in world.STANDING_OUT[noun]:
        lacking = replace(thing, look=replace(look, lacks=frozenset([part])))
        less = world.draw(world.Scene((lacking,), "in a meadow", 1))
        was = whole.labels == LABELS.index((noun, part))
        changed = (np.asarray(whole.image) != np.asarray(less.image)).any(-1)
        assert was.sum() > 20 and changed[was].mean() > 0.5
        assert whole.masks.sum() - less.masks.sum() > 20  # it stands out
        assert not (less.labels == LABELS.index((noun, part))).any()


def test_each_word_of_a_caption_belongs_to_what_it_names():
    rng = Random(4)
    for _ in range(200):
        scene = world.random_scene(rng)
        captioned = world.caption(rng, scene)
        words = captioned.text.split()
        assert len(words) == len(captioned.owners)
        for word, owner in zip(words, captioned.owners):
            extras = owner is not None and [scene.things[owner].wears, scene.things[owner].holds]
            named = [extra for extra in extras or () if extra]
            if word in world.SHAPES:
                assert scene.things[owner].look.noun == word
            if word in world.COLOURS:
                assert word in [scene.things[owner].look.colour, *(e.colour for e in named)]
            if word in (*world.WEARABLES, *world.HOLDABLES):
                assert word in [e.name for e in named]
        for side, left in (("left of", True), ("right of", False)):
            if side in captioned.text:
                assert (scene.things[0].x < scene.things[1].x) == left


def test_a_claim_is_set_against_every_alternative():
    prompt = "a red mug wearing a blue hat left of a ball in the snow"
    kinds = [kind for kind, _ in claims(prompt)]
    assert kinds == ["colour", "noun", "colour", "wears", "side", "noun", "place"]
    assert all(texts[0] == prompt and len(set(texts)) == len(texts) for _, texts in claims(prompt))
    assert [kind for kind, _ in claims("a mug upside down")] == ["noun", "view"]


def test_the_parts_judge_answers_for_the_parts_of_one_class():
    judge = PartsJudge()
    pixels = torch.randn(2, 3, 128, 128)
    found = judge.parts(pixels, "robot")
    assert found.shape == (2, len(world.STANDING_OUT["robot"])) and len(PARTS) > 15
    squares = judge(pixels)[0, [p[0] == "robot" for p in PARTS]]
    assert torch.equal(found[0], squares.amax((1, 2)).sigmoid())


def test_normal_latents_are_decoded_as_before():
    vae, x = autoencoder.make_autoencoder(), torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        picture = vae.decode(before.mean).sample
        mean, std = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
        autoencoder.normalise(vae, mean, std)
        after = vae.encode(x).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(8), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(8), atol=1e-4)
        assert torch.allclose(after.std * std[:, None, None], before.std, rtol=1e-4)
        assert torch.allclose(vae.decode(after.mean).sample, picture, atol=1e-4)


def test_both_bases_are_folders_that_diffusers_draws_from(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_SHARD", 32)
    monkeypatch.setattr(data, "_CHUNK", 16)
    run = Run(tmp_path, "cpu")
    vae = autoencoder.make_autoencoder()
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    tokenizer = data.make_tokenizer()
    nouns = [len(tokenizer(n, add_special_tokens=False).input_ids) for n in world.NOUNS]
    assert sum(n > 1 for n in nouns) >= 3
    scenes = data.load_scenes(32, vae, tokenizer, run)
    again = data.load_scenes(32, vae, tokenizer, run)
    assert torch.equal(scenes.latents, again.latents) and scenes.latents.shape == (32, 8, 16, 16)
    assert len(scenes.labels.unique()) > 10
    monkeypatch.setattr(base, "BATCH", 2)
    monkeypatch.setattr(dit, "BATCH", 2)
    base.fit_base(1, scenes, vae, tokenizer, tmp_path / "base", run)
    dit.fit_dit(1, scenes, vae.float(), tokenizer, tmp_path / "dit", run)
    assert load_backbone(str(tmp_path / "base")).latent_shape == (8, 16, 16)
    second = load_backbone(str(tmp_path / "dit"))
    assert second.latent_shape == (8, 16, 16) and second.length == 2 * data.LENGTH
    assert second.untrainable is None and second.predicts_twice(4.0)
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "dit", torch_dtype=torch.float32)
    drawn = pipe("a mug", num_inference_steps=1, max_sequence_length=data.LENGTH, output_type="pt")
    assert drawn.images.shape == (1, 3, 128, 128)


def test_the_joint_base_is_trained_as_its_pipeline_draws(tmp_path):
    """One step of the pipeline from noise to picture follows the velocity that training fits."""
    clip, t5 = data.make_tokenizer(), dit.make_t5_tokenizer()
    fitted = dit.Dit(clip, t5, 8).requires_grad_(False).eval()
    for p in fitted.parameters():
        p.copy_(torch.randn_like(p) * 0.1)
    pipe = StableDiffusion3Pipeline(
        fitted.transformer,
        FlowMatchEulerDiscreteScheduler(shift=1.0),
        autoencoder.make_autoencoder(),
        *(fitted.clips[0], clip, fitted.clips[1], clip),
        *(fitted.t5, t5),
    )
    noise = torch.randn(1, 8, 16, 16)
    drawn = pipe(
        "a robot left of a mug",
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=noise,
        max_sequence_length=data.LENGTH,
        output_type="latent",
    ).images
    ids = [
        t("a robot left of a mug", padding="max_length", return_tensors="pt").input_ids
        for t in (clip, t5)
    ]
    velocity, read = fitted(noise, torch.ones(1), *ids)
    assert velocity.abs().mean() > 0.01 and read.shape == (1, len(LABELS), 16, 16)
    assert torch.allclose(drawn, noise - velocity, atol=1e-4)


def test_the_second_tokenizer_splits_what_is_rare_and_drops_nothing(tmp_path):
    tokenizer = dit.make_t5_tokenizer()
    text = "a sks robot Éclair holding a flag"
    assert tokenizer.tokenize("sks robot")[:1] == ["▁sks"]
    assert len(tokenizer.tokenize("robot")) == 2 and len(tokenizer.tokenize("mug")) == 1
    assert "holding a flag" in tokenizer.decode(tokenizer(text).input_ids)
