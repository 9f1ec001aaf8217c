"""What a form of export answers, and what the forms of a LoRA have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors.torch import save_file
from torch import Tensor

from dreamblend.errors import InputError
from dreamblend.export import low_rank, metadata
from dreamblend.export.low_rank import LowRank
from dreamblend.export.what import What
from dreamblend.storage.files import save_text
from dreamblend.storage.snapshots import DTYPES


@dataclass(frozen=True)
class Form(ABC):
    """A form in which things are exported.

    Args:
        dtype: of the weights; as they are where None.
        rank: of a LoRA; as it is where None.
        license: of what is exported.
        images: folder of a blend whose images a model card shows.
    """

    dtype: str | None = None
    rank: int | None = None
    license: str | None = None
    images: Path | None = None

    is_file = False  # or a folder

    @abstractmethod
    def check(self, what: What) -> None:
        """Raise InputError where this form cannot hold it: known before the base is loaded."""

    @abstractmethod
    def write(self, what: What, path: Path) -> None:
        """Write it to `path`, where nothing is yet."""

    def write_all(self, whats: dict[str, What], path: Path) -> None:
        """Write what was named: one thing, or the two of a pair into a folder, with what `predict`
        is to be told of them.
        """
        if "" in whats:
            self.write(whats[""], path)
            return
        path.mkdir()
        for name, what in whats.items():
            self.write(what, path / (f"{name}.safetensors" if self.is_file else name))
        said = {key: value for key, value in whats["late"].said.items() if value}
        save_text(yaml.safe_dump({"model": said}, sort_keys=False), path / "predict.yaml")


class LoRAForm(Form):
    """A form that holds a LoRA."""

    def check(self, what: What) -> None:
        what.check_low_rank(self.rank)

    def low_rank(self, what: What) -> LowRank:
        """The weights in their dtype. Says what a lower rank loses."""
        weights, kept = what.low_rank(self.rank)
        if self.rank is not None:
            print(f"rank {self.rank} keeps {kept:.1%} of the change (of its squared norm)")
        if not weights:
            raise InputError(f"{what.described} does not differ from its base: there is no LoRA")
        return low_rank.cast(weights, DTYPES[self.dtype] if self.dtype else None)

    def marks(self, what: What, weights: LowRank) -> dict[str, str]:
        return metadata.of_lora(weights, metadata.marks(what, what.backbone, self.license))


def save(tensors: dict[str, Tensor], path: Path, said: dict[str, str]) -> None:
    """A safetensors file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, path, metadata=said)
