"""In what form weights lie and where, so that a large model fits a small GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dreamblend.errors import InputError
from dreamblend.models.backbone import Backbone

OFFLOADS = ("none", "model")
QUANTISERS = {"int8": "torchao", "nf4": "bitsandbytes"}  # form of weights -> package


def check_quantize(kind: str | None) -> None:
    """Raise InputError for a form of weights that is not known, or whose package is missing."""
    if kind is None:
        return
    if kind not in QUANTISERS:
        raise InputError(f"model.quantize is {kind!r}: it is one of {', '.join(QUANTISERS)}")
    if importlib.util.find_spec(QUANTISERS[kind]) is None:
        raise InputError(
            f"model.quantize {kind} needs the package {QUANTISERS[kind]}: pip install"
            " 'dreamblend[quantize]'"
        )


def check_offload(kind: str) -> None:
    """Raise InputError for a way of offloading that is not known."""
    if kind not in OFFLOADS:
        raise InputError(f"model.offload is {kind!r}: it is one of {', '.join(OFFLOADS)}")


class Turns:
    """Modules that take turns on a device: each comes as it is called, and the one before it goes
    back to the CPU.

    accelerate's `cpu_offload_with_hook` knows one predecessor of a module, as in a pipeline. The
    denoisers of a blend are called in any order.

    Args:
        execution_device: where they compute.
    """

    def __init__(self, execution_device: torch.device):
        self.execution_device = execution_device
        self._last: nn.Module | None = None  # that was called
        self._handles: dict[nn.Module, RemovableHandle] = {}

    def add(self, backbone: Backbone, dtype: torch.dtype | None = None) -> None:
        """Let the modules of a model take turns, cast to `dtype`. A learned word is small and
        stays.
        """
        backbone.to("cpu", dtype)
        for module in backbone.placed():
            if module is backbone.concept:
                module.to(self.execution_device)
            else:
                self.add_module(module)

    def add_module(self, module: nn.Module) -> None:
        """Let one module take turns; it waits on the CPU."""
        module.to("cpu")
        if getattr(module, "_hf_hook", None) is not self:
            self._handles[module] = module.register_forward_pre_hook(self.pre_forward)
            # diffusers' pipelines ask it for the device; encode and decode of autoencoders call it
            module._hf_hook = self  # type: ignore[assignment]

    def pre_forward(self, module: nn.Module, *_: Any) -> None:
        """Bring a module to the device, after the one that was there has left."""
        if self._last is not None and self._last is not module:
            self._last.to("cpu")
        if next(module.parameters()).device != self.execution_device:
            module.to(self.execution_device)
        self._last = module

    def end(self) -> None:
        """Let the modules be called where they are."""
        for module, handle in self._handles.items():
            handle.remove()
            del module._hf_hook
        self._handles.clear()

    def __deepcopy__(self, memo: dict) -> Turns:
        """A copied module takes turns with those that it was copied from."""
        return self


def place(
    backbone: Backbone,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    turns: Turns | None = None,
) -> None:
    """Move a model to a device, or let its modules take turns there; cast to `dtype` if given."""
    if turns is None:
        backbone.to(device, dtype)
    else:
        turns.add(backbone, dtype)


def quantise(backbone: Backbone, kind: str, dtype: torch.dtype) -> None:
    """Quantise the linear layers of the denoiser and of the text encoders that are never trained:
    8 bits a weight (int8, one scale for each output) or 4 (nf4; Dettmers et al., 2023). The rest of
    them is cast to `dtype`, in which they compute.

    It is done where the weights lie, before any adapter is added: adapters stay exact.
    """
    for module in (backbone.denoiser, *backbone.untrained_encoders.values()):
        _quantise(module.to(dtype), _config(kind, dtype))


def _config(kind: str, dtype: torch.dtype) -> Any:
    import diffusers

    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    return diffusers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _quantise(module: Any, config: Any) -> None:
    """What diffusers does as it loads a module, to one that is loaded: only then is it known which
    base this is, as its fingerprint is of the full weights.
    """
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    quantiser = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
    values = dict(module.named_parameters())
    exact = list(getattr(module, "_keep_in_fp32_modules", None) or [])
    quantiser.preprocess_model(module, device_map=None, keep_in_fp32_modules=exact)
    for name in list(values):
        value = values.pop(name).detach()  # freed one by one
        if quantiser.check_if_quantized_param(module, value, name, {}):
            quantiser.create_quantized_param(module, value, name, value.device, {}, [])
    quantiser.postprocess_model(module)
    module.hf_quantizer = quantiser  # peft asks it
    # with these the libraries' `to` refuses every dtype, that of the module too
    module.is_quantized, module.quantization_method = False, None
    module.requires_grad_(False)
