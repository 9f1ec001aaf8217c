"""Every Python command of the README runs as it stands, made small: fewer steps, and the sandbox
where a base is on a hub.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import contents

ROOT = Path(__file__).resolve().parents[2]
LINES = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip().startswith(("python ", "make "))
]
SMALLER = {
    "fit": [
        "--trainer.max_steps",
        "40",
        "--snapshots.steps",
        "[2, 10, 40]",
        "--model.rate",
        "5e-3",
    ],
    "select": ["--steps", "4", "--seeds", "0"],
    "predict": ["--model.steps", "2", "--seeds", "0"],
}


def test_the_readme_names_the_two_entry_points_and_only_targets_of_the_makefile():
    assert any("train.py fit" in line for line in LINES) and any(
        "blend.py predict" in line for line in LINES
    )
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {line.split()[1] for line in LINES if line.startswith("make ")} <= set(targets)


def commands(*entries: str) -> list[list[str]]:
    """Those of the README, in its order, on the sandbox where a base is on a hub."""
    asked = [
        line
        for line in LINES
        if re.match(rf"python (train|blend)\.py ({'|'.join(entries)})", line)
        and "--help" not in line
    ]
    found = [shlex.split(re.sub(r"\s+#.*", "", line))[1:] for line in asked]
    assert found
    return [
        ["sandbox" if re.fullmatch(r"stable-diffusion-v1-5/\S+", word) else word for word in words]
        for words in found
    ]


def started(words: list[str], folder: Path, *more: object) -> None:
    """Run a command, made smaller, in a process of its own."""
    line = [sys.executable, str(ROOT / words[0]), *words[1:], *SMALLER[words[1]], *map(str, more)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def ran(tmp_path_factory, mug_photos) -> Path:
    """Where all of the README's commands ran, one after another. Not to be changed."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "photos").mkdir()
    (folder / "photos" / "mug").symlink_to(mug_photos)
    (folder / "configs").symlink_to(ROOT / "configs")
    for words in commands("fit", "select", "predict"):
        started(words, folder)
    return folder


def test_the_commands_of_the_readme_run_one_after_another(ran):
    reports = list(ran.rglob("report.html"))
    assert reports and all(p.stat().st_size > 1000 for p in reports)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_what_one_does_to_the_byte(ran, tmp_path, processes):
    """Images, maps and index, diagnosis, scores and report; by three processes, of which one has
    none of the two pairs to draw.
    """
    words = commands("predict")[0]
    one = ran / words[words.index("--out") + 1]
    started(
        words,
        ran,
        "--out",
        tmp_path,
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        processes,
    )
    made, wanted = (
        {k: v for k, v in contents(out).items() if not k.startswith(".lock")}
        for out in (tmp_path, one)
    )
    assert {
        "summary.json",
        "run.json",
        "collapse.json",
        "report.html",
        "sheet.png",
        "results.jsonl",
    } < wanted.keys()
    assert (
        made.keys() == wanted.keys()
        and [name for name in wanted if made[name] != wanted[name]] == []
    )
    lines = [json.loads(line) for line in wanted["results.jsonl"].decode().splitlines()]
    assert len({(line["prompt"], line["seed"]) for line in lines}) == 2 and all(
        line["scores"] for line in lines
    )
