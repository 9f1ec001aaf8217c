"""The world: deterministic scenes whose things have parts that can be lost, and captions that say
what is drawn.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from dreamblend.sandbox import world
from dreamblend.sandbox.drawing import LABELS


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


def test_a_crowded_scene_is_mostly_things():
    rng = Random(5)
    covered = [
        world.render(make(rng))[1].any(0).mean()
        for make in (world.random_scene, world.crowded_scene)
        for _ in range(30)
    ]
    assert np.mean(covered[30:]) > 0.45 > 0.3 > np.mean(covered[:30])


def test_the_world_is_as_rich_as_it_should_be():
    assert len(world.NOUNS) >= 10 and len(world.COLOURS) >= 8
    assert len(world.PLACES) >= 12 and len(world.SUBJECTS) >= 12
    assert all(world.STANDING_OUT[noun] for noun in world.NOUNS)
    assert all(4 <= len(world.photos(name)) <= 6 for name in world.SUBJECTS)


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
