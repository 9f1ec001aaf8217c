"""The output folder of a blend: what is written is read again, and the images are the record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dreamblend.errors import InputError
from dreamblend.storage.blend_folder import (
    Result,
    image_path,
    missing,
    read_index,
    read_json,
    read_results,
    save_image,
    save_index,
    save_json,
    undrawn,
)

WEIGHTS = {f"{name}_weights": "a" for name in ("early", "late", "base")}
SETTINGS = {**WEIGHTS, "early": "50", "num_inference_steps": 25}
KINDS = ["early", "late"]


def draw(out: Path, prompt: str = "a mug", seed: int = 0, kind: str = "late", **said) -> Result:
    path = image_path(out, prompt, seed, kind)
    result = Result(
        prompt=prompt,
        seed=seed,
        kind=kind,
        file=str(path.relative_to(out)),
        settings=SETTINGS,
        **said,
    )
    save_image(out, Image.new("RGB", (8, 8)), result)
    return result


def test_a_line_is_read_as_it_was_written(tmp_path):
    drawn = draw(tmp_path, collapse={"overlap": 0.5}, distance=0.1, dtype="fp32", early="50")
    (found,) = read_index(tmp_path)
    assert replace(found, sha256="") == drawn and found.sha256
    scored = replace(found, scores={"prompt": 0.5}, more={"stars": 3})
    save_index(tmp_path, [scored, replace(drawn, seed=1, dtype=None)])
    assert read_results(tmp_path, []) == [scored, replace(drawn, seed=1, dtype=None)]
    first, second = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert first["scores"] == {"prompt": 0.5} and first["stars"] == 3 and "more" not in first
    assert not {"scores", "dtype"} & second.keys()  # what is not known is not said


def test_an_image_does_not_say_where_it_is_nor_how_it_was_judged(tmp_path):
    said = draw(tmp_path).provenance()
    assert not {"file", "sha256", "scores"} & said.keys()
    assert said["settings"] == SETTINGS and said["distance"] is None


def test_scores_stay_with_the_image_that_they_are_of(tmp_path):
    for seed in (0, 1):
        draw(tmp_path, seed=seed)
    save_index(tmp_path, [replace(r, scores={"subject": r.seed}) for r in read_index(tmp_path)])
    with open(tmp_path / "results.jsonl", "a") as index:
        index.write('{"prompt": "a mug", "se')  # an interrupted write
    draw(tmp_path, seed=1, dtype="bf16")  # another image in its place
    assert [result.scores for result in read_index(tmp_path)] == [{"subject": 0}, {}]


def test_what_is_missing_is_what_was_not_drawn_or_is_damaged(tmp_path):
    pairs = [("a mug", seed) for seed in range(3)]
    assert missing(tmp_path, pairs, KINDS, SETTINGS) == pairs
    for seed in range(2):
        for kind in KINDS:
            draw(tmp_path, seed=seed, kind=kind)
    image_path(tmp_path, "a mug", 1, "late").write_bytes(b"damaged")
    assert missing(tmp_path, pairs, KINDS, SETTINGS) == pairs[1:]
    assert undrawn(tmp_path, pairs, KINDS) == pairs[2:]
    named_otherwise = {**SETTINGS, "early": "runs/x/snapshots/step-000050"}  # the same weights
    assert missing(tmp_path, pairs, KINDS, named_otherwise) == pairs[1:]
    with pytest.raises(InputError, match="steps 25, now 6.*choose another --out"):
        missing(tmp_path, pairs, KINDS, {**SETTINGS, "num_inference_steps": 6})


def test_a_damaged_file_is_empty_and_told(tmp_path):
    problems: list[str] = []
    assert read_json(tmp_path, "run", problems) == {} and not problems
    save_json(tmp_path, "run", {"base": "sandbox"})
    assert read_json(tmp_path, "run", problems) == {"base": "sandbox"} and not problems
    for damaged in ("{", "[1]", "null", "\udcff"):
        (tmp_path / "run.json").write_text(damaged, encoding="utf-8", errors="surrogateescape")
        assert read_json(tmp_path, "run", problems) == {}
    assert problems == ["run.json is not a JSON object and is left out."] * 4


def test_a_setting_that_is_left_out_now_is_named(tmp_path):
    drawn = draw(tmp_path)
    wanted = {k: v for k, v in SETTINGS.items() if k != "num_inference_steps"}
    with pytest.raises(InputError, match="num_inference_steps 25, now the default"):
        missing(tmp_path, [(drawn.prompt, drawn.seed)], ["late"], wanted)
