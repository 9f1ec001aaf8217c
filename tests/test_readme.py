"""Every Python command of the README runs as it stands, made small: fewer steps, and the sandbox where a base is on a hub."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
LINES = [
    line.strip() for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for line in block.replace("\\\n", " ").splitlines() if line.strip().startswith(("python ", "make "))
]
SMALLER = {
    "fit": ["--trainer.max_steps", "40", "--snapshots.steps", "[2, 10, 40]", "--model.rate", "5e-3"],
    "select": ["--steps", "4", "--seeds", "0"],
    "predict": ["--model.steps", "2", "--seeds", "0"],
}


def test_the_readme_names_the_two_entry_points_and_only_targets_of_the_makefile():
    assert any("train.py fit" in line for line in LINES) and any("blend.py predict" in line for line in LINES)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {line.split()[1] for line in LINES if line.startswith("make ")} <= set(targets)


def test_the_commands_of_the_readme_run_one_after_another(tmp_path, mug_photos):
    asked = [line for line in LINES if re.match(r"python (train|blend)\.py (fit|select|predict)", line) and "--help" not in line]
    commands = [shlex.split(re.sub(r"\s+#.*", "", line))[1:] for line in asked]
    assert commands
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mug").symlink_to(mug_photos)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for command in commands:
        words = [w if "/" not in w or not re.fullmatch(r"stable-diffusion-v1-5/\S+", w) else "sandbox" for w in command]
        done = subprocess.run(
            [sys.executable, str(ROOT / words[0]), *words[1:], *SMALLER[words[1]]], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-2000:]}"
    reports = list(tmp_path.rglob("report.html"))
    assert reports and all(p.stat().st_size > 1000 for p in reports)
