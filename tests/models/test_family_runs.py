"""Every family through the whole story: train a LoRA, keep snapshots, diagnose, blend. And its loss
is that of diffusers' own training script.
"""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from families import FAMILIES, SMALL, UNTRAINABLE, save_family, small_bases
from safetensors.torch import load_file
from tiny_runs import fit

from dreamblend.blending.blends import Region
from dreamblend.blending.models import Models
from dreamblend.blending.module import Blender
from dreamblend.blending.pair import Pair
from dreamblend.errors import InputError
from dreamblend.evaluation.diagnosis import diagnose
from dreamblend.models import load_backbone
from dreamblend.sampling import initial_noise
from dreamblend.sandbox.world import SIZE
from dreamblend.storage import snapshots
from dreamblend.training.objective import add_noise, sample_loss, target
from dreamblend.tuning import CustomDiffusion, Full, LoRA, TextualInversion, TLoRA

TRAINED = [name for name in FAMILIES if name not in UNTRAINABLE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return functools.partial(lambda name: save_family(name, root))


@pytest.fixture
def small():
    with small_bases():
        yield


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.holds("train LoRA", "region")
def test_a_lora_trains_is_diagnosed_and_blends(name, folder, mug_photos, tmp_path, small):
    base = folder(name)
    module = fit(base, mug_photos, tmp_path, LoRA(rank=2), steps=[1, 3], data={"batch_size": 2})
    assert module.tuning.targets == list(module.backbone.lora_targets)
    blender = Blender(
        "1", "3", run=tmp_path, blend=Region(), num_inference_steps=2, guidance_scale=3.0
    )
    models = blender.load()
    pictures = blender.draw([("a sks mug on the beach", 7)], 1)
    assert [picture.kind for picture in pictures] == ["early", "region", "late"]
    for picture in pictures:
        assert picture.image.size == (SMALL, SMALL) and picture.words == ["sks", "mug", "beach"]
        assert picture.maps.isfinite().all() and picture.maps.max() > 0
        assert all(-1 <= value <= 64 for value in picture.collapse.values())
    if name == "flux_dev":
        draws_at_another_size(tmp_path)
    found = [snapshots.read(path) for _, path in snapshots.find(tmp_path)]
    rows = diagnose(
        models.base, found, ["a sks mug", "a sks mug on the moon"], "sks", "mug", blender.grid, 2
    )
    assert [row["step"] for row in rows] == [0, 1, 3] and rows[0]["divergence"] == 0


def draws_at_another_size(run):
    settings = {"run": run, "num_inference_steps": 2, "guidance_scale": 3.0}
    with pytest.raises(InputError, match="72 x 64 pixels cannot be drawn: both must be .* of 16"):
        Blender("1", "3", height=72, **settings).load()
    last = "single_transformer_blocks.*"
    blender = Blender("1", "3", attention_layers=[last], height=96, width=64, **settings)
    read = blender.load().late.sites(None, None, [last])
    assert read and not set(read) >= set(blender.models.late.sites())
    assert blender.settings["attention_layers"] == [last]
    assert blender.settings["size"] == [96, 64]
    for picture in blender.draw([("a sks mug on the beach", 7)], 1):
        assert picture.image.size == (64, 96) and picture.maps.shape[1:] == (blender.grid, 4)
        assert blender.grid == 6 and picture.maps.isfinite().all()


def test_a_smaller_resolution_is_trained_and_told(folder, mug_photos, tmp_path, monkeypatch):
    """SDXL hears the size of the photo and of what it trains on, cut nowhere."""
    told, forward = [], diffusers.UNet2DConditionModel.forward

    def listening(unet, *args, added_cond_kwargs, **kwargs):
        told.append(added_cond_kwargs["time_ids"].tolist())
        return forward(unet, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", listening)
    module = fit(
        folder("sdxl"), mug_photos, tmp_path, LoRA(rank=2), steps=[1], data={"resolution": 32}
    )
    side = 32 // module.backbone.pixels_a_latent
    assert module.latents[False][0][0][0].shape[-2:] == (side, side) and module.backbone.size > 32
    assert told == [[[SIZE, SIZE, 0, 0, 32, 32]]]
    ((_, snapshot),) = snapshots.find(tmp_path)
    assert snapshots.read(snapshot).about.settings["resolution"] == 32
    with pytest.raises(InputError, match="data.resolution is 20: for .* a multiple of 8"):
        fit(folder("sdxl"), mug_photos, tmp_path / "other", LoRA(), data={"resolution": 20})


@pytest.mark.holds("train full")
@pytest.mark.parametrize("name", TRAINED)
def test_all_weights_train(name, folder, mug_photos, tmp_path, small):
    """All of the denoiser: but for the few weights that no gradient reaches."""
    base = load_backbone(str(folder(name))).denoiser.state_dict()
    module = fit(folder(name), mug_photos, tmp_path, Full(), steps=[1], data={"batch_size": 2})
    trained = module.backbone.denoiser.state_dict()
    moved = {key for key in base if not torch.equal(base[key].float(), trained[key].float())}
    assert len(moved) > 0.8 * len(base)


@pytest.mark.parametrize("method", [Full, LoRA])
def test_what_trains_is_in_fp32_whatever_the_files_are_in(
    method, folder, mug_photos, tmp_path, small
):
    """Large bases are saved in bf16, in which a step of training is mostly rounded away."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder("flux_dev"))
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "base")
    assert load_backbone(str(tmp_path / "base")).denoiser.dtype == torch.bfloat16
    module = fit(
        tmp_path / "base",
        mug_photos,
        tmp_path / "run",
        method(),
        frozen_dtype="bf16",
        trainer={"precision": "bf16-mixed"},
    )
    dtypes = {(p.requires_grad, p.dtype) for p in module.backbone.denoiser.parameters()}
    frozen = {(False, torch.bfloat16)} if method is LoRA else set()
    assert dtypes == {(True, torch.float32)} | frozen


def test_full_snapshots_over_half_precision_are_drawn_as_they_were_trained(
    folder, mug_photos, tmp_path, small
):
    """The base's own bf16 would swallow small changes; what did not train stays in it."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder("flux_dev"))
    for part in (pipe.transformer, pipe.text_encoder_2):
        part.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path / "base")
    options = dict(steps=[1, 2], learning_rate=1e-6)
    fit(tmp_path / "base", mug_photos, tmp_path / "run", Full(), **options)
    models = Models.load(Pair.find(tmp_path / "run", "1", "2"), str(tmp_path / "base"))
    files = [next(p.glob("transformer/*.safetensors")) for _, p in snapshots.find(tmp_path / "run")]
    for view, file in zip((models.early, models.late), files):
        saved = load_file(file)
        assert all(torch.equal(v, saved[k]) for k, v in view.denoiser.state_dict().items())
    assert models.base.denoiser.dtype == torch.bfloat16
    others = models.late.untrained_encoders["text_encoder_2"]
    assert next(others.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", UNTRAINABLE)
@pytest.mark.refuses("train LoRA", "train full")
def test_what_is_distilled_to_a_few_steps_is_not_trained(name, folder, mug_photos, tmp_path):
    with pytest.raises(InputError, match=UNTRAINABLE[name]):
        fit(folder(name), mug_photos, tmp_path, LoRA(rank=2))


@pytest.mark.parametrize("method", [CustomDiffusion, TextualInversion, TLoRA])
def test_a_method_that_a_family_has_no_place_for_is_refused(method, folder, mug_photos, tmp_path):
    with pytest.raises(InputError, match="cannot learn a word|train LoRA"):
        fit(folder("flux_dev"), mug_photos, tmp_path, method())


# ------------------------------------------------------------------------------------------- losses
def script_weight(name: str, sigma: torch.Tensor) -> torch.Tensor:
    """Of the squared error of the prediction, as the family's script of diffusers has it by
    default.
    """
    if name == "sd3":  # precondition_outputs: the loss is of x_t - sigma v against the image
        return sigma**2
    return torch.ones_like(sigma)


@torch.no_grad()
@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_is_that_of_the_familys_training_script(name, folder):
    """For given latents, noise and level: noisy latents, prediction, target and weighting."""
    model = load_backbone(str(folder(name)))
    noise, index = model.training_noise(), torch.tensor([100, 700])
    shape = (model.latent_shape[0], *model.latent_size(SMALL, SMALL))
    z, eps = initial_noise(shape, [1, 2]), initial_noise(shape, [3, 4])
    text = model.encode_prompts(["a sks mug", "a sks mug on the beach"])
    alpha, sigma = noise.alpha[index], noise.sigma[index]
    predicted = model.denoise(add_noise(z, eps, alpha, sigma), noise.timestep(index), text)
    loss = sample_loss(predicted, target(noise.prediction, z, eps, alpha, sigma))
    loss = loss * noise.weight[index] if len(noise.weight) else loss

    scheduler = model.scheduler
    if noise.prediction == "epsilon":
        ddpm = diffusers.DDPMScheduler.from_config(scheduler.config)
        noisy, wanted, t = ddpm.add_noise(z, eps, index), eps, index
    elif name == "sana":  # the script's scheduler is one of flows, over Sana's configuration
        s = (index + 1) / 1000
        noisy, t = (1 - s).view(-1, 1, 1, 1) * z + s.view(-1, 1, 1, 1) * eps, (index + 1).float()
        wanted = eps - z
    else:
        s = scheduler.sigmas[999 - index]
        noisy, t = (1 - s).view(-1, 1, 1, 1) * z + s.view(-1, 1, 1, 1) * eps, 1000 * s
        wanted = eps - z
    error = ((model.denoise(noisy, t, text) - wanted) ** 2).flatten(1).mean(1)
    weight = script_weight(name, sigma)
    torch.testing.assert_close(loss, weight * error, atol=1e-4, rtol=1e-4)


def test_timesteps_have_the_density_of_the_scripts(folder):
    """Uniform, but for Stable Diffusion 3's, a logistic of a normal draw: its quartiles are
    1 / (1 + exp(+-.674)).
    """
    source = torch.Generator().manual_seed(0)
    for name in TRAINED:
        noise = load_backbone(str(folder(name))).training_noise()
        share = noise.draw(20000, source).double() / len(noise)
        quartiles = torch.quantile(share, torch.tensor([0.25, 0.5, 0.75], dtype=torch.double))
        wanted = [0.3375, 0.5, 0.6625] if name == "sd3" else [0.25, 0.5, 0.75]
        torch.testing.assert_close(quartiles, torch.tensor(wanted).double(), atol=0.02, rtol=0)
