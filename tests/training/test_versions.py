"""Other weights than a base's plain ones: a run says what it took, and what opens it takes them."""

from __future__ import annotations

import json
import shutil

import pytest
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


def test_what_is_not_set_is_not_recorded(tiny_base, mug_photos, tmp_path):
    fit(tiny_base, mug_photos, tmp_path, steps=[1, 2])
    settings = json.loads((step(tmp_path, 2) / "snapshot.json").read_text())["settings"]
    assert not {"variant", "revision", "vae", "vae_weights"} & settings.keys()
