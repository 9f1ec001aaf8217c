"""How the bases of every family lie on disk: sharded, in half precision, as one file of other
tools. What is loaded has the weights of the plain folder.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_family

from dreamblend.errors import InputError
from dreamblend.models import Backbone, load_backbone, locate_base
from dreamblend.models.loading import family_of_folder

VARIANTS = ("flux_schnell", "klein", "z_image_turbo")  # of families that are there
each_family = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.heavy] * (n in VARIANTS)) for n in FAMILIES]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return functools.partial(lambda name: save_family(name, root))


@pytest.fixture(scope="module")
def plain(folder):
    """The base of a family in its plain folder."""
    return functools.cache(lambda name: load_backbone(str(folder(name))))


def weights(model: Backbone) -> dict[str, torch.Tensor]:
    """Of all modules, with the autoencoder and what is never trained."""
    return {
        f"{i}.{key}": value
        for i, module in enumerate(model.modules())
        for key, value in module.state_dict().items()
    }


def parts_of(folder: Path) -> tuple[str, ...]:
    return family_of_folder(folder).LAYOUT.parts


def saved(source: Path, target: Path, **options) -> Path:
    """A copy of a pipeline folder whose parts are saved otherwise."""
    import diffusers

    shutil.copytree(source, target)
    pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype=options.pop("dtype", None))
    for part in parts_of(source):
        for file in (target / part).glob("*.safetensors"):
            file.unlink()
        getattr(pipe, part).save_pretrained(target / part, **options)
    return target


@each_family
def test_a_sharded_base_is_the_same(name, folder, plain, tmp_path):
    sharded = saved(folder(name), tmp_path / "sharded", max_shard_size="100KB")
    denoiser = parts_of(sharded)[0]
    assert len(list((sharded / denoiser).glob("*-of-*.safetensors"))) > 1
    wanted, found = weights(plain(name)), weights(load_backbone(str(sharded)))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@each_family
def test_a_base_of_half_precision_files_alone_is_the_same(name, folder, plain, tmp_path):
    """Sharded, but for its small parts."""
    options = {"variant": "fp16", "dtype": torch.float16, "max_shard_size": "60KB"}
    half = saved(folder(name), tmp_path / "half", **options)
    assert all(".fp16" in file.name for file in half.glob("*/*.safetensors"))
    assert any(".fp16-0000" in file.name for file in half.glob("*/*.safetensors"))
    wanted, model = weights(plain(name)), load_backbone(str(half))
    found = weights(model)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        rounded = value.half() if value.is_floating_point() else value
        assert torch.equal(found[key].to(rounded.dtype), rounded), key
    layout = family_of_folder(half).LAYOUT
    assert model.denoiser.dtype == (torch.float16 if layout.as_saved else torch.float32)
    assert model.vae.dtype == torch.float32  # half of it gives NaN


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_missing_shard_is_named(variant, folder, tmp_path):
    options = {"max_shard_size": "100KB", "variant": variant}
    sharded = saved(folder("flux_dev"), tmp_path / "sharded", **options)
    lost = sorted((sharded / "transformer").glob("*-of-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(InputError, match=f"{lost.name} is missing"):
        locate_base(str(sharded))


def test_weights_keep_the_dtype_of_the_files_that_are_read(folder, tmp_path):
    """Plain files count where those in half precision lie beside them."""
    both = shutil.copytree(folder("flux_dev"), tmp_path / "both")
    half = load_backbone(str(both)).denoiser.half()
    half.save_pretrained(both / "transformer", variant="fp16")
    assert load_backbone(str(both)).denoiser.dtype == torch.float32
