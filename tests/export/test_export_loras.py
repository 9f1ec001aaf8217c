"""Exported LoRAs: what was trained comes back, by the project's own reader and by the pipelines'
own loaders.
"""

from __future__ import annotations

import functools
import json

import pytest
import torch
from families import FAMILIES, save_family
from safetensors.torch import load_file, save_file

from dreamblend.export import low_rank
from dreamblend.export.command import export
from dreamblend.models import Backbone, load_backbone
from dreamblend.sampling import initial_noise
from dreamblend.storage import snapshots
from dreamblend.tuning import restore
from dreamblend.tuning.peft_adapters import inject

FEW = ("tiny", "flux_dev", "z_image")  # cross attention, joint attention, fused layers
# loaders of diffusers that know kohya's names; FLUX's know the widths of the real models alone
KOHYA = ("tiny", "sdxl", "qwen_image", "z_image", "z_image_turbo")
RANK, ALPHA = 2, 6.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_base):
    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: tiny_base if name == "tiny" else save_family(name, root))


def lora_file(base, path, rank=RANK, alpha=ALPHA, seed=0, dora=False, targets=None):
    """A random LoRA of a base, as diffusers writes it, on all parts that can be trained."""
    from peft import LoraConfig, get_peft_model_state_dict

    model, generator = load_backbone(str(base)), torch.Generator().manual_seed(seed)
    targets = targets or ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "out_proj", "linear_1"]
    tensors, said = {}, {}
    for part, module in model.parts().items():
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_dora=dora)
        inject(config, module, "made")
        for key, weight in module.named_parameters():
            if "lora_B" in key:
                weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
            elif "magnitude" in key:
                weight.data *= 1.3
        state = get_peft_model_state_dict(module, adapter_name="made")
        tensors |= {f"{part}.{key}": value.contiguous() for key, value in state.items()}
        said |= {f"{part}.{key}": value for key, value in config.to_dict().items()}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(said, default=list)})
    return path


@torch.no_grad()
def predicted(model: Backbone) -> torch.Tensor:
    z = initial_noise((model.latent_shape[0], *model.latent_size(64, 64)), [1])
    t = model.training_noise().timestep(torch.tensor([500]))
    return model.denoise(z, t, model.encode_prompts(["a photo of sks dog"]))


def loaded_by_diffusers(base, file) -> torch.Tensor:
    """What is predicted where the pipeline's own loader has read a file."""
    model = load_backbone(str(base))
    model.pipe.load_lora_weights(file)
    return predicted(model)


def read(path, model: Backbone) -> low_rank.LowRank:
    return low_rank.read(path, model.parts(), model.base)


each_family = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.heavy] * (n not in FEW)) for n in ("tiny", *FAMILIES)],
)


@each_family
def test_a_lora_comes_back_from_diffusers_form_bit_by_bit(name, folder, tmp_path):
    base, made = folder(name), lora_file(folder(name), tmp_path / "lora.safetensors")
    out = export(tmp_path / "out", snapshot=str(made), base=str(base))
    model = load_backbone(str(base))
    wanted, found = read(made, model), read(out, model)
    assert found.keys() == wanted.keys() == model.parts().keys()
    for part, layers in wanted.items():
        assert found[part].keys() == layers.keys()
        for layer, factors in layers.items():
            theirs = found[part][layer]
            assert factors.alpha == theirs.alpha
            assert torch.equal(factors.down, theirs.down) and torch.equal(factors.up, theirs.up)
    late = predicted(restore(snapshots.read(out), model, "late"))
    assert (late - predicted(model.bare())).abs().max() > 1e-2
    if name != "pixart_sigma":  # its pipeline has no loader
        torch.testing.assert_close(loaded_by_diffusers(base, out), late, atol=1e-6, rtol=1e-5)


@each_family
def test_a_lora_comes_back_from_kohyas_names(name, folder, tmp_path):
    base, made = folder(name), lora_file(folder(name), tmp_path / "lora.safetensors")
    out = export(tmp_path / "out.safetensors", "kohya", snapshot=str(made), base=str(base))
    assert all(key.startswith(("lora_unet_", "lora_te")) for key in load_file(out))
    model = load_backbone(str(base))
    wanted, found = read(made, model), read(out, model)
    assert found.keys() == wanted.keys()
    for part, layers in wanted.items():
        for layer, factors in layers.items():
            ours, theirs = found[part][layer].delta(), factors.delta()
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
        others = [found[part][layer].up for layer in found[part].keys() - layers.keys()]
        assert not any(up.any() for up in others)  # of a layer that has others beside it
    late = predicted(restore(snapshots.read(made), model, "late"))
    again = predicted(restore(snapshots.read(out), load_backbone(str(base)), "late"))
    torch.testing.assert_close(again, late, atol=1e-5, rtol=1e-4)
    if name in KOHYA:
        torch.testing.assert_close(loaded_by_diffusers(base, out), late, atol=1e-5, rtol=1e-4)
