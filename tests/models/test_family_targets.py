"""Of every family: presets of LoRA targets, and all that trains gets a gradient."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, UNTRAINABLE, save_family, shrunk
from torch import nn

from dreamblend.errors import InputError
from dreamblend.models import load_backbone
from dreamblend.models.adapters import configs
from dreamblend.storage import snapshots
from dreamblend.storage.snapshots import About
from dreamblend.tuning import Full, LoRA, restore
from dreamblend.tuning.lora import TRAINING

TRAINED = [name for name in FAMILIES if name not in UNTRAINABLE]
FEW = {"sd3", "qwen_image", "sana"}  # of which the others show the same
TEXT = {"sdxl", "sd3", "flux_dev"}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return lambda name: shrunk(load_backbone(str(save_family(name, root))))


def predict(backbone) -> torch.Tensor:
    noise = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    t = backbone.training_noise().timestep(torch.tensor([100, 500]))
    return backbone.denoise(noise, t, backbone.encode_prompts(["a mug", "a red cat"]))


def unreached(backbone, method) -> list[str]:
    """What trains and gets no gradient in a step, as processes that share one would wait for it."""
    for module in backbone.parts().values():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:  # zero at first
                nn.init.normal_(parameter, std=0.1)
    predict(backbone).square().mean().backward()
    return [
        name
        for module in method.trained(backbone).values()
        for name, p in module.named_parameters()
        if p.requires_grad and p.grad is None
    ]


@pytest.mark.parametrize("name", TRAINED)
def test_all_that_trains_gets_a_gradient(name, load):
    for method in (Full(name in TEXT), LoRA(2, targets="all", text_encoder=name in TEXT)):
        backbone = load(name)
        method.attach(backbone)
        assert unreached(backbone, method) == []


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.heavy) for n in TRAINED]
)
def test_presets_name_layers_of_the_family_and_come_back_from_their_file(name, load, tmp_path):
    found = {}
    for preset in ("attention", "attention_and_ff", "all", None):
        backbone, method = load(name), LoRA(2, targets=preset)
        method.attach(backbone)
        layers = [n for n, _ in backbone.denoiser.named_modules() if n.endswith("lora_A")]
        found[preset] = set(layers)
        if preset in ("attention", "attention_and_ff"):
            ends = configs(backbone.denoiser)[TRAINING].target_modules
            assert ends == set(method.targets)
            for end in ends:  # none is a name of nothing
                assert any(n.removesuffix(".lora_A").endswith(end) for n in layers), end
        if preset == "all":
            assert method.settings["targets"] == "all"
            for module in backbone.parts().values():
                for parameter_name, parameter in module.named_parameters():
                    if "lora_B" in parameter_name:
                        nn.init.normal_(parameter, std=0.1)
            files = method.export(backbone)
            about = About(1, "lora", name, backbone.fingerprint(), "sks", "mug", "float32", 0)
            folder = snapshots.write(tmp_path, about, files)
            with torch.no_grad():
                ours, base = predict(backbone), predict(load(name))
                theirs = predict(restore(snapshots.read(folder), load(name), "x"))
            torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(base, ours, atol=1e-3)
    assert found[None] == found["attention"] < found["attention_and_ff"] < found["all"]


def test_another_word_is_no_preset():
    with pytest.raises(InputError, match="targets is 'ff': it is one of attention, attention_and"):
        LoRA(targets="ff")
