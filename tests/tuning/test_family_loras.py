"""LoRA files of other tools, for the families with original names: the same as weights that are
merged by hand.
"""

from __future__ import annotations

import copy

import pytest
import torch
from families import save_family
from safetensors.torch import save_file

from dreamblend.models import load_backbone
from dreamblend.models.original_names import Original, original_names
from dreamblend.sampling import initial_noise
from dreamblend.storage import snapshots
from dreamblend.tuning import restore

NAMES = ("sdxl", "sd3", "flux_dev", "klein_base", "qwen_image", "z_image", "sana", "pixart_sigma")
RANK, ALPHA = 2, 6.0


@torch.no_grad()
def predicted(model) -> torch.Tensor:
    z = initial_noise((model.latent_shape[0], *model.latent_size(64, 64)), [1])
    t = model.training_noise().timestep(torch.tensor([500]))
    return model.denoise(z, t, model.encode_prompts(["a photo of sks dog"]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tool", ["comfyui", "kohya"])
def test_a_lora_of_original_names_is_as_merged_by_hand(name, tool, tmp_path):
    model = load_backbone(str(save_family(name, tmp_path)))
    merged = copy.deepcopy(model.denoiser)
    there, source = dict(merged.named_modules()), torch.Generator().manual_seed(0)
    names = original_names(merged) or {
        layer: Original((layer,)) for layer in there if layer.endswith(("to_q", "to_out.0"))
    }
    tensors = {}
    for original, old in names.items():
        weights = [
            there[layer].weight.data for layer in old.layers if hasattr(there[layer], "weight")
        ]
        if not weights or weights[0].ndim != 2:
            continue
        down = 0.2 * torch.randn(RANK, weights[0].shape[1], generator=source)
        up = 0.2 * torch.randn(sum(map(len, weights)), RANK, generator=source)
        delta = ALPHA / RANK * up @ down
        delta = delta.roll(len(delta) // 2, 0) if old.swapped else delta
        for weight, own in zip(weights, delta.split([len(w) for w in weights])):
            weight += own
        start = f"diffusion_model.{original}"
        if tool == "kohya":
            start = "lora_unet_" + original.replace(".", "_")
        a, b = ("lora_A", "lora_B") if tool == "comfyui" else ("lora_down", "lora_up")
        tensors |= {f"{start}.{a}.weight": down, f"{start}.{b}.weight": up}
        tensors[f"{start}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, tmp_path / "lora.safetensors")
    plain = predicted(model)
    wanted = predicted(model.replaced(**{model.denoiser_name: merged}))
    view = restore(snapshots.read(tmp_path / "lora.safetensors"), model, "late")
    torch.testing.assert_close(predicted(view), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - plain).abs().max() > 1e-2
