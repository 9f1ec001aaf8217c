"""What the project asks of a model family. Nothing outside `models/` mentions a UNet, a CLIP
tokenizer or a scaling factor.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dreamblend.errors import InputError
from dreamblend.models.adapters import set_adapters
from dreamblend.models.learned_token import LearnedToken

WORD = re.compile(
    r"\w[\w\u0300-\u036f]*(?:['’-]\w[\w\u0300-\u036f]*)*"
)  # mug's and teddy-bear are one; é may be e and an accent
# Of the weights, schedules and adapters that other tools read in a prompt, such as (mug:1.3),
# [a:b:0.5] and <lora:name:0.8>, what is no word
MARKS = re.compile(
    r"<(?:lora|lyco|locon|hypernet):[^>]*>|(?<=[^\d\s(\[]):\s*\d*\.?\d+\s*(?=[)\]])", re.IGNORECASE
)
# Words that carry no content of their own: their maps are neither guided nor measured.
STOPWORDS = frozenset(
    "a an the of on in at and or to with by for from is are its it this that next near photo"
    " picture image front".split()
)


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: token states (batch, tokens, channels) and what else a family needs (pooled
    embeddings, sizes).
    """

    states: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return Conditioning(self.states[rows], {k: v[rows] for k, v in self.extras.items()})

    def map(self, f) -> Conditioning:
        return Conditioning(f(self.states), {k: f(v) for k, v in self.extras.items()})

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        extras = {k: torch.cat([p.extras[k] for p in parts]) for k in parts[0].extras}
        return Conditioning(torch.cat([p.states for p in parts]), extras)


@dataclass(frozen=True)
class Span:
    """One content word of a prompt and the positions of its tokens."""

    word: str
    tokens: tuple[int, ...]


class Backbone(ABC):
    """A text-to-image diffusion model, as the project sees it.

    `bind` gives another view of the same modules with other LoRA adapters active; a view switches
    the shared modules over when it is used, so that a pair of LoRA snapshots needs one base in
    memory.
    """

    denoiser: nn.Module
    vae: nn.Module
    text_encoders: list[nn.Module]
    scheduler: object  # of diffusers; `denoise` predicts what its prediction_type says
    base: str  # as the user named it
    size: int  # pixels of a side of its images
    length: int  # tokens of the longest prompt, its ends included
    latent_shape: tuple[int, int, int]  # channels, height, width
    # the guidance scale is an input of the denoiser, which predicts once what two predictions made
    # (LCM)
    distilled: bool = False
    base_config: str | None = None  # for a single file, whose configuration it was loaded with

    def __init__(self) -> None:
        self.adapters: dict[str, float] | None = (
            None  # None: no adapters were ever added; {}: all off
        )
        self.concept: LearnedToken | None = None  # a learned word; each view has its own
        self._active: dict[str, dict[str, float] | None] = {
            "adapters": None
        }  # shared by every view

    # -- text
    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Token states of `prompts`. Differentiable in the text encoders' weights."""

    @abstractmethod
    def spans(self, prompt: str) -> list[Span]:
        """The content words of a prompt that fit its length, with their token positions in
        `Conditioning.states`.
        """

    @abstractmethod
    def dropped_words(self, prompt: str) -> list[str]:
        """The words that fall off the end of a prompt longer than the text encoder takes."""

    def embedding(self, words: str) -> Tensor:
        """(channels,): the mean of the words' own token embeddings, from which a learned word
        begins.
        """
        raise InputError(
            f"{self.base} is of a family that cannot learn a word yet: use another tuning method,"
            " such as LoRA"
        )

    # -- images
    @abstractmethod
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (batch, 3, size, size) in [-1, 1] to the mean and standard deviation of latents
        (batch, *latent_shape).
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels in [-1, 1]."""

    # -- denoising
    def guided(self, conditioning: Conditioning, scale: float) -> Conditioning:
        """The prompts with the guidance scale that a distilled denoiser takes as an input; as they
        are for any other.
        """
        return conditioning

    @abstractmethod
    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The prediction (batch, *latent_shape) for noisy latents at timestep(s) t."""

    @abstractmethod
    def sites(self, grid: int | None = None) -> dict[str, int]:
        """Cross-attention layers in the order they run: name -> side of its grid. Only those of
        side `grid`, if given.
        """

    def default_grid(self) -> int:
        """Side of the grid whose maps are read where none is named: the nearest to a quarter of the
        latents' with more than one layer.

        A quarter is 16 x 16 in Stable Diffusion at 512 pixels, which the literature reads (Hertz et
        al., 2022; Chefer et al., 2023): coarser maps are of one layer, finer ones hardly tell the
        words apart.
        """
        layers = Counter(self.sites().values())
        several = [grid for grid, count in layers.items() if count > 1] or list(layers)
        return min(
            several, key=lambda grid: (abs(math.log2(4 * grid / self.latent_shape[1])), grid)
        )

    # -- weights
    @abstractmethod
    def replaced(self, **modules: nn.Module) -> Backbone:
        """The same backbone with other modules in the places named (`denoiser`, `text_encoder`,
        `concept`, ...).
        """

    def sharing(self, **parts: nn.Module) -> Backbone:
        """A view with another `denoiser` (made of this one's layers, such as `overlay` makes) or
        `concept`, and all else shared.
        """
        view = copy.copy(self)
        for name, module in parts.items():
            setattr(view, name, module.requires_grad_(False).eval())
        return view

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass of denoiser and text encoders."""

    def bind(self, adapters: dict[str, float]) -> Backbone:
        """A view with these LoRA adapters active, by weight; {} is the base itself."""
        view = copy.copy(self)
        view.adapters = adapters
        return view

    def forget(self, name: str) -> None:
        """Remove the LoRA adapter `name` from the shared modules, if it is there. The others are
        off until a view is used.
        """
        owners = [
            m
            for m in (self.denoiser, *self.text_encoders)
            if name in (getattr(m, "peft_config", None) or {})
        ]
        for module in owners:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*was active which is now deleted.*")
                (
                    module.delete_adapters
                    if hasattr(module, "delete_adapters")
                    else module.delete_adapter
                )(name)
        if owners:
            self._active["adapters"] = None  # which of the others peft made active is not known
            self.bind({}).activate()

    def activate(self) -> None:
        """Switch the shared modules to this view's adapters. Cheap when they already are."""
        if self._active["adapters"] == self.adapters:
            return
        for module in (self.denoiser, *self.text_encoders):
            if not getattr(module, "peft_config", None):
                continue
            if self.adapters:
                names = [n for n in self.adapters if n in module.peft_config]
                set_adapters(module, {n: self.adapters[n] for n in names})
            else:
                set_adapters(module, {})
        self._active["adapters"] = self.adapters

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Backbone:
        for module in self.modules():
            module.to(device=device, dtype=dtype)
        return self

    def modules(self) -> list[nn.Module]:
        return [
            self.denoiser,
            self.vae,
            *self.text_encoders,
            *([self.concept] if self.concept else []),
        ]

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def fingerprint(self, modules: Iterable[nn.Module] | None = None) -> str:
        """A hash of the weights of `modules`, of the parts that can be trained where None: 64
        values of every tensor, so that it takes no time on large models.

        LoRA adapters do not count, whether they are active or not. It is of the weights as loaded:
        those cast to half precision have another.
        """
        digest = hashlib.sha256()
        for module in (self.denoiser, *self.text_encoders) if modules is None else modules:
            for name, value in module.state_dict().items():
                if "lora_" in name:
                    continue
                flat = value.detach().flatten()
                sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu().contiguous()
                digest.update(
                    f"{name.replace('.base_layer', '')}{tuple(value.shape)}".encode()
                    + sample.numpy().tobytes()
                )
        return digest.hexdigest()[:32]
