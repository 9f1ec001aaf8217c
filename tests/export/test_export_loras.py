"""Exported LoRAs: what was trained comes back, by the project's own reader and by the pipelines'
own loaders.
"""

from __future__ import annotations

import functools
import json
import re
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, save_family
from safetensors.torch import load_file, save_file

from dreamblend.export import kohya_lora, low_rank
from dreamblend.export.command import export
from dreamblend.models import Backbone, load_backbone
from dreamblend.models.original_weights import denoiser
from dreamblend.sampling import initial_noise
from dreamblend.storage import snapshots
from dreamblend.tuning import restore
from dreamblend.tuning.peft_adapters import inject

FEW = ("tiny", "flux_dev", "z_image")  # cross attention, joint attention, fused layers
# loaders of diffusers that know kohya's names; of FLUX.1's single blocks at their real width alone
KOHYA = ("tiny", "sdxl", "qwen_image", "z_image", "z_image_turbo")
DOUBLE = ("attn.to_q", "attn.to_v", "attn.add_k_proj", "attn.to_out.0", "ff.net.2", "norm1.linear")
RANK, ALPHA = 2, 6.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_base):
    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: tiny_base if name == "tiny" else save_family(name, root))


def lora_file(base, path, rank=RANK, alpha=ALPHA, seed=0, dora=False, targets=None, parts=None):
    """A random LoRA of a base, as diffusers writes it, on all parts that can be trained or some."""
    from peft import LoraConfig, get_peft_model_state_dict

    model, generator = load_backbone(str(base)), torch.Generator().manual_seed(seed)
    targets = targets or ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "out_proj", "linear_1"]
    tensors, said = {}, {}
    for part, module in model.parts().items():
        if part not in (parts or model.parts()):
            continue
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


def test_diffusers_reads_kohyas_names_of_flux(folder, tmp_path):
    base, targets = folder("flux_dev"), [f"transformer_blocks.0.{name}" for name in DOUBLE]
    # its loader leaves out the text encoder of such a file
    parts = ("transformer",)
    made = lora_file(base, tmp_path / "lora.safetensors", targets=targets, parts=parts)
    out = export(tmp_path / "out.safetensors", "kohya", snapshot=str(made), base=str(base))
    late = predicted(restore(snapshots.read(made), load_backbone(str(base)), "late"))
    torch.testing.assert_close(loaded_by_diffusers(base, out), late, atol=1e-5, rtol=1e-4)


def test_diffusers_reads_kohyas_names_of_flux_at_its_width(tmp_path):
    """What its converter makes of single blocks, whose layers are four of diffusers'."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"):
        name = f"single_transformer_blocks.0.{name}"
        rows, columns = flux.get_submodule(name).weight.shape
        down = torch.randn(RANK, columns, generator=generator)
        up = torch.randn(rows, RANK, generator=generator)
        layers[name] = low_rank.Factors(down, up, ALPHA)
    model = SimpleNamespace(denoiser=flux, denoiser_name="transformer", text_encoders={})
    save_file(kohya_lora.named({"transformer": layers}, model), tmp_path / "lora.safetensors")
    read = FluxPipeline.lora_state_dict(tmp_path / "lora.safetensors")
    assert len(read) == 2 * len(layers)
    for name, factors in layers.items():
        up, down = (read[f"transformer.{name}.lora_{x}.weight"][:8] for x in "BA")
        torch.testing.assert_close(up @ down, factors.delta()[:8], atol=1e-4, rtol=1e-5)


@each_family
def test_kohyas_names_are_those_that_comfyui_looks_for(name, folder, tmp_path):
    """By the rule of its comfy/lora.py: the layers of the model as published, _ for dots, but
    diffusers' of Stable Diffusion 1.x and 2.x; encoders by their number where there are several.
    """
    base = folder(name)
    model = load_backbone(str(base))
    made = lora_file(base, tmp_path / "lora.safetensors")
    found = kohya_lora.named(read(made, model), model)
    layers = {key.rpartition(".lora_")[0] for key in found if ".lora_down" in key}
    own = model.denoiser.state_dict() if name == "tiny" else denoiser(model.denoiser)
    known = {f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}" for key in own}
    encoders = {layer for layer in layers if layer.startswith("lora_te")}
    assert layers - encoders and layers - encoders <= known
    numbers = {"tiny": "", "sdxl": "12", "sd3": "12", "flux_dev": "1", "flux_schnell": "1"}
    wanted = numbers.get(name)
    attention = r"text_model_encoder_layers_\d+_self_attn_(q|out)_proj"
    assert {re.fullmatch(rf"lora_te(\d?)_{attention}", layer)[1] for layer in encoders} == (
        set() if wanted is None else set(wanted) or {""}
    )
