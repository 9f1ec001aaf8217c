"""Low-rank adapters (Hu et al., 2021) through peft, in the file layout of diffusers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from dreamblend.errors import InputError
from dreamblend.models import Backbone
from dreamblend.models.adapters import configs, set_adapters
from dreamblend.storage.foreign import LORA, method_of
from dreamblend.storage.snapshots import Files, Snapshot, Weights
from dreamblend.tuning import lora_files
from dreamblend.tuning.method import Method
from dreamblend.tuning.peft_adapters import inject

TRAINING = "tuned"
PRESETS = ("attention", "attention_and_ff", "all")
CLIP_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # a text encoder's attention


class LoRA(Method):
    """Train low-rank adapters on the denoiser's attention.

    Args:
        rank: inner dimension of an adapter: 8 where None.
        alpha: scale; the adapter's output is multiplied by alpha / rank. The rank where None.
        dropout: probability of dropping an input of an adapter.
        dora: weight-decomposed adapters (Liu et al., 2024).
        targets: the denoiser's layers that get an adapter: attention (where None), attention_and_ff
            (its feed-forward layers too) or all, as the family has them; or a list of names.
        text_encoder: adapt the text encoder's attention too.
        start: a LoRA file or folder, of any tool, from which training goes on. Its rank, alpha and
            layers are the adapter's: leave out `alpha`, `dora`, `targets` and `text_encoder`; a
            `rank` must be the file's.
    """

    name = "lora"
    apart = True
    rates = {"sandbox": 2e-3, "sandbox-dit": 2e-3, "usual": 1e-4}

    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        dora: bool = False,
        targets: list[str] | str | None = None,
        text_encoder: bool = False,
        start: Path | str | None = None,
    ):
        if rank is not None and rank < 1:
            raise InputError(f"model.tuning.rank is {rank}: it must be at least 1")
        if alpha is not None and alpha <= 0:
            raise InputError(f"model.tuning.alpha is {alpha}: it must be above zero")
        if not 0 <= dropout < 1:
            raise InputError(f"model.tuning.dropout is {dropout}: it is a probability below 1")
        given = {"alpha": alpha, "dora": dora, "targets": targets, "text_encoder": text_encoder}
        if start is not None and (also := [name for name, value in given.items() if value]):
            raise InputError(
                f"model.tuning.{also[0]} is that of the file model.tuning.start: leave it out"
            )
        if start is not None and not (Path(start).is_file() or Path(start).is_dir()):
            raise InputError(f"model.tuning.start {start} does not exist: name a LoRA file")
        self._start, self._asked_rank = (Path(start) if start is not None else None), rank
        self.rank = 8 if rank is None else rank
        self.alpha: float = alpha if alpha is not None else self.rank
        self.dropout = dropout
        self.dora = dora
        if isinstance(targets, str) and targets not in PRESETS:
            raise InputError(
                f"model.tuning.targets is {targets!r}: it is one of {', '.join(PRESETS)}, or a list"
                ' of names, such as ["to_q", "to_k"]'
            )
        # a preset stays one until the family is known
        self.targets = targets if isinstance(targets, str) else targets and list(targets)
        self.text_encoder = text_encoder

    def attach(self, backbone: Backbone, identifier: str = "", class_noun: str = "") -> None:
        if self._start is not None:
            self._go_on(backbone, self._start)
            return
        from peft import LoraConfig

        wanted = _layers(backbone, self.targets)
        if self.targets != "all":  # which would be hundreds of names in every record
            self.targets = wanted
        idle = backbone.idle()
        for name, module in self.trained(backbone).items():
            targets = wanted if name == backbone.denoiser_name else CLIP_TARGETS
            others = "|".join(rf"{re.escape(layer)}(\..*)?" for layer in idle.get(name, []))
            config = LoraConfig(
                r=self.rank,
                lora_alpha=cast("int", self.alpha),  # peft takes any number, whatever it declares
                lora_dropout=self.dropout,
                use_dora=self.dora,
                target_modules=targets,
                exclude_modules=others or None,
                init_lora_weights="gaussian",
            )
            try:
                inject(config, module, TRAINING)
            except ValueError as error:
                raise InputError(
                    f"model.tuning.targets {targets} match no layer of the denoiser:"
                    f" {str(error).splitlines()[0]}"
                ) from error

    @property
    def settings(self) -> dict[str, Any]:
        settings = super().settings
        if self._start is not None:  # by its content, as it may be moved
            settings["start"] = _content(self._start)
        return settings

    def _go_on(self, backbone: Backbone, start: Path) -> None:
        """Put the adapter of a file in the place of a new one, to be trained further."""
        method = method_of(start)
        if method != self.name:
            raise InputError(
                f"model.tuning.start {start} is of the method {method}, and {self.name} trains:"
                " name a LoRA"
            )
        modules = backbone.parts()
        lora_files.load(start, modules, TRAINING, backbone.base)
        adapted = {name: configs(module).get(TRAINING) for name, module in modules.items()}
        config = adapted[backbone.denoiser_name]
        if config is None:
            raise InputError(
                f"model.tuning.start {start} holds nothing for the denoiser of {backbone.base}:"
                " name another"
            )
        if self._asked_rank not in (None, config.r):
            raise InputError(
                f"model.tuning.rank is {self._asked_rank}, and that of model.tuning.start {start}"
                f" is {config.r}: leave it out"
            )
        self.rank, self.alpha, self.dora = config.r, config.lora_alpha, config.use_dora
        self.text_encoder = any(adapted[name] is not None for name in backbone.text_encoders)
        for module in modules.values():
            if TRAINING not in configs(module):
                continue
            configs(module)[TRAINING].inference_mode = False
            configs(module)[TRAINING].lora_dropout = self.dropout
            for name, layer in module.named_modules():
                if name.endswith(".lora_dropout") and self.dropout:
                    cast(nn.ModuleDict, layer)[TRAINING] = nn.Dropout(self.dropout)
            for name, parameter in module.named_parameters():
                if "lora_" in name and TRAINING in name.split("."):
                    parameter.requires_grad_(True)

    def trained(self, backbone: Backbone) -> dict[str, nn.Module]:
        trained = super().trained(backbone)
        if self._start is None:
            return trained
        return {name: module for name, module in trained.items() if TRAINING in configs(module)}

    def export(self, backbone: Backbone) -> Files:
        from peft import get_peft_model_state_dict

        tensors: dict[str, Tensor] = {}
        settings: dict[str, Any] = {}  # of the configuration, as JSON has it
        for prefix, module in self.trained(backbone).items():
            state = get_peft_model_state_dict(module, adapter_name=TRAINING)
            encodes = prefix in backbone.text_encoders
            # dropped by transformers 5 in memory; other tools and versions expect it
            dropped = encodes and not hasattr(module, "text_model")
            inside = f"{prefix}.text_model" if dropped else prefix
            if encodes:  # transformers 5 finds DoRA's magnitudes by this name only
                state = {
                    re.sub(r"lora_magnitude_vector$", r"\g<0>.weight", k): v
                    for k, v in state.items()
                }
            tensors |= {f"{inside}.{k}": v for k, v in state.items()}
            config = {
                k: sorted(v) if isinstance(v, set) else v
                for k, v in configs(module)[TRAINING].to_dict().items()
            }
            settings |= {f"{prefix}.{k}": v for k, v in config.items()}
        # diffusers reads rank, alpha and targets from here, so that a scale other than 1 survives
        return {
            LORA: Weights(tensors, {"lora_adapter_metadata": json.dumps(settings, sort_keys=True)})
        }

    @staticmethod
    def restore(
        path: Path, backbone: Backbone, name: str, identifier: str | None = None
    ) -> Backbone:
        modules = backbone.parts()
        try:
            lora_files.load(path, modules, name, backbone.base)
        except InputError:
            backbone.forget(name)
            raise
        for module in modules.values():
            if configs(module):
                set_adapters(module, {})
                # the adapters to their module, which may wait on the CPU
                module.to(next(module.parameters()).device)
        backbone._active["adapters"] = {}
        return backbone.bind({name: 1.0})


def _layers(backbone: Backbone, targets: list[str] | str | None) -> list[str]:
    """The names or their ends of the denoiser's layers, of a preset or as they are given."""
    if targets in (None, [], "attention"):
        return list(backbone.lora_targets)
    if targets == "attention_and_ff":
        return [*backbone.lora_targets, *backbone.feed_forward]
    if targets == "all":
        return [
            name
            for name, layer in backbone.denoiser.named_modules()
            if isinstance(layer, nn.Linear) or isinstance(layer, nn.Conv2d) and layer.groups == 1
        ]
    assert isinstance(targets, list)  # all else is refused
    return targets


def _content(path: Path) -> str:
    """A hash of what a file or folder holds."""
    return Snapshot(path, "lora").weights
