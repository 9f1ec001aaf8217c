"""What a tuning method answers: which weights train, what a snapshot holds, how to restore one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import nn

from dreamblend.models import Backbone
from dreamblend.storage.snapshots import Files


class Method(ABC):
    """Which weights of a backbone train."""

    name: str
    # learning rates by base; `usual` is that of Stable Diffusion 1.x and 2.x, and of any other
    rates: dict[str, float]
    # whether what encodes the prompts trains too: the text encoder, or a word of it
    text_encoder: bool
    # whether the trained weights are added to the frozen ones, which may then be in half precision;
    # otherwise they replace them
    apart: bool

    @abstractmethod
    def attach(self, backbone: Backbone, identifier: str = "", class_noun: str = "") -> None:
        """Make the trained weights require gradients (adding them where the method adds any).

        `identifier` and `class_noun` name the subject, for methods that learn a word.
        """

    @abstractmethod
    def export(self, backbone: Backbone) -> Files:
        """The trained weights as the files of a snapshot, in the layout diffusers reads. No copies
        are made.
        """

    @staticmethod
    @abstractmethod
    def restore(
        path: Path, backbone: Backbone, name: str, identifier: str | None = None
    ) -> Backbone:
        """A view of the backbone with the snapshot at `path` in it. `name` tells several snapshots
        apart; prompts will call the subject `identifier`.

        Raises InputError where a part of the snapshot would have no effect.
        """

    def usual_rate(self, base: str) -> float:
        """The learning rate to begin with for a base."""
        return self.rates.get(base, self.rates["usual"])

    @property
    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def trained(self, backbone: Backbone) -> dict[str, nn.Module]:
        """The modules that hold trained weights, by the names that `Backbone.replaced` takes."""
        if self.text_encoder:
            return backbone.parts()
        return {backbone.denoiser_name: backbone.denoiser}

    def parameters(self, backbone: Backbone) -> list[nn.Parameter]:
        modules = self.trained(backbone).values()
        return [p for module in modules for p in module.parameters() if p.requires_grad]
