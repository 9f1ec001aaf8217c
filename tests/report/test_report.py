"""The report: one page that needs nothing else, from whatever a blend's output folder holds."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_pages import HOSTILE, KINDS, PROMPTS, WORDS, Page, draw_folder

from dreamblend.errors import InputError
from dreamblend.report import write_report
from dreamblend.report.curves import curve
from dreamblend.report.pictures import heat_map
from dreamblend.report.text import called, step_of
from dreamblend.storage.blend_folder import in_order


def add_optional_files(out: Path) -> None:
    Image.new("RGB", (200, 100), "teal").save(out / "photo.jpg")

    def write(name, value):
        return (out / name).write_text(json.dumps(value))

    write(
        "run.json",
        {
            "identifier": "sks",
            "class_noun": "mug",
            "early": "50",
            "late": "runs/x/snapshots/step-000400",
            "method": "full",
            "settings": {"lr": 5e-4, "note": "<i>"},
            "photos": ["photo.jpg", str(out / "photo.jpg")],
        },
    )
    write(
        "summary.json",
        {
            "rows": [
                {"kind": "late", "subject": 0.8, "overlap": 0.7, "n": 4},
                {"kind": "early", "subject": 0.3, "overlap": 0.2, "n": 4},
                {"kind": "cag", "subject": None, "overlap": 0.2, "n": 4},
            ],
            "judges": "sandbox",
            "note": "",
        },
    )
    write(
        "collapse.json",
        {
            "measures": ["overlap", "context_mass"],
            "note": "",
            "snapshots": [
                {"name": "0", "step": 0, "overlap": 0.3, "context_mass": None},
                {"name": "50", "step": 50, "overlap": 0.5},
                {"name": "other", "step": None, "overlap": 0.9},
            ],
        },
    )


@pytest.fixture
def out(tmp_path):
    return draw_folder(tmp_path)


def test_page_needs_nothing_else(out):
    add_optional_files(out)
    page = Page(write_report(out))
    assert len(page.images()) == 2 + 16 * (1 + len(WORDS))  # photos; images with their maps
    assert all(image["src"].startswith("data:image/") for image in page.images())
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|url\(|@import", page.html)


def test_hostile_text_stays_text(out):
    add_optional_files(out)
    page = Page(write_report(out))
    assert "<script" not in page.html and "<b>&lt;" not in page.html and "<i>" not in page.html
    assert HOSTILE in "".join(page.inside("h3"))
    assert any(
        HOSTILE in image["alt"] for image in page.images()
    )  # quotes did not end the attribute
    assert "<b>" in page.inside("figcaption")


def test_kinds_come_early_first_and_late_last(out):
    page = Page(write_report(out))
    heads = [text for text in page.inside("th") if text in KINDS]
    assert heads == ["early", "cag", "score", "late"] * len(PROMPTS)
    pictures = [
        image["alt"].split(":")[0]
        for image in page.images()
        if "picture" in (image.get("class") or "")
    ]
    assert pictures == ["early", "cag", "score", "late"] * 4
    assert in_order(["late", "mine", "merge", "early", "mine"]) == [
        "early",
        "merge",
        "mine",
        "late",
    ]


def test_heat_maps_appear_word_by_word(out):
    (out / "maps/p0/0-cag.safetensors").unlink()
    (out / "maps/p0/1-cag.safetensors").write_bytes(b"damaged")
    captions = Page(write_report(out)).inside("figcaption")
    assert {word: captions.count(word) for word in WORDS} == dict.fromkeys(WORDS, 14)


def test_an_even_heat_map_looks_even():
    def decode(uri):
        return np.asarray(
            Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("L"), float
        )

    grey = Image.new("RGB", (32, 32), "grey")
    nearly_even = 1 + 0.01 * np.eye(4, dtype=np.float32)
    assert (
        decode(heat_map(grey, nearly_even)).std()
        < 3
        < decode(heat_map(grey, np.eye(4, dtype=np.float32))).std()
    )
    assert Image.open(
        io.BytesIO(base64.b64decode(heat_map(grey.resize((640, 320)), nearly_even).split(",")[1]))
    ).size == (96, 48)


def test_only_large_images_are_recoded(tmp_path):
    small, large = (
        Page(write_report(draw_folder(_made(tmp_path / str(size)), size, 1, PROMPTS[:1])))
        for size in (128, 600)
    )

    def first(page):
        return next(image for image in page.images() if "picture" in image["class"])

    as_drawn = base64.b64encode((tmp_path / "128/images/p0/0-early.png").read_bytes()).decode()
    assert first(small)["src"].endswith(as_drawn) and "pixelated" in first(small)["class"]
    shown = Image.open(io.BytesIO(base64.b64decode(first(large)["src"].split(",")[1])))
    assert (shown.format, shown.size) == ("JPEG", (384, 384)) and "pixelated" not in first(large)[
        "class"
    ]


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_results_alone_are_enough(out):
    texts = Page(write_report(out)).inside("h2")
    assert texts == ["Images"]


def test_an_empty_folder_and_no_folder(tmp_path):
    assert "No images yet" in write_report(tmp_path).read_text()
    with pytest.raises(InputError, match="absent"):
        write_report(tmp_path / "absent")


def test_damaged_files_are_named_and_left_out(out):
    results = out / "results.jsonl"
    before = Page(write_report(out)).images()
    results.write_text(results.read_text() + '{"prompt": "a sks mug at night", "se')
    (out / "collapse.json").write_text("{")
    (out / "images/p0/0-cag.png").write_bytes(b"")
    page = Page(write_report(out))
    assert len(page.images()) == len(before) - 1 - len(WORDS)
    assert "at night" not in page.html
    assert (
        "1 line of results.jsonl" in page.html
        and "collapse.json is not" in page.html
        and "missing or damaged" in page.html
    )


def test_rerun_replaces_the_page_and_leaves_nothing(out):
    write_report(out).write_text("old")
    first = write_report(out).read_text()
    assert first.startswith("<!doctype html>") and write_report(out).read_text() == first
    assert {path.name for path in out.iterdir()} == {
        "images",
        "maps",
        "results.jsonl",
        "report.html",
    }


def test_a_failed_write_keeps_the_old_page(out, monkeypatch):
    write_report(out).write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(InputError, match="report.html: disk"):
        write_report(out)
    assert (out / "report.html").read_text() == "old"
    assert not list(out.glob(".report*"))


def test_later_line_of_the_same_image_wins(out):
    lines = (out / "results.jsonl").read_text().splitlines()
    again = json.loads(lines[0]) | {"scores": {"subject": 0.123}}
    (out / "results.jsonl").write_text("\n".join([*lines, json.dumps(again)]))
    page = Page(write_report(out))
    assert page.inside("b") == ["0.123"]
    assert "16 images" in page.html


def test_row_limit_is_spread_over_the_prompts(out):
    page = Page(write_report(out, max_rows=2))
    assert len(page.inside("h3")) >= 2 and [
        text for text in page.inside("th") if text.isdigit()
    ] == ["0", "0"]
    assert "2 rows are shown" in page.html and "2 more are in images/" in page.html


def test_best_of_each_measure_is_marked(out):
    add_optional_files(out)
    html = write_report(out).read_text()
    assert re.findall(r'<td class="best">([^<]*)', html) == [
        "0.200",
        "0.200",
        "0.800",
    ]  # overlap twice (a tie, lower is better); subject of late
    assert html.count("For overlap of the maps, lower is better") == 1


def test_curves_have_points_marks_and_no_invented_values(out):
    add_optional_files(out)
    page = Page(write_report(out))
    assert [text for text in page.inside("title") if text.startswith("step")] == [
        "step 0: 0.300",
        "step 50: 0.500",
    ]
    assert (
        sum(tag == "svg" for tag, _ in page.tags) == 1
    )  # context_mass has no value: no empty chart
    assert len([1 for tag, attributes in page.tags if attributes.get("class") == "mark"]) == 2


def test_axis_turns_logarithmic_only_over_a_wide_span():
    def x(svg):
        return [float(value) for value in re.findall(r'cx="([\d.]+)"', svg)]

    wide = curve("overlap", [(s, 0.5) for s in (0, 10, 100, 1000)], [], {})
    narrow = curve("overlap", [(s, 0.5) for s in (100, 200, 300)], [], {})
    assert "(log)" in wide and "(log)" not in narrow
    assert (
        np.allclose(np.diff(x(wide))[1:], np.diff(x(wide))[1], atol=0.2)
        and min(np.diff(x(wide))) > 0
    )
    assert np.allclose(np.diff(x(narrow)), np.diff(x(narrow))[0], atol=0.2)
    assert (
        len(x(curve("overlap", [(5, 0.0)], [], {}))) == 1
    )  # one snapshot, and a measure that is 0 throughout


def test_step_of_a_snapshot():
    assert [
        step_of(s)
        for s in ("50", "runs/a/snapshots/step-000400", "out/checkpoint-30/", "models/sd-1.5", None)
    ] == [50, 400, 30, None, None]
    assert step_of("best", [{"name": "best", "step": 7}]) == 7


def test_a_table_calls_snapshots_by_step_or_by_what_tells_their_paths_apart():
    rows = [
        {"name": "base", "step": 0},
        {"name": "100", "step": 100},
        {"name": "/runs/mug/mug-000001.safetensors", "step": 30},
        {"name": "/runs/mug/epoch1/lora.safetensors", "step": None},
        {"name": "/runs/mug/epoch2/lora.safetensors", "step": None},
    ]
    assert called(rows) == [
        "base",
        "100",
        "30",
        "epoch1/lora.safetensors",
        "epoch2/lora.safetensors",
    ]
    assert called([{"step": 5}, {"name": "late.safetensors"}]) == ["5", "late.safetensors"]
