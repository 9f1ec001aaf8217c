"""The page of a benchmark: what it says is what the numbers say, every text is harmless, and
nothing is fetched.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamblend.errors import InputError
from dreamblend.evaluation.measures import COMPARED
from dreamblend.evaluation.outcome import outcome
from dreamblend.evaluation.statistics import bootstrap
from dreamblend.report import figures, write_comparison
from dreamblend.report.text import number

NASTY = "<script>alert(1)</script>"
BLENDS = {f"region edge={e}": {"blend": "region", "edge": e} for e in (0.1, 0.5)}


def point(rng: np.random.Generator) -> dict:
    return dict(zip(COMPARED, rng.random(len(COMPARED))))


@pytest.fixture
def out(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    names = ["0", "50", "400"]
    found = {
        (s, m): {n: point(rng) for n in (names + list(BLENDS) if m == "full" else names)}
        for s in ("a", NASTY, "c")
        for m in ("full", "lora")
    }
    results = {
        "benchmark": f"small {NASTY}",
        "protocol": {"name": "sandbox"},
        "settings": {"base": NASTY, "seeds": [0]},
        "versions": {"torch": "2"},
        **outcome(found, BLENDS, {"full": (50, 400), "lora": None}),
        "examples": [
            {
                "subject": NASTY,
                "prompt": f"a mug {NASTY}",
                "seed": 3,
                "files": {f"full {n}": f"{n}.png" for n in names},
            }
        ],
        "literature": [{"name": NASTY, "source": "nobody", "values": {"DINO": 0.5}}],
    }
    for n in names:
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{n}.png")
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_the_page_says_every_point_with_its_interval(out):
    page = write_comparison(out).read_text()
    results = json.loads((out / "results.json").read_text())
    for p in results["points"]:
        row = re.search(
            rf"<th scope=\"row\">{re.escape(p['name'])}</th>(<td>.*?)</tr>", page, re.S
        )[1]
        for cell, measure in zip(re.findall(r"<td>(.*?)</td>", row, re.S), COMPARED):
            values = [of[measure] for of in p["means"].values()]
            low, high = bootstrap(values)
            assert re.findall(r"-?[\d.]+", cell.replace("small", "")) == [
                number(float(v)) for v in (np.mean(values), low, high)
            ]


def test_every_text_is_escaped_and_nothing_is_fetched(out):
    page = write_comparison(out).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert (
        not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
        and "@import" not in page
        and not re.findall(r"url\((?!#)", page)
    )


def test_figures_are_whole_files_the_same_every_time(out):
    write_comparison(out)
    before = {p.name: p.read_bytes() for p in (out / "figures").iterdir()}
    assert sorted(before) == sorted(
        f"{n}.{k}" for n in ("front", "diversity", "curves") for k in ("svg", "png")
    )
    for name, data in before.items():
        if name.endswith("svg"):
            ElementTree.fromstring(data)
        else:
            Image.open(out / "figures" / name).verify()
    page = (out / "comparison.html").read_bytes()
    write_comparison(out)
    assert {p.name: p.read_bytes() for p in (out / "figures").iterdir()} == before and (
        out / "comparison.html"
    ).read_bytes() == page


def test_the_front_is_what_no_other_point_beats():
    rng = np.random.default_rng(1)
    points = [tuple(p) for p in rng.random((40, 2))]

    def beaten(p):
        return any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)

    assert figures.pareto(points) == sorted(p for p in points if not beaten(p))


@pytest.mark.parametrize(
    "left", ["examples", "literature", "paired", "front", "points", "versions", "subjects"]
)
def test_what_is_absent_has_no_section(out, left):
    results = json.loads((out / "results.json").read_text())
    results.pop(left)
    if left == "points":
        results.pop("front")
    (out / "results.json").write_text(json.dumps(results))
    assert "</html>" in write_comparison(out).read_text()


def test_the_command_makes_either_report_again_or_says_what_is_missing(out, tmp_path):
    def run(folder):
        return subprocess.run(
            [sys.executable, "-m", "dreamblend.report", str(folder)], capture_output=True, text=True
        )

    done = run(out)
    assert (
        done.returncode == 0
        and (out / "comparison.html").is_file()
        and str(out / "comparison.html") in done.stdout
    ), done.stderr
    (tmp_path / "empty").mkdir()
    done = run(tmp_path / "empty")
    assert done.returncode == 2 and "results.jsonl" in done.stderr and done.stderr.count("\n") == 1
    (out / "results.json").write_text("{")
    with pytest.raises(InputError, match="results.json cannot be read"):
        write_comparison(out)
