"""Exported pipelines and single files draw what the snapshots draw, in plain diffusers."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from families import FAMILIES, cross, save_family
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import fit, step

from dreamblend.errors import InputError
from dreamblend.export.command import export
from dreamblend.models import Backbone, load_backbone
from dreamblend.sampling import draw, initial_noise
from dreamblend.storage import snapshots
from dreamblend.tuning import METHODS, restore

RATES = {"textual-inversion": 1.0, "custom-diffusion": 1e-2}
PROMPT = "a sks mug on the beach"


@pytest.fixture(scope="module")
def run(tiny_base, mug_photos, tmp_path_factory):
    """The folder of a run of a method, with snapshots of steps 1 and 2."""

    @functools.cache
    def of(method: str, **options):
        out = tmp_path_factory.mktemp(method)
        tuning = METHODS[method](**options)
        rate = RATES.get(method, 1e-2)
        fit(tiny_base, mug_photos, out, tuning, steps=[1, 2], learning_rate=rate)
        return out

    return of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")

    @functools.cache
    def of(name: str):
        if name != "sdxl":
            return save_family(name, root)
        # diffusers knows the second text encoder of a file by its tenth layer
        cross.sdxl(width=24, layers=10).save_pretrained(root / name)
        return root / name

    return of


def ours(path, base) -> Backbone:
    return restore(snapshots.read(path), load_backbone(str(base)), "late")


def drawn(model: Backbone) -> np.ndarray:
    return np.asarray(draw(model, [PROMPT], [3], 3, 5.0)[0]).astype(int)


def drawn_by_diffusers(pipe, prompt: str = PROMPT) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompt,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    return (images[0] * 255).round().astype(int)


@torch.no_grad()
def predicted(model: Backbone) -> torch.Tensor:
    z = initial_noise((model.latent_shape[0], *model.latent_size(64, 64)), [1])
    t = model.training_noise().timestep(torch.tensor([500]))
    return model.denoise(z, t, model.encode_prompts(["a photo of sks dog"]))


@pytest.mark.parametrize(
    "method",
    [
        *("full", "lora", "textual-inversion"),
        pytest.param("custom-diffusion", marks=pytest.mark.heavy),
    ],
)
def test_a_pipeline_draws_what_the_snapshot_draws(method, run, tiny_base, tmp_path, capsys):
    from diffusers import DiffusionPipeline

    out = export(tmp_path / "pipeline", "pipeline", run=run(method), snapshot="2")
    wanted = drawn(ours(step(run(method), 2), tiny_base))
    pipe = DiffusionPipeline.from_pretrained(out, safety_checker=None)
    learned = "learned word <sks>" in capsys.readouterr().out
    assert learned == (method in ("custom-diffusion", "textual-inversion"))
    found = drawn_by_diffusers(pipe, PROMPT.replace("sks", "<sks>") if learned else PROMPT)
    assert np.abs(found - wanted).max() <= 1  # of 255
    plain = drawn(load_backbone(str(tiny_base)))
    assert np.abs(plain - wanted).max() > 3


def test_the_weights_of_a_full_snapshot_are_in_its_pipeline_bit_by_bit(run, tiny_base, tmp_path):
    out = export(tmp_path / "pipeline", "pipeline", run=run("full"), snapshot="1")
    wanted, found = ours(step(run("full"), 1), tiny_base), load_backbone(str(out))
    for name, module in wanted.components().items():
        theirs = found.components()[name].state_dict()
        assert all(torch.equal(theirs[key], value) for key, value in module.state_dict().items())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.heavy)])
def test_a_merge_lies_between_its_pair(method, run, tiny_base, tmp_path):
    """As the blend Merge draws it; a share of 0 is the early one and 1 the late one."""
    from diffusers import DiffusionPipeline

    def weight(path) -> torch.Tensor:
        pipe = DiffusionPipeline.from_pretrained(path, safety_checker=None)
        return pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.detach()

    source = dict(run=run(method), early="1", late="2")
    at = {
        share: weight(export(tmp_path / f"{share}", "pipeline", merge=share, **source))
        for share in (0.0, 0.3, 1.0)
    }
    for share, number in ((0.0, 1), (1.0, 2)):
        alone = weight(
            export(tmp_path / f"step{number}", "pipeline", run=run(method), snapshot=str(number))
        )
        torch.testing.assert_close(at[share], alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(at[0.3], torch.lerp(at[0.0], at[1.0], 0.3), atol=1e-6, rtol=0)
    assert (at[0.0] - at[1.0]).abs().max() > 1e-4


def test_a_merge_of_loras_is_a_lora_of_both_and_by_a_rank_one_of_fewer(run, tiny_base, tmp_path):
    source = dict(run=run("lora"), early="1", late="2", merge=0.4)
    wanted = predicted(load_backbone(str(export(tmp_path / "pipeline", "pipeline", **source))))
    for form, name in (("diffusers", "lora"), ("kohya", "lora.safetensors")):
        out = export(tmp_path / name, form, **source)
        found = predicted(ours(out, tiny_base))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    small = export(tmp_path / "small.safetensors", "kohya", rank=2, **source)
    downs = [value for key, value in load_file(small).items() if key.endswith("down.weight")]
    assert downs and all(len(value) == 2 for value in downs)


def test_a_lora_is_extracted_from_all_weights(run, tiny_base, tmp_path, capsys):
    """At full rank it is all of the change but that of biases and norms."""
    source = dict(run=run("full"), snapshot="2")
    out = export(tmp_path / "lora", rank=4096, **source)
    said = capsys.readouterr().out
    kept = float(said.split("keeps ")[1].split("%")[0])
    assert 50 < kept < 100
    base, tuned = load_backbone(str(tiny_base)), ours(step(run("full"), 2), tiny_base)
    with torch.no_grad():  # what a LoRA does not hold, as in the base
        for name, value in tuned.denoiser.named_parameters():
            if value.ndim == 1:
                value.copy_(base.denoiser.get_parameter(name))
    found = predicted(ours(out, tiny_base))
    torch.testing.assert_close(found, predicted(tuned), atol=1e-4, rtol=1e-3)
    with pytest.raises(InputError, match="snapshot of all weights.*--rank"):
        export(tmp_path / "none", **source)


def test_a_stable_diffusion_file_is_the_snapshot(run, tiny_base, tmp_path):
    """Read by diffusers as a pipeline, and by the project as a base and as a snapshot."""
    from diffusers import StableDiffusionPipeline

    file = export(tmp_path / "all.safetensors", "single_file", run=run("full"), snapshot="2")
    tuned = ours(step(run("full"), 2), tiny_base)
    pipe = StableDiffusionPipeline.from_single_file(file, config=str(tiny_base))
    assert np.abs(drawn_by_diffusers(pipe) - drawn(tuned)).max() <= 1
    torch.testing.assert_close(predicted(ours(file, tiny_base)), predicted(tuned), atol=0, rtol=0)
    with safe_open(file, framework="pt") as opened:
        said = opened.metadata()
    assert said["modelspec.architecture"] == "stable-diffusion-v1" and said["ss_steps"] == "2"
    assert said["modelspec.trigger_phrase"] == "sks mug"
    assert str(tiny_base) not in json.dumps(said)  # the user's folders are nobody's business


@pytest.mark.parametrize("dtype", [pytest.param("fp16", marks=pytest.mark.heavy), "bf16"])
def test_a_dtype_is_that_of_the_weights(dtype, run, tmp_path):
    source = dict(run=run("lora"), snapshot="2", dtype=dtype)
    file = export(tmp_path / "x.safetensors", "kohya", **source)
    plain = export(tmp_path / "y.safetensors", "kohya", run=run("lora"), snapshot="2")
    wanted = load_file(plain)
    for key, value in load_file(file).items():
        if key.endswith(".weight"):
            assert value.dtype == snapshots.DTYPES[dtype]
            assert torch.equal(value, wanted[key].to(value.dtype))
    out = export(tmp_path / "pipeline", "pipeline", **source)
    (weights,) = (out / "unet").glob("*.safetensors")
    assert {v.dtype for v in load_file(weights).values()} == {snapshots.DTYPES[dtype]}


def test_a_pipeline_keeps_the_safety_checker_of_its_base(run, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "safety_checker").mkdir()
    (base / "safety_checker" / "config.json").write_text("{}")
    index = json.loads((base / "model_index.json").read_text())
    named = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index |= {"safety_checker": named, "requires_safety_checker": True}
    (base / "model_index.json").write_text(json.dumps(index))
    out = export(tmp_path / "pipeline", "pipeline", run=run("full"), snapshot="2", base=str(base))
    found = json.loads((out / "model_index.json").read_text())
    assert found["safety_checker"] == named and found["requires_safety_checker"]
    assert (out / "safety_checker" / "config.json").is_file()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.heavy] * (n != "z_image")) for n in FAMILIES]
)
def test_what_is_tuned_of_every_family_comes_back(name, folder, tmp_path):
    """As a pipeline folder and as one file, of a pipeline that was tuned elsewhere."""
    import diffusers

    base, tuned = folder(name), tmp_path / "tuned"
    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    for i, value in enumerate(denoiser.parameters()):
        value.data += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
    pipe.save_pretrained(tuned)
    source = dict(snapshot=str(tuned), base=str(base))
    wanted = load_backbone(str(tuned)).denoiser.state_dict()
    out = export(tmp_path / "pipeline", "pipeline", **source)
    whole = diffusers.DiffusionPipeline.from_pretrained(out)  # nothing is missing
    found = (getattr(whole, "unet", None) or whole.transformer).state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    file = tmp_path / "file.safetensors"
    if name == "pixart_sigma":
        with pytest.raises(InputError, match="no single file of PixArt"):
            export(file, "single_file", **source)
        assert not file.exists() and not list(tmp_path.glob(".*"))
        return
    export(file, "single_file", **source)
    if name.startswith("flux_"):  # whose converter knows the real width alone
        return
    again = ours(file, base).denoiser.state_dict()
    assert all(torch.equal(again[key], value) for key, value in wanted.items())


def test_a_pair_is_one_folder_with_what_predict_is_to_be_told(run, tiny_base, tmp_path):
    import yaml

    out = export(tmp_path / "pair", "kohya", run=run("lora"), early="1", late="2")
    said = yaml.safe_load((out / "predict.yaml").read_text())
    assert said == {"model": {"base": str(tiny_base), "identifier": "sks", "class_noun": "mug"}}
    for name, number in (("early", 1), ("late", 2)):
        found = predicted(ours(out / f"{name}.safetensors", tiny_base))
        wanted = predicted(ours(step(run("lora"), number), tiny_base))
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_a_model_card_says_what_is_known_and_what_is_not(run, tiny_base, tmp_path):
    from huggingface_hub import ModelCard

    source = dict(form="hub", run=run("lora"), snapshot="2")
    card = ModelCard.load(export(tmp_path / "plain", **source) / "README.md")
    assert card.data.license == "unknown" and "Not stated" in card.text
    assert card.data.base_model == tiny_base.name and "lora" in card.data.tags
    assert card.data.instance_prompt == "a sks mug"
    out = export(tmp_path / "stated", license="openrail++", **source)
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "openrail++" and "learning_rate | 0.01" in card.text
    assert str(tmp_path.parent) not in (out / "README.md").read_text()
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    whole = export(tmp_path / "whole", "hub", run=run("full"), early="1", late="2", merge=0.5)
    assert (whole / "model_index.json").is_file()
    assert "0.5 of snapshot 1 and 0.5 of 2" in (whole / "README.md").read_text()


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(form="tar"), "--form is 'tar'"),
        (dict(dtype="fp8"), "--dtype is 'fp8'"),
        (dict(rank=0), "--rank is 0"),
        (dict(form="kohya"), r"\.safetensors at its end"),
        (dict(form="pipeline", rank=4), "--rank is the rank of a LoRA"),
        (dict(images="x"), "--images are for a model card"),
        (dict(merge=0.5), "are of a pair"),
        (dict(snapshot=None), "has no picked pair"),
        (dict(snapshot=None, early="1"), "name both"),
        (dict(snapshot=None, early="1", late="2", merge=1.5), "--merge is 1.5"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_writes_nothing(options, said, run, tmp_path):
    options = {"run": run("lora"), "snapshot": "2"} | options
    with pytest.raises(InputError, match=said):
        export(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.heavy
def test_what_a_form_cannot_hold_is_refused(run, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(InputError, match="learned a word.*--form pipeline"):
        export(out, "kohya", run=run("textual-inversion"), snapshot="2")
    with pytest.raises(InputError, match="learned word a single file cannot hold"):
        export(out, "single_file", run=run("custom-diffusion"), snapshot="2")
    with pytest.raises(InputError, match="masks its directions"):
        export(out, "single_file", run=run("t-lora"), snapshot="2")
    with pytest.raises(InputError, match="leave out --rank and --merge"):
        export(out, "kohya", run=run("t-lora"), early="1", late="2", merge=0.5)
    out.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export(out, "kohya", run=run("lora"), snapshot="2")
    assert out.read_text() == "mine" and list(tmp_path.iterdir()) == [out]


@pytest.mark.heavy
def test_a_t_lora_keeps_its_mask_for_the_project(run, tiny_base, tmp_path, capsys):
    out = export(tmp_path / "out", run=run("t-lora"), snapshot="2")
    assert "without its mask" in capsys.readouterr().out
    assert snapshots.read(out).method == "t-lora"
    wanted = predicted(ours(step(run("t-lora"), 2), tiny_base))
    torch.testing.assert_close(predicted(ours(out, tiny_base)), wanted, atol=0, rtol=0)
