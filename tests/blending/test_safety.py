"""A base's own safety checker: what it flags is not written, and black in Python."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from processes import together
from tiny_runs import QUIET, command, fit
from transformers import CLIPConfig, CLIPImageProcessorPil

from blend import main
from dreamblend import DreamBlendPipeline
from dreamblend.callbacks import Preview
from dreamblend.errors import InputError
from dreamblend.models import load_backbone
from dreamblend.models.loading import load_checker
from dreamblend.sampling import draw
from dreamblend.selection.command import select
from dreamblend.training.class_images import CHUNK, SEEDS, draw_priors, missing_priors
from dreamblend.tuning import LoRA

CALL = {"num_inference_steps": 2, "guidance_scale": 4.0}
PROMPT = "a sks mug on the beach"


def save_checker(base: Path, threshold: float) -> None:
    """Give a base a tiny safety checker. A concept's score is a cosine, which no image has above 1
    and every one above -1: these are the thresholds that flag none and all.
    """
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=4)
    )
    torch.nn.init.constant_(checker.concept_embeds_weights, threshold)
    size = {"height": 32, "width": 32}
    diffusers.StableDiffusionPipeline(
        **diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None).components
        | {
            "safety_checker": checker,
            "feature_extractor": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size),
        }
    ).save_pretrained(base)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base, mug_photos) -> Path:
    folder = tmp_path_factory.mktemp("safety")
    fit(tiny_base, mug_photos, folder / "run", LoRA(rank=2), steps=[1, 3])
    for name, threshold in (("all", -1.1), ("none", 1.1)):
        shutil.copytree(tiny_base, folder / name)
        save_checker(folder / name, threshold)
    return folder


def predicted(run: Path, base: Path, out: Path, *more: object) -> tuple[int, str]:
    settings = [word for name, value in CALL.items() for word in (f"--model.{name}", value)]
    status, _, said = command(
        main,
        *("predict", "--run", run / "run", "--early", 1, "--late", 3, "--model.base", base),
        *("--prompts", json.dumps([PROMPT]), "--seeds", "1-2", "--out", out),
        *(*settings, *QUIET, *more),
    )
    return status, said


def images(out: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)) for p in sorted(out.glob("images/*/*.png"))}


def test_predict_leaves_out_what_is_flagged_and_says_so(run, tmp_path):
    status, said = predicted(run, run / "all", tmp_path / "all")
    assert status and images(tmp_path / "all") == {}
    assert "2 of 2 pairs gave images that the base's safety checker takes for unsafe" in said
    assert f"{PROMPT!r} with seed 1, {PROMPT!r} with seed 2" in said and "NaN" not in said


@pytest.mark.heavy
def test_what_is_not_flagged_is_drawn_and_recorded_as_without_a_checker(run, tiny_base, tmp_path):
    """A checker that is turned off is recorded."""
    drawn = {}
    for name, base, more in (
        ("plain", tiny_base, ()),
        ("none", run / "none", ()),
        ("off", run / "all", ("--model.safety_checker", "false")),
    ):
        status, said = predicted(run, base, tmp_path / name, *more)
        assert status == 0, said
        drawn[name] = images(tmp_path / name)
        lines = (tmp_path / name / "results.jsonl").read_text().splitlines()
        settings = [json.loads(line)["settings"] for line in lines]
        assert all(s.get("safety_checker", True) is (name != "off") for s in settings)
        weights = {s["base_weights"] for s in settings}
        assert weights == {load_backbone(str(tiny_base)).fingerprint(modules(tiny_base))}
    assert len(drawn["plain"]) == 6
    for name in ("none", "off"):
        assert all(np.array_equal(drawn[name][k], v) for k, v in drawn["plain"].items())


def modules(base: Path) -> list[torch.nn.Module]:
    return load_backbone(str(base)).modules()


@pytest.mark.heavy
def test_the_first_of_two_processes_names_what_the_other_left_out(run, tmp_path):
    def work(rank: int) -> None:
        status, said = predicted(run, run / "all", tmp_path / "out", "--trainer.devices", 2)
        (tmp_path / f"{rank}.txt").write_text(f"{status} {said}")

    assert together(2, work) == [0, 0]
    said = (tmp_path / "0.txt").read_text()
    assert said[0] != "0" and "2 of 2 pairs gave images that the base's safety checker" in said
    assert "with seed 1" in said.splitlines()[-1] and "with seed 2" in said.splitlines()[-1]


@pytest.mark.parametrize("threshold", ["all", pytest.param("none", marks=pytest.mark.heavy)])
def test_the_pipeline_blackens_what_is_flagged_as_diffusers_does(threshold, run):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(run / threshold)
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs(PROMPT, output_type="np", **CALL)
    early, late = (run / "run" / "snapshots" / f"step-00000{step}" for step in (1, 3))
    over = DreamBlendPipeline.from_pipe(theirs, early=early, late=late)
    for ours in (
        over,
        DreamBlendPipeline.from_pretrained(run / threshold, early=early, late=late),
    ):
        ours.set_progress_bar_config(disable=True)
        made = ours([PROMPT] * 2, output_type="np", compare=True, **CALL)
        for output in (made, made.early, made.late):
            assert output.nsfw_content_detected == wanted.nsfw_content_detected * 2
            assert (output.images.max() == 0) == (wanted.images.max() == 0) == (threshold == "all")
        assert ours(PROMPT, output_type="latent", **CALL).nsfw_content_detected is None
        (image,), (flagged,) = ours(PROMPT, return_dict=False, **CALL)
        assert flagged == (image.getextrema() == ((0, 0),) * 3) == (threshold == "all")


def test_class_images_that_are_flagged_are_drawn_again(run, tiny_base, mug_photos, tmp_path):
    model, checker = load_backbone(str(tiny_base)), load_checker(str(run / "none"))
    images = draw(model, ["a mug"] * 4, [0, 1, 2, 3], 2, 4.0)
    for threshold in np.linspace(-1, 1, 401):  # one that flags some of them
        torch.nn.init.constant_(checker.checker.concept_embeds_weights, threshold)
        flagged = checker.flags(images)
        if 0 < sum(flagged) < 4:
            break
    paths = missing_priors(tmp_path, 4)
    with pytest.warns(UserWarning, match="unsafe by the base's safety checker, and not written"):
        draw_priors(model, "a mug", paths, "hash", 2, 4.0, checker)
    assert [path.exists() for path in paths] == [not flag for flag in flagged]
    missing = missing_priors(tmp_path, 4)
    draw_priors(model, "a mug", missing, "hash", 2, 4.0, attempt=1)
    seed = SEEDS + int(missing[0].stem)
    (wanted,) = draw(model, ["a mug"], [seed], 2, 4.0)
    with Image.open(missing[0]) as image:
        assert image.tobytes() == wanted.tobytes() and json.loads(image.info[CHUNK])["seed"] == seed
    data = {"num_class_images": 1, "class_images_dir": tmp_path / "flagged"}
    with pytest.raises(InputError, match="took 5 class images for 'a mug' in a row for unsafe"):
        fit(run / "all", mug_photos, tmp_path / "run", data=data)


def test_previews_and_pages_of_select_leave_out_what_is_flagged(run, mug_photos, tmp_path):
    preview = Preview(["a {subject}"], seeds=1, num_inference_steps=1)
    with pytest.warns(UserWarning, match="left out of the preview of step 3: 'a sks mug' with"):
        fit(run / "all", mug_photos, tmp_path, LoRA(rank=2), steps=[1, 3], callbacks=(preview,))
    with Image.open(tmp_path / "previews" / "step-000003.png") as sheet:
        assert sheet.getextrema() == ((255, 255),) * 3
    call = {"prompts": ["a {subject}"], "seeds": "0", "num_inference_steps": 1, "judges": "none"}
    for shown in (False, True):
        with nullcontext() if shown else pytest.warns(UserWarning, match="not shown on the page"):
            select(tmp_path, **call, safety_checker=not shown)
        assert len(list(tmp_path.glob(".survey/*/*.png"))) == 3 * shown  # the base and two


def test_a_checker_that_is_named_and_not_there_is_told_and_may_be_left_out(run, tmp_path):
    base = shutil.copytree(run / "none", tmp_path / "base")
    (base / "safety_checker" / "model.safetensors").rename(base / "safety_checker" / "model.bin")
    with pytest.raises(InputError, match="no .safetensors weights.*model.safety_checker to false"):
        load_backbone(str(base), safety_checker=True)
    shutil.rmtree(base / "safety_checker")
    with pytest.raises(InputError, match="config.json is missing.*safety_checker=False"):
        load_backbone(str(base), safety_checker=True)
    assert load_backbone(str(base)).safety is None


def test_it_moves_with_the_model_and_counts_in_no_fingerprint(run, tiny_base):
    model = load_backbone(str(run / "none"), safety_checker=True).to(dtype=torch.bfloat16)
    assert next(model.safety.checker.parameters()).dtype == torch.bfloat16
    assert model.safety.checker not in model.modules()
