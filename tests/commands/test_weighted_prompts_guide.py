"""The guide's command for weighted prompts runs as it stands, made small."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from test_readme import ROOT, lines_of
from tiny_runs import QUIET, command, fit

from blend import main
from dreamblend.tuning import LoRA


def guide() -> list[str]:
    """The words of the guide's command."""
    (line,) = [
        one for one in lines_of(ROOT / "docs" / "guide.md") if "--model.prompt_weighting" in one
    ]
    return shlex.split(line)[2:]


@pytest.mark.heavy
def test_the_guides_command_draws_no_prompt_by_those_beside_it(
    tiny_base, mug_photos, tmp_path, monkeypatch
):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    fit(
        tiny_base, mug_photos, tmp_path / "runs/mug", LoRA(rank=4), steps=[1, 2], learning_rate=0.03
    )

    def drawn(*words: object) -> dict[str, dict]:
        """The lines of the blend's images, by their prompts."""
        smaller = ("--early", 1, "--late", 2, "--seeds", 0, "--model.num_inference_steps", 2)
        words = (*guide(), *smaller, *QUIET, *words)
        status, _, err = command(main, *words)
        assert status == 0, err
        out = Path(words[len(words) - 1 - words[::-1].index("--out") + 1])
        lines = [json.loads(one) for one in (out / "results.jsonl").read_text().splitlines()]
        return {line["prompt"]: line for line in lines if line["kind"] == "region"}

    alone = drawn()
    assert sorted(alone)[1] == "a sks mug on a (wooden table)1.3 in the snow++" and len(alone) == 2
    assert all(line["settings"]["prompt_weighting"] == "compel" for line in alone.values())
    long = f"a photo of {'a red cube and ' * 25} a sks mug"
    prompts = json.dumps([long, *alone])
    together = drawn("--prompts", prompts, "--out", "runs/together")
    for prompt, line in alone.items():
        assert together[prompt]["sha256"] == line["sha256"]
