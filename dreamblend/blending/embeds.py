"""Prompts that come encoded, by the names that diffusers' pipelines have for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dreamblend.errors import InputError
from dreamblend.models import Backbone, Conditioning


class Embeds(NamedTuple):
    """What a call of a pipeline was given; None where nothing was."""

    prompt_embeds: Tensor | list[Tensor] | None = None
    pooled_prompt_embeds: Tensor | None = None
    prompt_attention_mask: Tensor | None = None
    prompt_embeds_mask: Tensor | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in self)


def embeds_of(
    model: Backbone,
    prompts: list[str],
    each: int,
    given: Embeds,
    negative: Embeds,
    known: bool,
    guidance_scale: float,
) -> tuple[Conditioning | None, Conditioning | None]:
    """The prompts' and the negative prompts' embeddings as the family's own conditioning; None
    where none are given.

    Args:
        each: images of each prompt.
        known: whether the prompts are: their embeddings are then of as many tokens as their own.
    """
    made = of_negative = None
    if given:
        if model.clip_skip is not None:
            raise InputError("clip_skip acts on prompts, and prompt_embeds are given: leave it out")
        own = model.encode_prompts(prompts)
        made = _conditioning(model, own, each, given, own.states.shape[1] if known else None)
    if negative:
        own = model.without_prompt(len(prompts))
        # without a mask both are of one length
        tokens = None if "mask" in own.extras else (made or own).states.shape[1]
        of_negative = _conditioning(model, own, each, negative, tokens, "negative_")
    elif made and "mask" not in made.extras and model.predicts_twice(guidance_scale):
        tokens, empty = (one.states.shape[1] for one in (made, own))
        if tokens != empty:
            raise InputError(
                f"prompt_embeds are of {tokens} tokens, and the empty prompt of {model.base} is of"
                f" {empty}: give negative_prompt_embeds of their shape"
            )
    return made, of_negative


def _conditioning(
    model: Backbone,
    own: Conditioning,
    each: int,
    given: Embeds,
    tokens: int | None,
    prefix: str = "",
) -> Conditioning:
    """`own` with what is given in it, of so many tokens; of any number where None."""
    name, states, pooled = f"{prefix}prompt_embeds", given.prompt_embeds, own.extras.get("pooled")
    others = {key: value for key, value in given._asdict().items() if key != "prompt_embeds"}
    needed = {model.mask_argument, "pooled_prompt_embeds" if pooled is not None else None}
    if states is None:
        alone = next(argument for argument, value in others.items() if value is not None)
        raise InputError(f"{prefix}{alone} is nothing without {name}: give both")
    for argument, value in others.items():
        if value is not None and argument not in needed:
            raise InputError(f"the family of this base has no {prefix}{argument}: leave it out")
        # Qwen-Image's pipeline makes no mask where nothing is padded
        if value is None and argument in needed and argument != "prompt_embeds_mask":
            raise InputError(f"the family of this base needs {prefix}{argument} beside {name}")
    mask = others[model.mask_argument] if model.mask_argument else None
    count, length, channels = own.states.shape
    if "mask" in own.extras and not model.mask_argument:  # as Z-Image's pipeline takes them
        each_states = list(states)
        if any(one.ndim != 2 or one.shape[1] != channels for one in each_states):
            raise InputError(f"{name} are a list for this base, of (tokens, {channels}) each")
        made = Conditioning.of_each(each_states)
        states, mask = made.states, made.extras["mask"]
    elif not isinstance(states, Tensor) or states.ndim != 3:
        raise InputError(f"{name} are one tensor for this base: (prompts, tokens, {channels})")
    # some families tell the denoiser of each token beside the states
    bound = any(
        extra.shape[1:2] == (length,) for kind, extra in own.extras.items() if kind != "mask"
    )
    length = length if bound else tokens or states.shape[1]
    extras = dict(own.extras)
    if pooled is not None:
        argument, value = f"{prefix}pooled_prompt_embeds", given.pooled_prompt_embeds
        extras["pooled"] = _as_own(argument, value, pooled, each, pooled.shape)
    if "mask" in own.extras:
        mask = torch.ones(states.shape[:2]) if mask is None else mask
        own_mask = own.extras["mask"]
        extras["mask"] = _as_own(f"the mask of {name}", mask, own_mask, each, (count, length))
    return Conditioning(_as_own(name, states, own.states, each, (count, length, channels)), extras)


def _as_own(name: str, given: Any, own: Tensor, each: int, shape: tuple[int, ...]) -> Tensor:
    """What is given for each prompt, for each image, of the shape, dtype and device of `own`."""
    made = given.to(own.device, own.dtype).repeat_interleave(each, 0)
    if made.shape != shape:
        of_prompts = (shape[0] // each, *shape[1:])
        raise InputError(f"{name} are {tuple(given.shape)}: for these prompts {of_prompts}")
    return made
