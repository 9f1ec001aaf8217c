"""The sandbox: a deterministic world, a recipe that continues exactly, and shipped weights that are
true enough to show the effects.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPTokenizer

from dreamblend.models import SANDBOX
from dreamblend.sandbox import world
from dreamblend.sandbox.judges import claims, load_judges
from dreamblend.sandbox.making import check, fitting


def test_a_scene_is_a_function_of_its_seed():
    def draw(seed):
        return np.asarray(world.render(world.random_scene(Random(seed)))[0])

    assert (draw(5) == draw(5)).all() and (draw(5) != draw(6)).any()


def test_masks_cover_the_things_and_do_not_meet_much():
    rng = Random(3)
    for _ in range(50):
        scene = world.random_scene(rng, things=2)
        masks = world.render(scene)[1]
        assert masks.shape == (2, 64, 64) and all(m.mean() > 0.02 for m in masks)
        assert (masks[0] & masks[1]).sum() < 0.15 * min(m.sum() for m in masks)


def test_a_crowded_scene_is_mostly_things():
    rng = Random(5)
    covered = [
        world.render(make(rng))[1].any(0).mean()
        for make in (world.random_scene, world.crowded_scene)
        for _ in range(30)
    ]
    assert np.mean(covered[30:]) > 0.45 > 0.3 > np.mean(covered[:30])


def test_the_world_is_as_rich_as_it_should_be():
    assert (
        len(world.NOUNS) >= 10
        and len(world.COLOURS) >= 8
        and len(world.PLACES) >= 12
        and len(world.SUBJECTS) >= 12
    )
    assert all(4 <= len(world.photos(name)) <= 6 for name in world.SUBJECTS)


def test_each_word_of_a_caption_belongs_to_what_it_names():
    rng = Random(4)
    for _ in range(100):
        scene = world.random_scene(rng)
        captioned = world.caption(rng, scene)
        words = captioned.text.split()
        assert len(words) == len(captioned.owners)
        for word, owner in zip(words, captioned.owners):
            if word in world.SHAPES:
                assert scene.things[owner].look.noun == word
            if word in world.COLOURS:
                assert scene.things[owner].look.colour == word


def test_the_tokenizer_is_a_real_bpe_with_rare_identifiers():
    tokenizer = CLIPTokenizer.from_pretrained(SANDBOX / "tokenizer")

    def count(word):
        return len(tokenizer(word, add_special_tokens=False).input_ids)

    assert all(count(identifier) == 1 for identifier in world.IDENTIFIERS)
    assert sum(count(noun) > 1 for noun in world.NOUNS) >= 3
    text = "a zany sks Éclair-robot 🎈 wearing a hat"
    assert (
        tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).split()
        == "a zany sks éclair - robot 🎈 wearing a hat".split()
    )


def test_a_claim_is_set_against_every_alternative():
    found = {kind: texts for kind, texts in claims("a red mug next to a ball in the snow")}
    assert set(found) == {"colour", "noun", "place"}
    assert all(
        texts[0] == "a red mug next to a ball in the snow" and len(set(texts)) == len(texts)
        for texts in found.values()
    )
    assert (
        len(found["place"]) == len(world.PLACES)
        and "a red mug next to a ball on the moon" in found["place"]
    )


def test_an_interrupted_stage_continues_to_the_same_weights(tmp_path):
    def run(scratch: Path, stop_at: int | None = None) -> dict:
        torch.manual_seed(0)
        model = nn.Linear(4, 4)

        def loss(step: int, rng: Random, generator: torch.Generator) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            return (model(torch.randn(8, 4, generator=generator)) - rng.random()).square().mean()

        fitting.fit("stage", model, loss, 510, 1e-2, scratch, "cpu")
        return {k: v.clone() for k, v in model.state_dict().items()}

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_at=300)
    parts = run(tmp_path / "parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_shipped_weights_are_safetensors_of_at_most_40_megabytes():
    files = [p for p in SANDBOX.parent.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json"}
    assert sum(p.stat().st_size for p in files) <= 40e6


@pytest.mark.heavy
def test_the_sandbox_is_true_enough_to_show_the_effects():
    """An eighth of `python -m dreamblend.sandbox check`, so the bounds have room for chance."""
    measured = check.check(prompts=24, renders=200)
    for name, (bound, lower) in check.BOUNDS.items():
        assert (measured[name] > bound - 0.1) if lower else (measured[name] < bound + 0.1), (
            name,
            measured[name],
        )


def test_the_subject_judge_knows_an_instance_from_its_kin():
    _, judge = load_judges()

    def views(looks, seed):
        return judge(
            check.to_pixels(
                [
                    world.render(
                        world.Scene(
                            (world.pose(rng, look),), rng.choice(world.PLACES), rng.getrandbits(32)
                        )
                    )[0]
                    for rng in [Random(seed)]
                    for look in looks
                ]
            )
        )

    for name in ("teal_mug", "navy_cat"):
        look = world.SUBJECTS[name]
        kin = [world.random_look(Random(i), look.noun) for i in range(12)]
        own = judge(check.to_pixels(world.photos(name)))
        assert (views([look] * 12, 1) @ own.T).mean() > (views(kin, 2) @ own.T).mean() + 0.4
