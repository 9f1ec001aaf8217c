"""The modules of a model, by the names that its pipeline has for them: moved, compared, exchanged,
and seen with other adapters.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import nn

from dreamblend.models.adapters import configs, set_adapters
from dreamblend.models.learned_token import LearnedToken
from dreamblend.models.safety import SafetyChecker


class Parts:
    """The denoiser and the text encoders that can be trained, the autoencoder, and what else there
    is.

    `bind` gives another view of the same modules with other LoRA adapters active; a view switches
    the shared modules over when it is used, so that a pair of LoRA snapshots needs one base in
    memory.

    Args:
        parts: name -> module, as the pipeline names them: the denoiser (`unet`, `transformer`)
            first, then the text encoders that can be trained, in their order.
        vae: the autoencoder.
        others: text encoders that are never trained.
    """

    vae: Any  # of a class of diffusers, as the denoiser
    concept: LearnedToken | None = None  # a learned word; each view has its own
    safety: SafetyChecker | None = None  # what looks at the images, and draws nothing

    def __init__(
        self,
        parts: dict[str, nn.Module],
        vae: nn.Module,
        others: dict[str, nn.Module] | None = None,
    ):
        self._parts, self.vae, self._others = dict(parts), vae, dict(others or {})
        # None: no adapters were ever added; {}: all off
        self.adapters: dict[str, float] | None = None
        # shared by every view
        self._active: dict[str, dict[str, float] | None] = {"adapters": None}
        for module in self.modules():
            module.requires_grad_(False).eval()

    # -- what there is
    def parts(self) -> dict[str, nn.Module]:
        """Name -> module of all that can be trained, the denoiser first."""
        return dict(self._parts)

    @property
    def denoiser_name(self) -> str:
        return next(iter(self._parts))

    @property
    def denoiser(self) -> Any:
        """Of a class of diffusers, whose attributes differ by family: so it has no narrower
        type.
        """
        return self._parts[self.denoiser_name]

    @property
    def text_encoders(self) -> dict[str, Any]:
        """Those that can be trained."""
        return {name: m for name, m in self._parts.items() if name != self.denoiser_name}

    @property
    def untrained_encoders(self) -> dict[str, nn.Module]:
        """Text encoders that are never trained."""
        return dict(self._others)

    def components(self) -> dict[str, nn.Module]:
        """Name -> module of all that the pipeline has, the denoiser first."""
        name = self.denoiser_name
        return {name: self.denoiser, "vae": self.vae, **self.text_encoders, **self._others}

    def modules(self) -> list[nn.Module]:
        return [*self.components().values(), *([self.concept] if self.concept else [])]

    def placed(self) -> list[nn.Module]:
        """All that is moved and cast."""
        return [*self.modules(), *([self.safety.checker] if self.safety else [])]

    @property
    def device(self) -> torch.device:
        """Where the modules compute; those that take turns may wait on the CPU."""
        turns = self._turns
        return next(self.denoiser.parameters()).device if turns is None else turns.execution_device

    @property
    def _turns(self) -> Any:
        """What lets the modules take turns on a device (`placement.Turns`), if anything."""
        return getattr(self.denoiser, "_hf_hook", None)

    @property
    def offloaded(self) -> bool:
        """Whether the modules take turns on a device."""
        return self._turns is not None

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move and cast all modules. The autoencoder keeps fp32 where fp16 would overflow in it,
        which its configuration says (`force_upcast`, as diffusers' pipelines read it).
        """
        upcast = self.vae.config.get("force_upcast", False)
        for module in self.placed():
            overflows = module is self.vae and upcast
            safe = torch.float32 if overflows and dtype == torch.float16 else dtype
            module.to(device=device, dtype=safe)
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass of denoiser and text encoders."""
        self.denoiser.enable_gradient_checkpointing()
        for encoder in self.text_encoders.values():
            encoder.gradient_checkpointing_enable()

    def fingerprint(self, modules: Iterable[nn.Module] | None = None) -> str:
        """A hash of the weights of `modules`, of the parts that can be trained where None: 64
        values of every tensor, so that it takes no time on large models.

        LoRA adapters do not count, whether they are active or not. It is of the weights as loaded:
        those cast to half precision have another.
        """
        digest = hashlib.sha256()
        for module in self._parts.values() if modules is None else modules:
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

    # -- the same model with other weights
    def replaced(self, dtype: torch.dtype | None = None, /, **modules: nn.Module) -> Self:
        """The same model with other modules in the places named (`unet`, `text_encoder`, ...,
        `concept`), frozen and where this one's are, in `dtype` (its denoiser's where None).
        """
        dtype = dtype or self.denoiser.dtype
        other = self._with(modules)
        other._active = {"adapters": None}
        for name, module in (*other._parts.items(), ("concept", other.concept)):
            if module is None:
                continue
            module.requires_grad_(False).eval()
            self._bring(module, dtype if name in modules else self.denoiser.dtype)
        return other

    def _bring(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Cast a module and move it to where this view's are, or let it take turns with them."""
        turns = self._turns
        if turns is None or isinstance(module, LearnedToken):
            module.to(self.device, dtype)
        else:
            turns.add_module(module.to(dtype))

    def beside(self, other: Self) -> Self:
        """This view, its parts brought to where another's are, in the dtype of its denoiser."""
        turns = other._turns
        for name, module in self._parts.items():
            there = turns is not None and getattr(module, "_hf_hook", None) is turns
            if module is not other._parts[name] and not there:
                other._bring(module, other.denoiser.dtype)
        return self

    def sharing(self, **modules: nn.Module) -> Self:
        """A view with other modules in the places named that are made of this one's layers (as
        `overlay` makes them), or another `concept`; all else, adapters too, is shared.
        """
        for module in modules.values():
            module.requires_grad_(False).eval()
        return self._with(modules)

    def _with(self, modules: dict[str, nn.Module]) -> Self:
        if unknown := modules.keys() - self._parts.keys() - {"concept"}:
            raise TypeError(f"{sorted(unknown)} are no parts of this model: {list(self._parts)}")
        other = copy.copy(self)
        other._parts = {name: modules.get(name, part) for name, part in self._parts.items()}
        if isinstance(concept := modules.get("concept"), LearnedToken):
            other.concept = concept
        return other

    # -- the same weights with other adapters
    def bind(self, adapters: dict[str, float]) -> Self:
        """A view with these LoRA adapters active, by weight; {} is the base itself."""
        view = copy.copy(self)
        view.adapters = adapters
        return view

    def bare(self) -> Self:
        """The base itself: a view in which no adapter acts, whatever was added to the modules."""
        added = any(configs(module) for module in self._parts.values())
        return self.bind({}) if added or self.adapters is not None else self

    def activate(self) -> None:
        """Switch the shared modules to this view's adapters. Cheap when they already are."""
        if self._active["adapters"] == self.adapters:
            return
        for module in self._parts.values():
            if here := configs(module):
                weights = self.adapters or {}
                set_adapters(module, {name: w for name, w in weights.items() if name in here})
        self._active["adapters"] = self.adapters

    def forget(self, name: str) -> None:
        """Remove the LoRA adapter `name` from the shared modules, if it is there. The others are
        off until a view is used.
        """
        owners = [m for m in self._parts.values() if name in configs(m)]
        for module in owners:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*was active which is now deleted.*")
                # as diffusers and as transformers call it
                for method in ("delete_adapters", "delete_adapter"):
                    if delete := getattr(module, method, None):
                        delete(name)
                        break
        if owners:
            self._active["adapters"] = None  # which of the others peft made active is not known
            self.bind({}).activate()
