"""What a GPU does, of every family without one: on a pretend device, where tensors that were left
on the CPU raise, and in a GPU's bf16 on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES, UNTRAINABLE, save_family, shrunk, small_bases
from pretend import ON_PRETEND, pretend_device
from safetensors.torch import load_file
from tiny_runs import fit, step
from torch import Tensor

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import CAG, Late, Region
from dreamblend.blending.models import Models
from dreamblend.blending.pair import Pair
from dreamblend.blending.picture import pictures
from dreamblend.models import load_backbone
from dreamblend.sampling import initial_noise
from dreamblend.tuning import LoRA

SCALE = 4.0  # of guidance
PAIRS = [("a sks mug on the beach", 3)]
BF16 = {"precision": "bf16-mixed"}
# the other families show little that these do not
FEW = ("flux_dev",)
TRAINED = [
    pytest.param(name, marks=[] if name in FEW else pytest.mark.heavy)
    for name in FAMILIES
    if name not in UNTRAINABLE
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return functools.partial(lambda name: save_family(name, root))


@pytest.fixture(scope="module", params=TRAINED)
def name(request) -> str:
    return request.param


def train(base: Path, photos: Path, out: Path, trainer: dict, **model) -> Path:
    fit(
        base,
        photos,
        out,
        LoRA(rank=2),
        steps=[1, 3],
        learning_rate=1e-3,
        gradient_checkpointing=True,
        trainer=trainer,
        **model,
    )
    return out


@pytest.fixture(scope="module")
def run(name, folder, mug_photos, tmp_path_factory) -> Iterator[Path]:
    """A run of the CPU in fp32."""
    with small_bases():
        yield train(folder(name), mug_photos, tmp_path_factory.mktemp("run"), {})


def weights(run: Path, number: int) -> dict[str, Tensor]:
    return load_file(step(run, number) / "pytorch_lora_weights.safetensors")


def drawn(
    run: Path, base: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, steps: int = 2
) -> dict[str, Tensor]:
    """What a pair draws: latents by the name of their blend."""
    models = Models.load(Pair.find(run, "1", "3"), str(base))
    models.to(device, dtype)
    batch, found = Batch.of(models, PAIRS, "sks", "mug", steps, SCALE), {}
    for blend in (Late(), Region(), CAG()):
        with torch.no_grad():
            drawing = blend.draw(batch)
        assert drawing.latents.device == models.late.device
        assert pictures(PAIRS, batch, blend.name, drawing)  # which are finite
        found[blend.name], found[f"{blend.name} maps"] = drawing.latents, drawing.maps
    return {kind: x.cpu().float() for kind, x in found.items()}


def off(found: Tensor, exact: Tensor) -> float:
    """How far a tensor is from another, as a share of its norm."""
    return ((found - exact).norm() / exact.norm().clamp(min=1e-12)).item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_family_trains_and_blends_on_a_gpu(name, folder, run, mug_photos, tmp_path, monkeypatch):
    base = folder(name)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    trained = train(base, mug_photos, tmp_path, BF16 | {"accelerator": "gpu"}, frozen_dtype="bf16")
    assert all(value.isfinite().all() for value in weights(trained, 3).values())
    found, exact = drawn(run, base, "cuda"), drawn(run, base)
    for kind, value in found.items():
        assert off(value, exact[kind]) < 1e-3, kind
    for value in drawn(trained, base, "cuda", torch.bfloat16).values():
        assert value.isfinite().all()


@pytest.mark.holds("device, bf16")
def test_a_family_trains_and_blends_on_a_device(name, folder, run, mug_photos, tmp_path):
    base = folder(name)
    with pretend_device() as device:
        there = weights(train(base, mug_photos, tmp_path, ON_PRETEND), 3)
        found = drawn(run, base, str(device))
    for key, value in weights(run, 3).items():
        torch.testing.assert_close(there[key], value, atol=1e-4, rtol=0, msg=key)
    for kind, value in drawn(run, base).items():
        assert off(found[kind], value) < 1e-4, kind


@pytest.mark.holds("device, bf16")
def test_a_family_trains_and_blends_in_bf16(name, folder, run, mug_photos, tmp_path):
    """Drawn in one step, whose timestep bf16 holds exactly: it would round those of FLUX.1 and
    FLUX.2, in diffusers too, and their random denoisers would see another time.
    """
    base = folder(name)
    there = weights(train(base, mug_photos, tmp_path, BF16, frozen_dtype="bf16"), 3)
    assert all(value.isfinite().all() for value in there.values())
    steps = 2 if name == "qwen_image" else 1  # its schedule ends at a share that is not zero
    exact = drawn(run, base, steps=steps)
    for kind, value in drawn(run, base, dtype=torch.bfloat16, steps=steps).items():
        assert value.isfinite().all() and off(value, exact[kind]) < 0.05, kind


@torch.no_grad()
def test_an_autoencoder_that_overflows_in_fp16_keeps_fp32(folder):
    model = shrunk(load_backbone(str(folder("sdxl"))))
    convolutions = (model.vae.encoder.conv_in, model.vae.decoder.conv_in)
    for convolution in convolutions:  # norms follow
        convolution.weight.mul_(3e4)
    latents = initial_noise(model.latent_shape, [0])
    pixels = model.decode(latents)
    mean = model.encode(pixels)[0]
    model.to(dtype=torch.float16)
    assert model.denoiser.dtype == torch.float16 and model.vae.dtype == torch.float32
    torch.testing.assert_close(model.decode(latents.half()), pixels, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(model.encode(pixels.half())[0], mean, atol=1e-2, rtol=1e-2)
    assert model.to(dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    assert model.decode(latents).isfinite().all()
    model.vae.register_to_config(force_upcast=False)
    assert not model.to(dtype=torch.float16).decode(latents).isfinite().all()
