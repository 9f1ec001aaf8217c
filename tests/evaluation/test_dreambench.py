"""The DreamBooth benchmark: what its folder must hold, its self-check, and a small run on the real
photos.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_PHOTOS
from tiny_runs import command, contents

from benchmarks import dreambench
from benchmarks.study import Subject
from dreamblend.errors import InputError
from dreamblend.evaluation.encoders import SandboxSubject
from dreamblend.evaluation.protocols import find
from dreamblend.storage.photos import list_photos, open_photo, to_pixels

NOUNS = (
    {f"toy_{i}": "toy" for i in range(20)}
    | {"bear-plushie": "stuffed animal"}
    | {f"dog{i}": "dog" for i in range(7)}
    | {"cat": "cat", "cat2": "cat"}
)


def text(
    classes: dict[str, str] = NOUNS, objects: int = 25, live: int = 25, quote: str = "'"
) -> str:
    """A file as google/dreambooth has it."""

    def prompts(kind, n):
        return "".join(
            f"{quote}a {{0}} {{1}} {kind} {i}{quote}.format(unique_token, class_token),\n"
            for i in range(n)
        )

    rows = "".join(f"{name},{noun}\n" for name, noun in classes.items())
    lists = [
        f"{title} Prompts\n\nprompt_list = [\n{prompts(kind, n)}]\n"
        for title, kind, n in (("Object", "on", objects), ("Live Subject", "in", live))
    ]
    return f"Classes\n\nsubject_name,class\n{rows}\nPrompts\n\n" + "\n".join(lists)


def write(folder: Path, content: str) -> Path:
    (folder / "dataset").mkdir(parents=True, exist_ok=True)
    (folder / "dataset" / dreambench.TEXT).write_bytes(content.encode())
    return folder


@pytest.mark.parametrize(
    "content",
    [
        text(),
        "\ufeff" + text(quote='"').replace("\n", "\r\n"),
        text().replace(",dog\n", " , dog  \n"),
    ],
)
def test_every_subject_gets_the_prompts_of_its_kind(tmp_path, content):
    subjects = {s.name: s for s in dreambench.read(write(tmp_path, content))}
    assert {name: s.class_noun for name, s in subjects.items()} == NOUNS
    assert subjects["bear-plushie"].prompts == tuple(
        f"a sks stuffed animal on {i}" for i in range(25)
    )
    assert subjects["dog3"].prompts == tuple(f"a sks dog in {i}" for i in range(25))
    assert subjects["cat"].photos == tmp_path / "dataset" / "cat"


@pytest.mark.parametrize(
    "content",
    [
        text(dict(list(NOUNS.items())[:-1])),
        text({**NOUNS, "cat2": "toy"}),
        text(objects=24),
        text(live=26),
        "",
        text().replace("Live Subject", "Pet"),
    ],
)
def test_what_is_not_the_whole_benchmark_is_told(tmp_path, content):
    with pytest.raises(InputError, match="30, 9, 25 and 25"):
        dreambench.read(write(tmp_path, content))
    with pytest.raises(InputError, match="google/dreambooth"):
        dreambench.read(tmp_path / "dataset" / "nowhere")


def test_real_photos_are_compared_with_the_others_alone(mug_photos):
    subjects = [Subject("mug", mug_photos, "mug", ())]
    found = dreambench.real_against_real(subjects, find("sandbox"), "cpu")
    vectors = (
        SandboxSubject()
        .images(to_pixels([open_photo(p) for p in list_photos(mug_photos)]))
        .double()
        .numpy()
    )
    assert found["subject"] == pytest.approx(
        np.mean([a @ b for i, a in enumerate(vectors) for b in vectors[:i]]), abs=1e-5
    )
    assert 0 < found["subject_clip"] < 1


def test_rates_are_the_bases_own_and_can_be_set():
    def rates(*args):
        return {r.name: r.rate for r in dreambench.recipes(*args)}

    methods = list(dreambench.RATES)
    assert rates("owner/name", (1, 2, 3), methods, []) == dreambench.RATES and rates(
        "sandbox", (1, 2), ["full"], []
    ) == {"full": 5e-4}
    assert rates("owner/name", (1, 2), ["full", "lora"], ["full=1e-5"]) == {
        "full": 1e-5,
        "lora": 1e-4,
    }
    assert [r.pair for r in dreambench.recipes("sandbox", (1, 2, 3), ["full", "t-lora"], [])] == [
        (2, 3),
        None,
    ]
    for wrong in ("full", "full=x", "full=0", "ful=1"):
        with pytest.raises(InputError, match="full=5e-6"):
            rates("sandbox", (1, 2), methods, [wrong])


@pytest.mark.heavy
@pytest.mark.skipif(not REAL_PHOTOS.is_dir(), reason="the DreamBooth photos are not here")
def test_a_small_run_ends_beside_the_published_numbers_and_repeats_nothing(tmp_path):
    options = [
        "--data",
        REAL_PHOTOS.parent,
        "--subjects",
        "rc_car",
        "cat2",
        "--methods",
        "lora",
        "--prompts",
        "2",
        "--seeds",
        "1",
        "--steps",
        "2",
        "4",
        "--sampling",
        "2",
        "--dtype",
        "fp32",
        "--out",
        tmp_path / "out",
    ]
    assert (
        command(dreambench.main, *options, "--shard", "0/1")[0] == 0
        and not (tmp_path / "out/results.json").exists()
    )
    before = contents(tmp_path / "out")
    status, said, _ = command(dreambench.main, *options)
    assert status == 0 and said.lstrip().startswith("real photos against real photos")
    after = contents(tmp_path / "out")
    assert before.items() <= after.items() and {k.split("/")[0] for k in after.keys() - before} == {
        "results.json",
        "comparison.html",
        "figures",
    }
    results = json.loads(after["results.json"])
    assert (
        results["subjects"] == ["rc_car", "cat2"]
        and results["protocol"]["name"] == "sandbox"
        and 0 < results["real"]["subject"] < 1
    )
    means = {p["name"]: p["means"]["cat2"] for p in results["points"]}
    measured = [
        m[name]
        for m in means.values()
        for name in ("subject", "subject_clip", "prompt_fidelity", "prior")
    ]
    assert len(means) == 3 + len(dreambench.BLENDS) and None not in measured
    page = after["comparison.html"].decode()
    assert all(row["source"] in page and row["name"] in page for row in dreambench.LITERATURE)


@pytest.mark.skipif(not REAL_PHOTOS.is_dir(), reason="the DreamBooth photos are not here")
def test_the_real_folder_is_read_whole():
    for folder in (REAL_PHOTOS, REAL_PHOTOS.parent):
        subjects = dreambench.read(folder)
        assert (
            all(len(list_photos(s.photos)) >= 4 and len(set(s.prompts)) == 25 for s in subjects)
            and len(subjects) == 30
        )
    assert sum("a sks dog in a chef outfit" in s.prompts for s in subjects) == 7
