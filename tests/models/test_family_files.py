"""How the bases of every family, and models tuned elsewhere, lie on disk: sharded, in half
precision, as one file of other tools. What is loaded has the weights of the plain folder.
"""

from __future__ import annotations

import functools
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES, cross, save_family
from safetensors.torch import save_file
from single_files import denoiser, open_clip, vae

from dreamblend.errors import InputError
from dreamblend.models import Backbone, load_backbone, locate_base
from dreamblend.models.loading import family_of_folder
from dreamblend.sampling import initial_noise
from dreamblend.storage import snapshots
from dreamblend.tuning import restore

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


@pytest.mark.holds("load")
@each_family
def test_a_sharded_base_is_the_same(name, folder, plain, tmp_path):
    sharded = saved(folder(name), tmp_path / "sharded", max_shard_size="100KB")
    denoiser = parts_of(sharded)[0]
    assert len(list((sharded / denoiser).glob("*-of-*.safetensors"))) > 1
    wanted, found = weights(plain(name)), weights(load_backbone(str(sharded)))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.holds("load")
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

    both = shutil.copytree(folder(name), half, dirs_exist_ok=True)
    named = weights(load_backbone(str(both), variant="fp16"))
    assert all(torch.equal(named[key], value) for key, value in found.items())


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


# ------------------------------------------------------------------------------------- single files
SINGLE = [name for name in FAMILIES if name != "pixart_sigma"]  # which diffusers has no map of


@pytest.fixture
def narrow(monkeypatch):
    """diffusers' converter of FLUX.1, which knows one width, for another."""
    from diffusers.loaders import single_file_utils

    def of_width(width: int) -> None:
        converter = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
        code = converter.__code__
        known = tuple(width if value == 3072 else value for value in code.co_consts)
        monkeypatch.setattr(converter, "__code__", code.replace(co_consts=known))

    return of_width


@pytest.mark.holds("single file")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.heavy] * (n in VARIANTS)) for n in SINGLE]
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_of_the_denoiser_alone_takes_the_rest_from_its_configuration(
    name, prefix, folder, plain, narrow, tmp_path
):
    model, file = plain(name), tmp_path / "denoiser.safetensors"
    narrow(32)
    save_file(denoiser(model.denoiser, prefix), file)
    same(load_backbone(locate_base(str(file)), str(folder(name))), model)


@pytest.mark.holds("single file", of="sdxl")
def same(found: Backbone, wanted: Backbone) -> None:
    assert type(found) is type(wanted)
    ours, theirs = weights(found), weights(wanted)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_whole_sdxl_file_is_the_folder_it_was_made_from(tmp_path):
    """Its second text encoder is OpenCLIP's. The configuration needs no weights."""
    folder = tmp_path / "base"
    cross.sdxl(width=24, layers=10).save_pretrained(folder)  # by the tenth layer it is known
    model, file = load_backbone(str(folder)), tmp_path / "model.safetensors"
    first, second = model.text_encoders.values()
    parts = {
        "first_stage_model.": vae(folder),
        "conditioner.embedders.0.transformer.text_model.": {
            name.removeprefix("text_model."): value for name, value in first.state_dict().items()
        },
        "conditioner.embedders.1.model.": open_clip(second),
    }
    tensors = denoiser(model.denoiser, "model.diffusion_model.")
    tensors |= {start + name: value for start, of in parts.items() for name, value in of.items()}
    save_file(tensors, file)
    for weights_of_folder in folder.glob("*/*.safetensors"):
        weights_of_folder.unlink()
    same(load_backbone(str(file), str(folder)), model)


def test_a_file_with_its_autoencoder_is_lent_the_text_encoders_alone(folder, plain, tmp_path):
    """As the files of Stable Diffusion 3 are; of T5 a folder may do without."""
    model, file = plain("sd3"), tmp_path / "sd3.safetensors"
    config = shutil.copytree(folder("sd3"), tmp_path / "config")
    shutil.rmtree(config / "text_encoder_3")
    for part in ("vae", "transformer"):
        next((config / part).glob("*.safetensors")).unlink()
    tensors = denoiser(model.denoiser, "model.diffusion_model.")
    tensors |= {f"first_stage_model.{name}": value for name, value in vae(folder("sd3")).items()}
    save_file(tensors, file)
    with pytest.raises(InputError, match="text_encoder_3/config.json is missing"):
        load_backbone(str(file), str(config))
    shutil.copytree(
        folder("sd3") / "text_encoder_3",
        config / "text_encoder_3",
        ignore=shutil.ignore_patterns("*.safetensors"),
    )
    lent = load_backbone(str(file), str(config))
    ours, theirs = lent.vae.state_dict(), model.vae.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert lent.pipe.text_encoder_3 is None and lent.fingerprint() == model.fingerprint()


@pytest.mark.parametrize("name", ["flux_dev", "qwen_image"])
def test_a_file_of_the_denoiser_alone_says_what_it_needs(name, folder, plain, tmp_path):
    file = tmp_path / "denoiser.safetensors"
    save_file(denoiser(plain(name).denoiser), file)
    with pytest.raises(InputError, match="set model.base_config to"):
        load_backbone(str(file))
    config = shutil.copytree(
        folder(name), tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors")
    )
    with pytest.raises(InputError, match="holds no vae .*base_config to a whole pipeline"):
        load_backbone(str(file), str(config))


def test_a_pixart_file_is_not_taken_for_a_sana_file(plain, tmp_path):
    """Their blocks have the same names."""
    save_file(denoiser(plain("pixart_sigma").denoiser), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="is of the kind pixart"):
        locate_base(str(tmp_path / "model.safetensors"))


# ------------------------------------------------------------------------- snapshots made elsewhere
@torch.no_grad()
def predict(model: Backbone) -> torch.Tensor:
    z = initial_noise((model.latent_shape[0], *model.latent_size(64, 64)), [1])
    t = model.training_noise().timestep(torch.tensor([500]))
    return model.denoise(z, t, model.encode_prompts(["a photo of sks dog"]))


def restored(path: Path, model: Backbone) -> Backbone:
    """Without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snapshot = snapshots.read(path)
        assert snapshot.method == "full"
        return restore(snapshot, model, "late")


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    """A pipeline folder of a family whose denoiser and first text encoder have other weights."""

    @functools.cache
    def of(name: str) -> Path:
        import diffusers

        path = tmp_path_factory.mktemp("tuned") / name
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder(name))
        generator = torch.Generator().manual_seed(0)
        for module in (getattr(pipe, parts_of(folder(name))[0]), pipe.text_encoder):
            for value in module.parameters():
                value.data += 0.05 * torch.randn(value.shape, generator=generator)
        pipe.save_pretrained(path)
        return path

    return of


@each_family
def test_a_pipeline_folder_tuned_elsewhere_is_a_snapshot(name, plain, tuned):
    """With the text encoders that can be trained; language models are the base's."""
    model, theirs = plain(name), load_backbone(str(tuned(name)))
    found = restored(tuned(name), model)
    assert found.parts().keys() == theirs.parts().keys()
    wanted = model.replaced(**theirs.parts())
    torch.testing.assert_close(predict(found), predict(wanted), atol=0, rtol=0)
    assert (predict(found) - predict(model)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.heavy] * (n in VARIANTS)) for n in SINGLE]
)
def test_a_denoiser_tuned_elsewhere_is_a_snapshot(name, plain, tuned, narrow, tmp_path):
    """As other trainers save it, and ComfyUI reads it: text encoders are the base's."""
    model, file = plain(name), tmp_path / "tuned.safetensors"
    theirs = load_backbone(str(tuned(name))).denoiser
    narrow(32)
    save_file(denoiser(theirs), file)
    found = restored(file, model)
    wanted = model.replaced(**{model.denoiser_name: theirs})
    torch.testing.assert_close(predict(found), predict(wanted), atol=0, rtol=0)
    assert (predict(found) - predict(model)).abs().max() > 1e-3
    for part, encoder in model.text_encoders.items():
        assert found.text_encoders[part] is encoder
    assert found.vae is model.vae


def test_a_snapshot_with_an_autoencoder_leaves_the_bases_as_it_is(folder, plain, tuned, tmp_path):
    """And says so where it is another."""
    model, file = load_backbone(str(folder("sd3"))), tmp_path / "tuned.safetensors"
    model.to(dtype=torch.bfloat16)
    theirs = load_backbone(str(tuned("sd3"))).denoiser
    tensors = denoiser(theirs, "model.diffusion_model.")
    own = {f"first_stage_model.{name}": value for name, value in vae(folder("sd3")).items()}
    save_file(tensors | own, file)
    found = restored(file, model)
    assert found.vae is model.vae and model.vae.dtype == found.denoiser.dtype == torch.bfloat16
    save_file(tensors | {name: value + 0.1 for name, value in own.items()}, file)
    with pytest.warns(UserWarning, match="has another VAE"):
        restore(snapshots.read(file), model, "late")


def test_a_snapshot_of_another_family_or_size_is_refused(plain, tuned, tmp_path):
    file = tmp_path / "tuned.safetensors"
    save_file(denoiser(load_backbone(str(tuned("sd3"))).denoiser), file)
    with pytest.raises(InputError, match="is of Stable Diffusion 3, and .* is not"):
        restore(snapshots.read(file), plain("z_image"), "late")
    with pytest.raises(InputError, match="predicts flow_prediction, and its base .* epsilon"):
        restore(snapshots.read(tuned("sd3")), plain("sdxl"), "late")
    small = denoiser(load_backbone(str(tuned("sd3"))).denoiser)
    small = {name: value for name, value in small.items() if "blocks.1." not in name}
    save_file(small, file)
    with pytest.raises(InputError, match="it lacks joint_blocks.1"):
        restore(snapshots.read(file), plain("sd3"), "late")


@pytest.mark.parametrize("scale", ["scaled_fp8", "x_embedder.proj.scale_weight"])
def test_a_quantised_file_is_refused(scale, plain, tmp_path):
    """diffusers would take its numbers without their scales."""
    model, file = plain("sd3"), tmp_path / "quantised.safetensors"
    save_file(denoiser(model.denoiser) | {scale: torch.ones(1)}, file)
    with pytest.raises(InputError, match=f"is quantised.*{scale}.*bf16 or fp16"):
        locate_base(str(file))
    with pytest.raises(InputError, match="is quantised"):
        restore(snapshots.read(file), model, "late")
