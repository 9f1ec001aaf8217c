"""The guide's commands run as they stand, on a small run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from tiny_runs import command, fit

from blend import main
from dreamblend.storage import blend_folder
from dreamblend.storage.result import Result
from dreamblend.storage.runs import open_run
from dreamblend.tuning import LoRA

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide.md"
PROMPTS = ["a sks mug", "a sks mug in the snow"]


def blended(out: Path) -> None:
    """A blend's folder with a picture of each kind."""
    results = []
    for prompt in PROMPTS:
        for i, kind in enumerate(("early", "region", "late")):
            file = str(blend_folder.image_path(out, prompt, 0, kind).relative_to(out))
            result = Result(prompt=prompt, seed=0, kind=kind, file=file, early=str(out))
            picture = Image.fromarray(np.full((8, 8, 3), 80 * i, np.uint8))
            blend_folder.save_image(out, picture, result)
            results.append(result)
    blend_folder.save_index(out, results)


def test_the_commands_of_the_guide_run(tiny_base, mug_photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(tiny_base, mug_photos, tmp_path / "runs" / "mug", LoRA(rank=4), steps=[1, 2])
    blended(tmp_path / "runs" / "mug-blend")
    lines = [
        line for line in GUIDE.read_text().splitlines() if line.startswith("python blend.py export")
    ]
    assert len(lines) > 5
    for line in lines:
        words = [{"100": "1", "600": "2"}.get(word, word) for word in shlex.split(line)[2:]]
        status, printed, said = command(main, *words)
        out = Path(words[words.index("--out") + 1])
        assert status == 0 and out.exists(), said
        assert str(out.resolve()) in printed
    card = ModelCard.load("out/mug-hub/README.md")
    (first, second) = card.data.widget
    assert (first["text"], second["text"]) == tuple(PROMPTS)
    with Image.open(Path("out/mug-hub") / first["output"]["url"]) as image:
        assert image.getpixel((0, 0)) == (80, 80, 80)  # the blend's
        assert not image.info.get(blend_folder.CHUNK)  # which names folders of this machine
    assert command(main, *words)[0] == 2  # it is there already


@pytest.mark.heavy
def test_the_picked_pair_is_exported_where_none_is_named(tiny_base, mug_photos, tmp_path):
    fit(tiny_base, mug_photos, tmp_path / "run", LoRA(rank=4), steps=[1, 2])
    exports = ("export", "--run", tmp_path / "run", "--out", tmp_path / "pair")
    weights = {str(n): s.weights for n, s in open_run(tmp_path / "run").snapshots.items()}
    record = {"early": 1, "late": 2, "weights": {**weights, "3": "of one that is gone"}}
    (tmp_path / "run" / "pair.json").write_text(json.dumps(record))
    status, _, said = command(main, *exports)
    assert status == 2 and "no picked pair of the snapshots that it has now" in said
    (tmp_path / "run" / "pair.json").write_text(json.dumps({**record, "weights": weights}))
    status, _, said = command(main, *exports)
    assert status == 0, said
    assert {path.name for path in (tmp_path / "pair").iterdir()} == {
        "early",
        "late",
        "predict.yaml",
    }
