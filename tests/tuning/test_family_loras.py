"""LoRA files of other tools, for every family: the same as weights that are merged by hand, and as
what the pipeline's own loader makes of them.
"""

from __future__ import annotations

import copy
import functools
import json
import warnings

import pytest
import torch
from families import FAMILIES, save_family
from safetensors.torch import save_file

from dreamblend.models import Backbone, load_backbone
from dreamblend.models.original_names import Original, original_names
from dreamblend.sampling import initial_noise
from dreamblend.storage import snapshots
from dreamblend.tuning import restore

NAMES = ("sdxl", "sd3", "flux_dev", "klein_base", "qwen_image", "z_image", "sana", "pixart_sigma")
FEW = ("sdxl", "flux_dev", "z_image")  # cross attention, joint attention, fused layers
VARIANTS = ("flux_schnell", "klein", "z_image_turbo")  # of families that are there
LOADED = [name for name in FAMILIES if name != "pixart_sigma"]  # its pipeline has no loader
RANK, ALPHA, LONGER = 2, 6.0, 1.3
# how a tool's names of layers begin, and its names of the factors and of DoRA's magnitudes
TOOLS = {
    "comfyui": ("diffusion_model.", "lora_A.weight", "lora_B.weight", "dora_scale"),
    "kohya": ("lora_unet_", "lora_down.weight", "lora_up.weight", "dora_scale"),
    "peft": ("base_model.model.", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    "diffusers": ("", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    "ai-toolkit": ("diffusion_model.", "lora_A.weight", "lora_B.weight", "magnitude"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return functools.partial(lambda name: save_family(name, root))


@torch.no_grad()
def predicted(model: Backbone) -> torch.Tensor:
    z = initial_noise((model.latent_shape[0], *model.latent_size(64, 64)), [1])
    t = model.training_noise().timestep(torch.tensor([500]))
    return model.denoise(z, t, model.encode_prompts(["a photo of sks dog"]))


@torch.no_grad()
def by_hand(
    model: Backbone, tool: str, dora: bool = False, alpha: float = ALPHA
) -> tuple[dict[str, torch.Tensor], Backbone]:
    """The tensors of a random LoRA of a tool without alphas, and the model with it in its weights:
    W + alpha / rank B A, of which with DoRA every row is longer than W's.
    """
    merged = copy.deepcopy(model.denoiser)
    there, source = dict(merged.named_modules()), torch.Generator().manual_seed(0)
    plain = {name: Original((name,)) for name in there if name.endswith(("to_q", "to_out.0"))}
    names = plain if tool == "diffusers" else original_names(merged) or plain
    begin, a, b, magnitudes = TOOLS[tool]
    begin = begin or f"{model.denoiser_name}."
    tensors = {}
    for original, old in names.items():
        weights = [
            there[layer].weight.data for layer in old.layers if hasattr(there[layer], "weight")
        ]
        if not weights or weights[0].ndim != 2:
            continue
        down = 0.2 * torch.randn(RANK, weights[0].shape[1], generator=source)
        up = 0.2 * torch.randn(sum(map(len, weights)), RANK, generator=source)
        delta = alpha / RANK * up @ down
        delta = delta.roll(len(delta) // 2, 0) if old.swapped else delta
        lengths = LONGER * torch.cat(weights).norm(dim=1, keepdim=True)
        for weight, own in zip(weights, delta.split([len(w) for w in weights])):
            length = weight.norm(dim=1, keepdim=True)
            weight += own
            if dora:
                weight *= LONGER * length / weight.norm(dim=1, keepdim=True)
        layer = begin + (original.replace(".", "_") if tool == "kohya" else original)
        tensors |= {f"{layer}.{a}": down, f"{layer}.{b}": up}
        if dora:
            lengths = lengths.roll(len(lengths) // 2, 0) if old.swapped else lengths
            flat = magnitudes != "dora_scale"
            tensors[f"{layer}.{magnitudes}"] = lengths.flatten() if flat else lengths
    return tensors, model.replaced(**{model.denoiser_name: merged})


def alphas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As files have them of whose names a tool makes no configuration."""
    layers = {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}
    return {f"{layer}.alpha": torch.tensor(ALPHA) for layer in layers}


def check(file, model: Backbone, wanted: Backbone) -> None:
    plain, wanted = predicted(model), predicted(wanted)
    view = restore(snapshots.read(file), model, "late")
    torch.testing.assert_close(predicted(view), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.heavy] * (n not in FEW)) for n in NAMES]
)
@pytest.mark.parametrize("tool", ["comfyui", "kohya"])
@pytest.mark.holds("LoRA files")
def test_a_lora_of_original_names_is_as_merged_by_hand(name, tool, folder, tmp_path):
    model, file = load_backbone(str(folder(name))), tmp_path / "lora.safetensors"
    tensors, merged = by_hand(model, tool)
    save_file(tensors | alphas(tensors), file)
    check(file, model, merged)


@pytest.mark.parametrize("name", [pytest.param("sd3", marks=pytest.mark.heavy), *FEW])
@pytest.mark.parametrize(
    "tool", ["diffusers", "kohya", pytest.param("ai-toolkit", marks=pytest.mark.heavy)]
)
def test_a_dora_is_as_merged_by_hand(name, tool, folder, tmp_path):
    """Magnitudes of queries, keys and values that are one layer are divided with its rows."""
    model, file = load_backbone(str(folder(name))), tmp_path / "dora.safetensors"
    tensors, merged = by_hand(model, tool, dora=True)
    if tool != "diffusers":
        save_file(tensors | alphas(tensors), file)
    else:
        said = {"r": RANK, "lora_alpha": ALPHA, "use_dora": True}
        said = {f"{model.denoiser_name}.{key}": value for key, value in said.items()}
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(said)})
    check(file, model, merged)


@pytest.mark.parametrize("where", ["tensors", "metadata", "metadata of diffusers", "nowhere"])
def test_a_file_of_pefts_names_needs_no_configuration_beside(where, folder, tmp_path):
    """Its alpha is its own, or its rank where it says nothing."""
    model, file = load_backbone(str(folder("klein_base"))), tmp_path / "lora.safetensors"
    alpha = RANK if where == "nowhere" else ALPHA
    tensors, merged = by_hand(model, "peft", alpha=alpha)
    start = "transformer." if "diffusers" in where else ""
    said = {f"{start}r": RANK, f"{start}lora_alpha": ALPHA}
    metadata = {"lora_adapter_metadata": json.dumps(said)} if "metadata" in where else None
    save_file(tensors | (alphas(tensors) if where == "tensors" else {}), file, metadata)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(file, model, merged)
    told = [str(w.message) for w in caught if "does not say its alpha" in str(w.message)]
    assert len(told) == (where == "nowhere")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.heavy] * (n in VARIANTS)) for n in LOADED]
)
@pytest.mark.holds("LoRA files")
def test_a_file_of_diffusers_is_read_as_by_the_pipelines_own_loader(name, folder, tmp_path):
    """With the text encoders that can be trained, with its settings and without."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    writer, generator = load_backbone(str(folder(name))), torch.Generator().manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj", "fc1"]
    for module in writer.parts().values():
        module.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
        for key, weight in module.named_parameters():
            if "lora_B" in key:
                weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    layers = {
        f"{part}_lora_layers": get_peft_model_state_dict(module)
        for part, module in writer.parts().items()
    }
    settings = _collate_lora_metadata(writer.parts())
    for given in (settings, {}):
        path = tmp_path / f"{len(given)}"
        writer.pipe.save_lora_weights(path, **layers, **given)
        theirs = load_backbone(str(folder(name)))
        theirs.pipe.load_lora_weights(path)
        model = load_backbone(str(folder(name)))
        check(path, model, theirs)
