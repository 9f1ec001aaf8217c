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
from dreamblend.evaluation.statistics import estimate
from dreamblend.report import figures, write_comparison
from dreamblend.report.text import number

NASTY = "<script>alert(1)</script>"
BLENDS = {f"region edge={e}": {"blend": "region", "edge": e} for e in (0.1, 0.5)}


def point(rng: np.random.Generator) -> dict:
    return dict(zip(COMPARED, rng.random(len(COMPARED))))


@pytest.fixture(scope="module")
def results() -> dict:
    rng = np.random.default_rng(0)
    names = ["0", "50", "400"]
    found = {
        (s, m): {n: point(rng) for n in (names + list(BLENDS) if m == "full" else names)}
        for s in ("a", NASTY, "c", "d", "e")
        for m in ("full", "lora")
    }
    return {
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
        "plan": {"written": "2026-01-31"},
        "questions": [
            {"question": f"why {NASTY}?", "of": NASTY, "value": 0.25, "interval": [0.125, 0.5]},
            {"question": "what else?", "of": "all", "value": 0.75, "interval": None},
        ],
        "literature": [{"name": NASTY, "source": "nobody", "values": {"DINO": 0.5}}],
    }


@pytest.fixture
def out(tmp_path, results) -> Path:
    for n in ("0", "50", "400"):
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
            _, low, high = estimate(values)
            assert re.findall(r"-?[\d.]+", cell.replace("small", "")) == [
                number(float(v)) for v in (np.mean(values), low, high)
            ]


def test_the_page_says_what_was_asked_and_how_blends_differ_from_the_snapshots(out, results):
    page = write_comparison(out).read_text()
    assert "a plan written on 2026-01-31" in page
    assert re.search(r"<td>0.250</td><td>0.125 to 0.500</td>", page)
    assert re.search(r"<td>0.750</td><td>–</td>", page)
    (sweep,) = results["sweep"]
    row = re.search(r"<th scope=\"row\">full region over full</th>(.*?)</tr>", page, re.S)[1]
    cells = re.findall(r"<td>(.*?)<small>(.*?)</small>", row)
    assert cells == [
        (number(said["value"]), " to ".join(map(number, said["interval"])))
        for said in sweep["measured"].values()
    ]


def test_results_of_a_version_before_this_one_still_open(out, results):
    before = {k: v for k, v in results.items() if k not in ("sweep", "questions", "plan")}
    before["front"] = [
        {**{k: v for k, v in f.items() if k != "measured"}, "hypervolume": 0.5, "interval": [0, 1]}
        for f in before["front"]
    ]
    (out / "results.json").write_text(json.dumps(before))
    assert "Every point" in write_comparison(out).read_text()


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
        f"{n}.{k}" for n in ("front", "sweep", "diversity", "curves") for k in ("svg", "png")
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


def test_blends_have_panels_of_their_own_over_the_snapshots_of_their_run(results):
    points = {p["name"]: p for p in results["points"]}
    families = [{**f, "points": [points[n] for n in f["points"]]} for f in results["front"]]
    drawn = figures.fronts(families).axes
    panels = {axis.get_title(): axis for axis in drawn if axis.get_title()}
    labels = {
        title: [text.get_text() for text in axis.get_legend().get_texts()]
        for title, axis in panels.items()
    }
    assert labels == {"snapshots": ["full", "lora"], "blends of full": ["full", "region"]}
    (region,) = (line for line in panels["blends of full"].lines if line.get_label() == "region")
    assert list(region.get_xdata()) == [
        figures.mean(points[f"full {b}"], "subject") for b in BLENDS
    ]


def test_the_front_is_what_no_other_point_beats():
    rng = np.random.default_rng(1)
    points = [tuple(p) for p in rng.random((40, 2))]

    def beaten(p):
        return any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)

    assert figures.pareto(points) == sorted(p for p in points if not beaten(p))


@pytest.mark.parametrize(
    "left",
    ["examples", "literature", "questions", "sweep", "front", "points", "versions", "subjects"],
)
def test_what_is_absent_has_no_section(out, left):
    results = json.loads((out / "results.json").read_text())
    results.pop(left)
    if left == "points":
        results.pop("front")
    (out / "results.json").write_text(json.dumps(results))
    assert "</html>" in write_comparison(out).read_text()


@pytest.mark.heavy
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
