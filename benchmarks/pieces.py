"""What is timed and what is counted: pairs of snapshots without a training, and one step of a
training without a run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from dreamblend.blending.models import Models
from dreamblend.models import Backbone
from dreamblend.models.adapters import set_adapters
from dreamblend.training.encoded import EncodedPrompts
from dreamblend.training.module import Tuner
from dreamblend.tuning import LoRA

RANK = 16  # of adapters
CHANGE = 1.001  # of the weights of a full pair: what they are costs nothing


def lora_pair(model: Backbone) -> Models:
    """Two LoRA snapshots over one base, of random values, where it is and in its dtype."""
    from peft import LoraConfig

    from dreamblend.tuning.peft_adapters import inject

    denoiser = model.denoiser
    device, dtype = model.device, denoiser.dtype
    for name in ("early", "late"):
        how = LoraConfig(r=RANK, target_modules=list(model.lora_targets), init_lora_weights=False)
        inject(how, denoiser, name)
    for name, weight in denoiser.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(device, dtype)
    set_adapters(denoiser, {})
    model._active["adapters"] = {}
    return Models(model.bind({"early": 1.0}), model.bind({"late": 1.0}), model)


def full_pair(model: Backbone) -> Models:
    """Two full snapshots: the base, and a copy of all that can be trained, its weights changed."""
    copies = {name: copy.deepcopy(module) for name, module in model.parts().items()}
    with torch.no_grad():
        for module in copies.values():
            for weight in module.parameters():
                weight.mul_(CHANGE)
    return Models(model, model.replaced(**copies), model)


def lora_tuner(model: Backbone) -> Tuner:
    """A `Tuner` without a run: LoRA in fp32 in a model, with gradient checkpointing."""
    tuner = Tuner(tuning=LoRA(RANK), gradient_checkpointing=True, learning_rate=1e-4)
    tuner.backbone, tuner.noise, tuner.seed = model, model.training_noise(), 0
    tuner.tuning.attach(model)
    for parameter in tuner.tuning.parameters(model):  # as `Tuner.configure_model`
        parameter.data = parameter.data.to(model.device, torch.float32)
    model.enable_gradient_checkpointing()
    model.denoiser.train()
    return tuner.to(model.device)


def training_step(tuner: Tuner, prompt: str, latents: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """A step as `Tuner` makes it, in bf16, and AdamW's: of one prompt and one photo, the mean and
    deviation (1, channels, height, width) of whose latents are given.
    """
    model = tuner.backbone
    tuner.latents = {False: [{0: latents}], True: []}
    with torch.no_grad():
        tuner.encoded = EncodedPrompts(model, [prompt])
    optimizer = torch.optim.AdamW(tuner.tuning.parameters(model), 1e-4, foreach=False)
    one = torch.zeros(1, dtype=torch.long)
    batch = {"draw": one, "index": one, "flipped": one, "prior": one.bool()}
    batch |= {"bucket": 0, "prompts": [prompt]}

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = tuner.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
