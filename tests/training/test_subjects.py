"""Several subjects in one run, from folders of kohya's names: how they are read, drawn, told and
recorded, and which one is drawn afterwards.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import fit

from dreamblend.blending.module import Blender
from dreamblend.errors import InputError
from dreamblend.evaluation.blended import photos_of
from dreamblend.storage import snapshots
from dreamblend.training.data import Draws, SubjectData
from dreamblend.tuning import LoRA, TextualInversion

NAMES = {"3_sks mug": 2, "1_zwx robot toy": 1, "1_sks mug": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two folders of a mug and one of a robot. Not to be changed."""
    root = tmp_path_factory.mktemp("photos")
    for name, count in NAMES.items():
        (root / name).mkdir()
        for i in range(count):
            Image.new("RGB", (64, 64), (90 * i, 40, 20)).save(root / name / f"{i}.png")
    (root / "1_zwx robot toy/0.txt").write_text("a {identifier} {class_noun}, on grass")
    (root / "notes").mkdir()
    return root


def test_folders_say_repeats_identifier_and_class_noun(root):
    data = SubjectData(root)
    data.check()
    assert [(f.path.name, f.repeats, f.identifier, f.class_noun) for f in data.folders] == [
        ("1_sks mug", 1, "sks", "mug"),
        ("1_zwx robot toy", 1, "zwx", "robot toy"),
        ("3_sks mug", 3, "sks", "mug"),
    ]
    assert (data.identifier, data.class_noun, data.instance_prompt) == ("sks", "mug", "a sks mug")
    assert data.prompts == ["a sks mug", "a zwx robot toy, on grass", "a sks mug", "a sks mug"]
    assert [p.parent.name for p in data.subject_photos] == ["1_sks mug", *["3_sks mug"] * 2]
    other = SubjectData(root, identifier="zwx")
    assert (other.class_noun, len(other.subject_photos)) == ("robot toy", 1)
    assert SubjectData(root, "robot toy").identifier == "zwx"


@pytest.mark.parametrize("world", [1, 3])
def test_a_photo_is_drawn_as_often_as_its_folder_says(world):
    draws = [Draws(3, 2, 2, False, 0, r, world, repeats=[3, 1, 1]) for r in range(world)]
    seen = [
        index
        for step in islice(zip(*draws), 30)
        for draw in step
        for index in draw["index"][:2].tolist()
    ]
    assert all(Counter(seen[k : k + 5]) == {0: 3, 1: 1, 2: 1} for k in range(0, len(seen), 5))
    one = Draws(3, 2, 2 * world, False, 0, repeats=[3, 1, 1])
    assert seen == [i for d in islice(one, 30) for i in d["index"][: 2 * world].tolist()]


@pytest.mark.parametrize(
    "settings, made, say",
    [
        ({}, ["sks mug"], "photo folder .*sks mug does not say how often.*10_sks dog"),
        ({}, ["10_sks"], "10_sks does not say"),
        ({}, ["0_sks mug"], "0_sks mug does not say"),
        ({}, ["1_sks mug", "."], "holds photos beside the folder '1_sks mug'"),
        ({"identifier": "xyz"}, ["1_sks mug"], "say 'xyz', and the folders .* have 'sks mug'"),
        ({"class_noun": "cat"}, ["1_sks mug"], "say 'cat', and the folders"),
        ({}, ["."], "data.class_noun is not given"),
    ],
)
def test_folders_that_do_not_say_their_subject_are_refused(tmp_path, settings, made, say):
    for name in made:
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name / "0.png")
    with pytest.raises(InputError, match=say):
        SubjectData(tmp_path, **settings).check()


def test_a_word_that_is_learned_is_one_subject(root, tiny_base, tmp_path):
    with pytest.raises(InputError, match="learns one word, and .* has several subjects"):
        fit(tiny_base, root, tmp_path, TextualInversion(), steps=[1], data={"class_noun": None})


def test_a_run_of_several_subjects_draws_each(root, tiny_base, tmp_path):
    """Its class images are of each class, and a blend of either subject is scored by its photos."""
    data = {"class_images_dir": tmp_path / "prior", "num_class_images": 2, "identifier": "zwx"}
    module = fit(
        tiny_base,
        root,
        tmp_path / "run",
        LoRA(rank=2),
        steps=[1, 2],
        data={"class_noun": None, "batch_size": 2, **data},
    )
    assert {p.name for p in (tmp_path / "prior").iterdir()} == {"mug", "robot toy"}
    assert len(module.latents[True]) == 4
    told = [module.data.told(draw)["prompts"][2:] for draw in islice(Draws(4, 4, 2, False, 0), 4)]
    assert Counter(sum(told, [])) == {"a mug": 4, "a robot toy": 4}

    about = snapshots.read(snapshots.find(tmp_path / "run")[0][1]).about
    assert (about.identifier, about.class_noun) == ("zwx", "robot toy")
    assert about.settings["class_prompt"] == "a mug, a robot toy"
    assert about.settings["subjects"][0]["folders"] == ["1_sks mug", "3_sks mug"]
    assert [p.parent.name for p in photos_of(about)] == ["1_zwx robot toy"]
    assert len(photos_of(about, "sks", "mug")) == 3 and photos_of(about, "sks", "cat") is None

    def words(**named) -> tuple[str, str]:
        blender = Blender("1", "2", run=tmp_path / "run", **named)
        return blender.identifier, blender.class_noun

    assert words() == words(class_noun="robot toy") == ("zwx", "robot toy")
    assert words(identifier="sks") == words(class_noun="mug") == ("sks", "mug")
    assert words(identifier="abc") == ("abc", "robot toy")
