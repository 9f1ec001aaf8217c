"""A peft adapter is put into a module."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, cast

from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers.integrations.peft import PeftAdapterMixin


def inject(config: LoraConfig, module: nn.Module, name: str) -> None:
    """Wrap the layers of a module that `config` targets in an adapter called `name`.

    Raises ValueError where no layer is a target.
    """
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():  # the other snapshot of a pair has its adapter there already
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, module, name)
    # so that diffusers and transformers know of it: the models of both have this flag
    cast("PeftAdapterMixin", module)._hf_peft_config_loaded = True
