"""Other weights than a base's plain ones: a run says what it took, and what opens it takes them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_runs import fit, plain_pipeline, step

from dreamblend import DreamBlendPipeline
from dreamblend.blending.blends import Region
from dreamblend.blending.module import Blender
from dreamblend.errors import InputError
from dreamblend.export.what import What
from dreamblend.models import load_backbone
from dreamblend.selection.survey import Survey
from dreamblend.storage import snapshots


@pytest.fixture(scope="module")
def half(tiny_base, mug_photos, tmp_path_factory):
    """A base with other weights of the name fp16, and a run on these."""
    root = tmp_path_factory.mktemp("half")
    base = shutil.copytree(tiny_base, root / "base")
    pipe = plain_pipeline(base)
    for part in ("unet", "vae", "text_encoder"):
        getattr(pipe, part).half().save_pretrained(base / part, variant="fp16")
    fit(base, mug_photos, root / "run", steps=[1, 2], variant="fp16")
    return base, root / "run"


def test_snapshots_say_the_variant_and_blends_take_it(half):
    base, run = half
    about = snapshots.read(step(run, 2)).about
    wanted = load_backbone(str(base), variant="fp16")
    assert about.settings["variant"] == "fp16" and about.base_hash == wanted.fingerprint()
    blender = Blender("1", "2", run)
    assert blender.settings["base_weights"] == wanted.fingerprint(wanted.modules())
    assert "variant" not in blender.settings  # as it was not set here
    named = Blender("1", "2", run, variant="fp16").settings
    assert named == {**blender.settings, "variant": "fp16"}
    with pytest.raises(InputError, match="model.variant is bf16"):
        Blender("1", "2", run, variant="bf16")


def test_all_that_opens_a_run_takes_its_variant(half):
    base, run = half
    survey = Survey(run, ["a {subject}"], [0], Region(), judges="none")
    opened = [survey._load(), What((snapshots.read(step(run, 2)),)).backbone]
    assert [model.variant for model in opened] == ["fp16", "fp16"]


def test_a_saved_pair_keeps_the_variant(half, tmp_path):
    base, run = half
    made = DreamBlendPipeline.from_pretrained(run=run, early=1, late=2)
    made.save_pretrained(tmp_path / "pair")
    assert not (tmp_path / "pair/base/unet/diffusion_pytorch_model.safetensors").exists()
    again = DreamBlendPipeline.from_pretrained(tmp_path / "pair")
    assert again.models.base_weights == made.models.base_weights


# ------------------------------------------------------------------------------ another autoencoder
@pytest.fixture(scope="module")
def encoded(tiny_base, tiny_v_base, mug_photos, tmp_path_factory):
    """An autoencoder of another base in a folder of its own, and a run that was trained with it."""
    root = tmp_path_factory.mktemp("encoded")
    vae = shutil.copytree(tiny_v_base / "vae", root / "vae")
    return vae, fit(tiny_base, mug_photos, root / "run", steps=[1, 2], vae=str(vae)), root / "run"


def of_vae(model) -> str:
    return model.fingerprint([model.vae])


def test_photos_are_encoded_with_another_autoencoder(encoded, tiny_base, tiny_v_base, mug_photos):
    _, tuner, _ = encoded
    wanted = load_backbone(str(tiny_v_base))
    pixels = next(iter(tuner.data.instance_pixels(tuner.data.sizes[0], 0)))
    mean, deviation = wanted.encode(pixels)
    found = torch.stack([tuner.latents[False][i][0][0][0] for i in range(len(mean))])
    torch.testing.assert_close(found, mean)
    assert not torch.allclose(found, load_backbone(str(tiny_base)).encode(pixels)[0], atol=1e-2)


def test_what_opens_a_run_takes_its_autoencoder(encoded, tiny_base):
    vae, _, run = encoded
    settings = snapshots.read(step(run, 2)).about.settings
    blender, own = Blender("1", "2", run), load_backbone(str(tiny_base))
    wanted = of_vae(blender.load().late)
    assert settings["vae"] == str(vae) and settings["vae_weights"] == wanted != of_vae(own)
    assert blender.settings["vae"] == wanted
    survey = Survey(run, ["a {subject}"], [0], Region(), judges="none")
    export = What((snapshots.read(step(run, 2)),))
    assert of_vae(survey._load()) == of_vae(export.backbone) == wanted
    saved = export.model(None).pipe.vae.state_dict()
    assert all(torch.equal(saved[k], v) for k, v in blender.models.late.vae.state_dict().items())


def test_a_blend_that_names_another_autoencoder_says_so(encoded, tiny_base):
    _, _, run = encoded
    blender = Blender("1", "2", run, vae=str(tiny_base))
    with pytest.warns(UserWarning, match="trained with the autoencoder .* drawn with another"):
        blender.load()
    assert of_vae(blender.models.late) == of_vae(load_backbone(str(tiny_base)))


def test_an_autoencoder_that_is_gone_or_another_now_is_told(encoded, tiny_base, tmp_path):
    vae, _, run = encoded
    kept = shutil.move(vae, tmp_path / "kept")
    try:
        with pytest.raises(InputError, match=f"an autoencoder of their own: .*{vae}"):
            Blender("1", "2", run).load()
        shutil.copytree(tiny_base / "vae", vae)
        with pytest.raises(InputError, match=f"{vae}, which has other weights now"):
            Blender("1", "2", run).load()
    finally:
        shutil.rmtree(vae, ignore_errors=True)
        shutil.move(kept, vae)


def test_what_is_not_set_is_not_recorded(tiny_base, mug_photos, tmp_path):
    fit(tiny_base, mug_photos, tmp_path, steps=[1, 2])
    settings = json.loads((step(tmp_path, 2) / "snapshot.json").read_text())["settings"]
    assert not {"variant", "revision", "vae", "vae_weights"} & settings.keys()
