"""In what form weights lie and where, so that a large model fits a small GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from dreamblend.errors import InputError
from dreamblend.models.backbone import Backbone

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
