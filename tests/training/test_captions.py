"""Captions beside photos: which are found, what of them is refused, how a draw varies them, and
that the denoiser is told them, in one process as in several.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from families import save_family, small_bases
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import command, fit, fit_words, step

from dreamblend.errors import InputError
from dreamblend.models import load_backbone
from dreamblend.storage import snapshots
from dreamblend.training.captions import shuffled
from dreamblend.training.data import Draws, SubjectData
from dreamblend.training.encoded import EncodedPrompts
from dreamblend.tuning import Full, LoRA
from train import main

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three plain photos in one folder."""
    (tmp_path / "mug").mkdir()
    for name in ("0.png", "1.jpg", "2.png"):
        Image.new("RGB", (64, 64), (90, 40, 20)).save(tmp_path / "mug" / name)
    return tmp_path / "mug"


def lines(folder: Path, *entries: dict | str) -> None:
    said = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "metadata.jsonl").write_text("\n".join(said))


# ------------------------------------------------------------------------------------------ finding
def test_captions_are_in_text_files_and_in_metadata_and_the_rest_has_the_prompt(folder):
    (folder / "0.txt").write_bytes("\ufeffa {identifier} {class_noun}\n on a table\n".encode())
    lines(folder, "", {"file_name": "1.jpg", "caption": "one sks mug, café", "other": 3})
    data = SubjectData(folder, "mug", prompt="my {identifier} {class_noun}")
    assert data.prompts == ["a sks mug on a table", "one sks mug, café", "my sks mug"]
    lines(folder, {"file_name": "1.jpg", "text": "{class_noun} of sks"})
    assert SubjectData(folder, "mug").prompts[1:] == ["mug of sks", "a sks mug"]
    assert SubjectData(folder, "mug", captions="none").prompts == ["a sks mug"] * 3


def test_what_is_found_is_said_in_one_line_and_recorded(folder, tiny_base, tmp_path, caplog):
    (folder / "0.txt").write_text("a {identifier} {class_noun} on a table")
    out = tmp_path / "run"
    with caplog.at_level("INFO"):
        assert command(main, *fit_words(tiny_base, folder, out))[0] == 0
    assert caplog.text.count("1 of 3 photos have a caption, from 1 .txt file (") == 1
    ((_, first), *_) = snapshots.find(out)
    digest = snapshots.read(first).about.settings["captions"]
    (folder / "0.txt").write_text("a {identifier} {class_noun} on a chair")
    status, _, said = command(
        main, *fit_words(tiny_base, folder, out, "--trainer.max_steps", 3, "--resume.every", 1)
    )
    assert status == 2 and f"captions {digest} and not" in said
    fit(tiny_base, folder, tmp_path / "plain", steps=[1], data={"captions": "none"})
    ((_, plain),) = snapshots.find(tmp_path / "plain")
    assert not {"captions", "caption_dropout", "shuffle_tags"} & {
        *snapshots.read(plain).about.settings
    }


@pytest.mark.parametrize(
    "name, content, say",
    [
        ("0.txt", b" \n", "0.txt has an empty caption for 0.png"),
        ("0.txt", b"caf\xe9", "0.txt are not UTF-8"),
        ("0.txt", b"a {subject}", "0.png in .*0.txt.*wrong placeholder.*{class_noun}"),
        ("metadata.jsonl", b"\xff", "metadata.jsonl are not UTF-8"),
        ("metadata.jsonl", b'{"file_name": "7.png", "text": "x"}', "line 1 .* is of 7.png, and no"),
        ("metadata.jsonl", b'{"file_name": "0.png"}', "line 1 .* not understood"),
        ("metadata.jsonl", b'{"file_name": "0.png", "text": 3}', "line 1 .* not understood"),
        ("metadata.jsonl", b'{"file_name": "0.png", "text": ""}', "empty caption.*its line"),
        ("metadata.jsonl", b"\n[1]", "line 2 .* not understood"),
        ("metadata.jsonl", b'{"file_name": "0.png", "text": "x"}\n' * 2, "line 2 .* second one"),
    ],
)
def test_captions_that_cannot_be_meant_are_one_sentence(folder, name, content, say):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=say):
        SubjectData(folder, "mug").check()


def test_two_captions_of_one_photo_are_refused(folder):
    (folder / "0.txt").write_text("a sks mug")
    lines(folder, {"file_name": "0.png", "text": "a sks mug"})
    with pytest.raises(
        InputError, match="metadata.jsonl and .*0.txt both have a caption for 0.png"
    ):
        SubjectData(folder, "mug").check()


@pytest.mark.parametrize(
    "settings, say",
    [
        ({"captions": "all"}, "data.captions is 'all': .* auto, none"),
        ({"caption_dropout": 1.0}, "data.caption_dropout is 1.0"),
        ({"caption_dropout": -0.1}, "data.caption_dropout is -0.1"),
        ({"prompt": "my {identifier}"}, "data.prompt 'my {identifier}' is for photos without"),
        ({"captions": "none", "shuffle_tags": True}, "shuffle_tags has nothing to shuffle"),
    ],
)
def test_settings_that_are_wrong_or_do_nothing_are_refused(folder, settings, say):
    for name in "012":
        (folder / f"{name}.txt").write_text("a sks mug, red, blue")
    SubjectData(folder, "mug").check()
    with pytest.raises(InputError, match=say):
        SubjectData(folder, "mug", **settings).check()


def test_captions_without_the_subject_and_texts_without_a_photo_are_told(folder):
    (folder / "0.txt").write_text("a sksish mug")
    (folder / "1.txt").write_text("a SKS mug")
    (folder / "o.txt").write_text("a sks mug")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            SubjectData(folder, "mug").check()
    lonely, nameless = sorted(str(w.message) for w in caught)
    nameless, lonely = sorted((lonely, nameless), key=lambda text: "is called" in text)
    assert "the captions of 0.png do not name the subject 'sks'" in nameless
    assert "no photo is called as o.txt" in lonely


# -------------------------------------------------------------------------------------------- draws
def told(data: SubjectData, draws: Draws, count: int) -> list[str]:
    return [prompt for draw in islice(draws, count) for prompt in data.told(draw)["prompts"]]


def test_each_photo_is_told_its_caption_and_each_class_image_the_class_prompt(folder):
    (folder / "1.txt").write_text("one sks mug")
    data = SubjectData(folder, "mug", class_images_dir=folder, num_class_images=5)
    for draw in islice(Draws(3, 5, 4, True, 0), 6):
        wanted = [data.prompts[i] for i in draw["index"][:4].tolist()] + ["a mug"] * 4
        assert data.told(draw)["prompts"] == wanted


def test_dropout_empties_its_share_of_the_photos_captions_alone(folder):
    prior = {"class_images_dir": folder, "num_class_images": 5}
    data = SubjectData(folder, "mug", caption_dropout=0.1, **prior)
    prompts = told(data, Draws(3, 5, 4, False, 0), 500)
    share = Counter(prompts)
    assert share["a mug"] == 2000 and abs(share[""] / 2000 - 0.1) < 0.02


def test_tags_are_shuffled_but_for_the_subjects(folder):
    orders = {shuffled("red, a sks mug , on grass,blue", "sks", Random(seed)) for seed in range(99)}
    assert len(orders) == 6 and all(order.startswith("a sks mug, ") for order in orders)
    assert {*map(len, orders)} == {len("a sks mug, red, on grass, blue")}


@pytest.mark.parametrize("batch_size, world", [(1, 4), (2, 2), (4, 1)])
def test_what_is_told_depends_only_on_seed_and_position(folder, batch_size, world):
    """Not on the number of processes, nor on where a run goes on."""
    for name in "012":
        (folder / f"{name}.txt").write_text(f"a sks mug, {name}, red, blue, green")
    data = SubjectData(folder, "mug", caption_dropout=0.3, shuffle_tags=True, seed=5)
    one = told(data, Draws(3, 0, 4, False, 5), 6)
    several = [Draws(3, 0, batch_size, False, 5, rank, world, lambda: 1) for rank in range(world)]
    later = [
        prompt
        for draws in zip(*(islice(ranks, 5) for ranks in several))
        for draw in draws
        for prompt in data.told(draw)["prompts"]
    ]
    assert later == one[4:] and len({*one}) > 9
    data.seed = 6
    assert told(data, Draws(3, 0, 4, False, 5), 6) != one


# ----------------------------------------------------------------------------------------- training
def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(step(out, 1) / UNET)


def same(a: Path, b: Path) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))


@pytest.mark.parametrize(
    "tuning", [Full(text_encoder=False), pytest.param(Full(), marks=pytest.mark.heavy)]
)
def test_the_denoiser_is_told_the_caption_of_each_photo(tuning, folder, tiny_base, tmp_path):
    """One caption for all is a prompt; another one trains other weights, and so does dropout."""

    def run(name: str, **data) -> Path:
        fit(tiny_base, folder, tmp_path / name, tuning, steps=[1], data={"batch_size": 4, **data})
        return tmp_path / name

    by_prompt = run("prompt", prompt="a red {identifier} {class_noun}")
    for name in "012":
        (folder / f"{name}.txt").write_text("a red {identifier} {class_noun}")
    captioned = run("caption", caption_dropout=0.0)
    assert same(by_prompt, captioned)
    (folder / "1.txt").write_text("a blue {identifier} {class_noun}")
    other = run("other")
    assert not same(captioned, other) and not same(other, run("dropped", caption_dropout=0.9))


@pytest.mark.parametrize("tuning", [Full(text_encoder=False), Full()])
def test_shuffled_tags_are_encoded_at_every_step(tuning, folder, tiny_base, tmp_path):
    for name in "012":
        (folder / f"{name}.txt").write_text("a sks mug, red, cube, in the snow")
    prior = {"num_class_images": 2, "class_images_dir": tmp_path / "prior"}
    data = {"batch_size": 2, **prior}
    fit(tiny_base, folder, tmp_path / "plain", tuning, steps=[1], data=data)
    module = fit(
        tiny_base, folder, tmp_path / "run", tuning, steps=[1], data={**data, "shuffle_tags": True}
    )
    assert module.encoded is None and not same(tmp_path / "plain", tmp_path / "run")


def test_a_dropped_caption_is_what_guidance_leads_away_from(tmp_path):
    """Zeros in SDXL, and no encoded empty prompt."""
    model = load_backbone(str(save_family("sdxl", tmp_path)))
    with torch.no_grad():
        found = EncodedPrompts(model, ["a sks mug", "", "a mug"])[["", "a mug", ""]]
        alone = model.encode_prompts(["a sks mug", "a mug"])[1:]
    assert found.states[0].abs().max() == found.extras["pooled"][2].abs().max() == 0
    assert torch.equal(found.states[1:2], alone.states)
    assert torch.equal(found.extras["pooled"][1:2], alone.extras["pooled"])


def test_a_caption_that_is_too_long_is_told(folder, tmp_path):
    (folder / "0.txt").write_text("a sks mug " + "beside a tree " * 40 + "pelican")
    with (
        small_bases(),
        pytest.warns(UserWarning, match="'a sks mug beside.*limit: these words.*pelican"),
    ):
        fit(save_family("sdxl", tmp_path), folder, tmp_path / "run", LoRA(rank=2), steps=[1])
