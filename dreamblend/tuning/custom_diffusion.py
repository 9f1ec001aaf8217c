"""Custom Diffusion (Kumari et al., CVPR 2023): keys and values of the cross-attention, and a new
word.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamblend.errors import InputError
from dreamblend.models import Backbone
from dreamblend.models.adapters import overlay
from dreamblend.storage.foreign import CUSTOM
from dreamblend.storage.snapshots import Files, Weights
from dreamblend.tuning import words
from dreamblend.tuning.method import Method


class CustomDiffusion(Method):
    """Train to_k and to_v of the cross-attention, and a new embedding of the identifier, which
    begins as the one that it has in the base.

    The paper trains with class images (`data.num_class_images`), as keys and values drift for every
    noun without them. Its code also keeps gradients from the first token, which the paper does not
    mention and this leaves out.
    """

    name = "custom-diffusion"
    apart = False
    rates = {"sandbox": 1e-3, "sandbox-dit": 1e-3, "usual": 1e-5}
    text_encoder = True  # so prompts are encoded at every step; its weights are frozen

    def attach(self, backbone: Backbone, identifier: str = "", class_noun: str = "") -> None:
        words.learn(backbone, identifier, identifier.strip("<>"))  # a rare word, as in the paper
        for site in backbone.sites():
            layer = backbone.denoiser.get_submodule(site)
            layer.to_k.requires_grad_(True)
            layer.to_v.requires_grad_(True)

    def trained(self, backbone: Backbone) -> dict[str, nn.Module]:
        return {backbone.denoiser_name: backbone.denoiser, "concept": words.learned(backbone)}

    def export(self, backbone: Backbone) -> Files:
        sites, word = backbone.sites(), words.learned(backbone)
        tensors: dict[str, Tensor] = {}
        for name, layer in backbone.denoiser.named_modules():
            if name in sites:
                tensors |= {
                    f"{name}.processor.to_{part}_custom_diffusion.weight": (
                        getattr(layer, f"to_{part}").weight
                    )
                    for part in "kv"
                }
            elif hasattr(layer, "processor"):
                # diffusers wants every layer named, and takes an empty tensor for untrained
                tensors[f"{name}.processor"] = torch.empty(0)
        return {
            CUSTOM: Weights(tensors),
            f"{word.placeholder}.safetensors": words.weights(word),
        }

    @staticmethod
    def restore(
        path: Path, backbone: Backbone, name: str, identifier: str | None = None
    ) -> Backbone:
        """Restore into plain layers: diffusers' processors with weights could not be recorded.

        `path` may be a file with the keys and values only.
        """
        file = path / CUSTOM if path.is_dir() else path
        try:
            tensors = {
                k.replace(".processor.", ".").replace("_custom_diffusion", ""): v
                for k, v in load_file(file).items()
                if v.numel()
            }
            parts = {backbone.denoiser_name: overlay(backbone.denoiser, tensors)}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"cannot load {file} onto {backbone.base}: {error}; name the base that it was tuned"
                " from with --model.base"
            ) from error
        learned = (
            sorted(p for p in path.glob("*.safetensors") if p.name != CUSTOM)
            if path.is_dir()
            else []
        )
        if len(learned) > 1:
            raise InputError(
                f"{path} holds {len(learned)} learned words ({learned[0].name}, {learned[1].name}):"
                " keep the file of one word there"
            )
        if not learned and path.is_dir() and (pickled := sorted(path.glob("<*>.bin"))):
            raise InputError(
                f"the learned word {pickled[0]} is a pickle, which can run code when it is read:"
                " save it again with safe_serialization=True"
            )
        if learned:
            parts["concept"] = words.read(learned[0], backbone, identifier)
        return backbone.sharing(**parts)
