"""`select` picks the pair of another trainer's run, and `predict` draws it."""

from __future__ import annotations

import csv
import functools
import json
import re
import shlex
import shutil
from pathlib import Path

import foreign_runs
import pytest
import torch
from foreign_runs import as_kohya
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import QUIET, command, fit, plain_pipeline, step, succeeding

from blend import main
from dreamblend.models import load_backbone
from dreamblend.storage.runs import Run, open_run
from dreamblend.storage.trainers import recognise
from dreamblend.tuning import LoRA

FEW = ["--num_inference_steps", 2, "--seeds", "7-8"]
PROBES = ["--prompts", '["a picture of a {subject} on the moon"]']
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def loras(mug_photos, tmp_path_factory) -> list:
    """Of a short run on the sandbox, under kohya's names."""
    out = tmp_path_factory.mktemp("made") / "run"
    few = {"batch_size": 4}
    fit("sandbox", mug_photos, out, LoRA(rank=2), steps=[2, 12], learning_rate=2e-2, data=few)
    files = [step(out, n) / "pytorch_lora_weights.safetensors" for n in (2, 12)]
    alpha = LoRA(rank=2).alpha
    return [as_kohya(file, alpha=alpha) for file in files]


ran = functools.partial(succeeding, main)


@pytest.fixture
def kohya(loras, tmp_path) -> Path:
    return foreign_runs.kohya(tmp_path / "kohya", loras)


def of_the_guide(command: str) -> list[str]:
    """The words of the guide's command for another trainer's run, on the sandbox."""
    section = (ROOT / "docs/guide.md").read_text().split("## The run of another trainer")[1]
    lines = section.split("```")[1].replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith(f"python blend.py {command}")]
    return [re.sub("stable-diffusion-v1-5/.*", "sandbox", word) for word in shlex.split(line)[2:]]


@pytest.mark.heavy
def test_select_picks_the_pair_of_a_kohya_run_and_predict_draws_it(
    loras, mug_photos, tmp_path, monkeypatch
):
    """By the guide's commands, in little."""
    monkeypatch.chdir(tmp_path)
    for name, target in (("photos/mug", mug_photos), ("configs", ROOT / "configs")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(target)
    kohya = foreign_runs.kohya(Path("runs/mug-kohya"), loras)
    status, _, err = command(main, "select", "--run", kohya)
    assert status == 2 and "--base and --photos" in err and err.count("\n") == 1

    said = ran(*of_the_guide("select"), *FEW, *PROBES)
    assert "a run of kohya sd-scripts or musubi-tuner, 2 checkpoints, steps 30 to 60" in said
    pair = json.loads((kohya / "pair.json").read_text())
    assert (pair["early"], pair["late"]) == (30, 60) and (kohya / "pair.html").is_file()

    rows = list(csv.DictReader((kohya / "checkpoints.csv").open()))
    kinds = ["base", "snapshot", "snapshot", *["blend"] * len(pair["blends"])]
    assert [row["kind"] for row in rows] == kinds
    assert [Path(row["file"]).name for row in rows[1:3]] == [
        "mug-000001.safetensors",
        "mug.safetensors",
    ]
    assert float(rows[2]["subject"]) == pair["snapshots"][1]["subject"]
    assert (kohya / "pair.html").read_text().count("<img") == 3  # of one prompt: base, both
    assert pair["best"]["step"] in (30, 60) and f"the best alone is {pair['best']['step']}" in said

    # what select was told is kept: predict asks for nothing
    drawn = [*of_the_guide("predict"), "--seeds", 0, "--model.num_inference_steps", 2, *QUIET]
    assert "early 30 and late 60" in ran(*drawn)
    index = Path("runs/mug-kohya-blend/results.jsonl")
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    assert {(Path(a["early"]).name, Path(a["late"]).name) for a in lines} == {
        ("mug-000001.safetensors", "mug.safetensors")
    }
    assert {a["kind"] for a in lines} == {"early", "region", "late"}
    # tables call the checkpoints as the command line does
    rows = json.loads(index.with_name("collapse.json").read_text())["snapshots"]
    assert [row["step"] for row in rows] == [0, 30, 60] and rows[1]["name"].startswith("runs/mug")
    page = index.with_name("report.html").read_text()
    assert '<th scope="row">30</th>' in page and '<th scope="row">runs/mug' not in page
    # the same snapshots by their steps are the same images
    before = index.read_bytes()
    ran(*drawn, "--early", 30, "--late", 60)
    assert index.read_bytes() == before


def test_without_judges_and_photos_select_draws_and_picks_nothing(kohya, tmp_path):
    out = tmp_path / "measured"
    few = ["--num_inference_steps", 1, "--seeds", "7", *PROBES, "--base", "sandbox"]
    sized = ["--height", 64, "--width", 32, "--offload", "model"]
    said = ran("select", "--run", kohya, *few, *sized, "--judges", "none", "--out", out)
    assert "no pair was picked" in said and not (out / "pair.json").exists()
    assert not [p for p in kohya.iterdir() if p.suffix != ".safetensors"]
    rows = list(csv.DictReader((out / "checkpoints.csv").open()))
    assert len(rows) == 3 and rows[1]["context_mass"] and not rows[1]["subject"]
    assert (out / "checkpoints.html").read_text().count("<img") == 3
    assert {Image.open(p).size for p in out.glob(".survey/*/*.png")} == {(32, 64)}


def ignores_prompts(base: Path, share: float) -> dict[str, torch.Tensor]:
    """A LoRA that takes away a share of what a UNet reads from its prompt."""
    return {
        f"unet.{name}.{factor}": value
        for name, layer in plain_pipeline(base).unet.named_modules()
        if name.endswith("attn2.to_v")
        for factor, value in (
            ("lora_A.weight", torch.eye(layer.weight.shape[1])),
            ("lora_B.weight", -share * layer.weight.detach()),
        )
    }


def test_without_judges_a_last_one_that_ignores_prompts_is_told(tiny_base, tmp_path):
    loras = [ignores_prompts(tiny_base, share) for share in (0.1, 1.0)]
    run = foreign_runs.kohya(tmp_path / "run", loras)
    few = ["--num_inference_steps", 1, "--seeds", "7", "--base", tiny_base]
    two = ["--prompts", '["a {subject} on the moon", "a red {subject} in a city"]']
    said = ran("select", "--run", run, *few, *two, "--judges", "none")
    assert "the last one, 60, has collapsed: its prompt sensitivity is 0.000 of the base's" in said
    assert "has collapsed" in (run / "checkpoints.html").read_text()
    base, early, late = csv.DictReader((run / "checkpoints.csv").open())
    assert float(base["prompt_sensitivity"]) == pytest.approx(1)
    assert 0.5 < float(early["prompt_sensitivity"]) < 1
    assert float(late["prompt_sensitivity"]) == pytest.approx(0, abs=1e-5)


@pytest.mark.heavy
def test_the_version_of_the_base_and_the_autoencoder_are_those_that_are_named(
    tiny_base, tiny_v_base, tmp_path
):
    """The variant is of another UNet here, and so is the autoencoder."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = "diffusion_pytorch_model{}.safetensors"
    shutil.copy(tiny_v_base / "unet" / weights.format(""), base / "unet" / weights.format(".fp16"))
    run = foreign_runs.kohya(tmp_path / "run", [ignores_prompts(base, x) for x in (0.1, 0.9)])
    few = ["--num_inference_steps", 1, "--seeds", "7", *PROBES, "--base", base]
    for more in ([], ["--variant", "fp16"], ["--vae", tiny_v_base / "vae"]):
        ran("select", "--run", run, *few, "--judges", "none", *more)
    images = list(run.glob(".survey/*/*.png"))
    assert len(images) == len({image.read_bytes() for image in images}) == 9
    none = ("--judges", "none", "--variant", "none-such")
    status, _, err = command(main, "select", "--run", run, *few, *none)
    assert status == 2 and "none-such" in err

    exported = ["export", "--run", run, "--snapshot", 60, "--base", base, "--form", "pipeline"]
    untrained = {}
    for name, more in (("plain", []), ("fp16", ["--variant", "fp16"])):
        ran(*exported, "--out", tmp_path / name, *more)
        unet = load_file(tmp_path / name / "unet" / weights.format(""))
        untrained[name] = unet["conv_in.weight"]
    wanted = load_file(base / "unet" / weights.format(".fp16"))["conv_in.weight"]
    assert torch.equal(untrained["fp16"], wanted)
    assert not torch.equal(untrained["plain"], wanted)


@pytest.mark.heavy
def test_predict_picks_with_the_autoencoder_that_it_draws_with(loras, mug_photos, tmp_path):
    vae = load_backbone("sandbox").vae
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.2
    vae.save_pretrained(tmp_path / "vae")
    told = {"base": "sandbox", "identifier": "sks", "class_noun": "mug"}
    asked = [word for name in told for word in (f"--model.{name}", told[name])]
    asked += ["--model.num_inference_steps", 1, "--prompts", '["a {subject}"]', *QUIET]
    measured = []
    for name, more in (("own", ()), ("other", ("--model.vae", tmp_path / "vae"))):
        run = foreign_runs.one_trainer(tmp_path / name, loras, "sandbox", mug_photos)
        ran("predict", "--run", run, "--out", tmp_path / f"{name}-drawn", *asked, *more)
        pair = json.loads((open_run(run).results / "pair.json").read_text())
        measured.append(pair["base"]["subject"])
    assert measured[0] != measured[1]


def test_results_elsewhere_stand_for_the_run(kohya, tmp_path, mug_photos):
    """As where the folder of the run cannot be written."""
    out = tmp_path / "measured"
    told = Run(kohya, kohya, out, recognise(kohya), "sandbox", None, None, "sks", "mug", mug_photos)
    out.mkdir()
    (out / "pair.json").write_text(json.dumps(told.told))
    again = open_run(out)
    assert again.results == out and list(again.snapshots) == [30, 60]
    assert (again.base, again.photos) == ("sandbox", mug_photos)
