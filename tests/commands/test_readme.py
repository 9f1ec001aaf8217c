"""What README and docs print is so: the README's commands and Python run as they stand, made small;
of the other pages' commands every setting is known; what they name is there.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import command, contents

from blend import main as blend
from dreamblend.blending.blends import BLENDS
from dreamblend.sandbox.__main__ import main as sandbox
from dreamblend.training.optimizers import Optimizer
from dreamblend.tuning import METHODS
from train import main as train

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def lines_of(page: Path) -> list[str]:
    """The commands of a page's blocks, without their comments."""
    lines = (
        line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()
    )
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines]


LINES = [line for line in lines_of(README) if line.startswith(("python ", "make "))]
SMALLER = {
    "fit": [
        "--trainer.max_steps",
        "40",
        "--snapshots.steps",
        "[2, 10, 40]",
        "--model.learning_rate",
        "5e-3",
    ],
    "select": ["--steps", "4", "--seeds", "0"],
    "predict": ["--model.num_inference_steps", "2", "--seeds", "0"],
}


def test_the_readme_names_the_two_entry_points_and_the_pages_only_targets_of_the_makefile():
    assert any("train.py fit" in line for line in LINES) and any(
        "blend.py predict" in line for line in LINES
    )
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {
        line.split()[1] for page in PAGES for line in lines_of(page) if line.startswith("make ")
    } <= set(targets)


def test_the_readme_is_read_to_its_end():
    assert len(README.read_text().splitlines()) <= 130


def commands(page: Path, *entries: str) -> list[list[str]]:
    """Those of a page, in its order, on the sandbox where a base is on a hub."""
    asked = [
        line
        for line in lines_of(page)
        if re.match(rf"python (train|blend)\.py ({'|'.join(entries)})", line)
    ]
    found = [shlex.split(line)[1:] for line in asked]
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
    for words in commands(README, "fit", "select", "predict"):
        started(words, folder)
    return folder


def test_the_commands_of_the_readme_run_one_after_another(ran):
    reports = list(ran.rglob("report.html"))
    assert reports and all(p.stat().st_size > 1000 for p in reports)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.heavy)])
def test_several_processes_write_what_one_does_to_the_byte(ran, tmp_path, processes):
    """Images, maps and index, diagnosis, scores and report. Of three processes one has no pair."""
    words = commands(README, "predict")[0]
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


# -------------------------------------------------------------------- Python, and the other pages
def test_the_python_of_the_readme_runs_as_it_stands(capsys):
    (block,) = blocks(README, "python")
    names: dict = {}
    exec(block, names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(names["maps"]) > 1 and all(
        re.fullmatch(r"\S+ \(1, .*\) 'mug' gets \d+\.\d%", line) for line in printed
    )


def test_every_setting_of_the_pages_commands_is_known_and_takes_its_value(monkeypatch):
    """They are read to the end, as they stand, and print what they would do."""
    monkeypatch.chdir(ROOT)
    asked = [
        words
        for page in PAGES
        if page != README
        for words in commands(page, "fit", "select", "predict")
    ]
    assert {words[1] for words in asked} == {"fit", "select", "predict"}
    for file, *words in asked:
        status, printed, said = command(
            train if file == "train.py" else blend, *words, "--print_config"
        )
        assert (
            status == 0
            and {"fit": "tuning:", "select": "scale:", "predict": "blend:"}[words[0]] in printed
        ), f"{file} {words}\n{said}"


@pytest.fixture(scope="module")
def known() -> set[str]:
    """The options of entry points, blends, methods, benchmarks, and of sbatch in its files."""
    texts = [
        command(main, entry, "--help")[1]
        for main, entry in (
            (train, "fit"),
            (blend, "predict"),
            (blend, "select"),
            (blend, "export"),
        )
    ]
    texts += [
        file.read_text()
        for folder, kind in (
            ("benchmarks", "*.py"),
            ("configs/slurm", "*.sbatch"),
            ("dreamblend/sandbox", "*.py"),
        )
        for file in (ROOT / folder).rglob(kind)
    ]
    of_classes = {
        f"--model.{setting}.{name}"
        for setting, kinds in (
            ("blend", BLENDS),
            ("tuning", METHODS),
            ("optimizer", {kind.__name__: kind for kind in Optimizer.__subclasses__()}),
        )
        for kind in kinds.values()
        for name in inspect.signature(kind).parameters
    }
    return {option for text in texts for option in options(text)} | of_classes


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_options_that_a_page_names_exist(page, known):
    assert options(page.read_text()) - known - {"--help"} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_modules_that_a_page_runs_are_there_with_the_options(page):
    shared = (ROOT / "benchmarks" / "command.py").read_text()
    for module, rest in re.findall(r"python -m ([\w.]+)([^`\n]*)", page.read_text()):
        file = ROOT / (module.replace(".", "/") + ".py")
        file = file if file.is_file() else ROOT / module.replace(".", "/") / "__main__.py"
        assert options(rest.split("#")[0]) <= options(file.read_text() + shared), module


def test_the_commands_of_the_sandbox_write_what_its_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [
        line.split()[3:]
        for line in lines_of(ROOT / "docs" / "sandbox.md")
        if line.startswith("python -m dreamblend.sandbox ")
    ]
    assert ["check"] in asked and all(
        command(sandbox, *words)[0] == 0 for words in asked if words != ["check"]
    )  # which takes minutes
    assert (tmp_path / "scenes.png").is_file() and len(
        list((tmp_path / "photos" / "mug").glob("*.png"))
    ) > 2


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.M)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_and_names_is_there(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        there = (page.parent / target).resolve() if target else page
        assert there.exists() and (not anchor or anchor in headings(there)), f"{target}#{anchor}"
    named = re.findall(
        r"(?<![\w./-])(?:dreamblend|callbacks|configs|tests|benchmarks|docs)/[\w./*-]*[\w/]", text
    )
    assert [path for path in named if not list(ROOT.glob(path.rstrip("/")))] == []


def test_every_page_of_the_docs_is_linked_from_another():
    linked = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
    }
    assert set(PAGES) - {README} <= linked
