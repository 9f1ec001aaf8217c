"""The arguments of a call of the pipeline, which are those of diffusers' pipelines, checked and
turned into what a batch is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from dreamblend.blending.blends import BLENDS, Blend
from dreamblend.errors import InputError
from dreamblend.models import Backbone
from dreamblend.sampling import Random
from dreamblend.storage.photos import as_photo, open_photo

OUTPUTS = ("pil", "np", "pt", "latent")


def check_call(
    output_type: str,
    num_inference_steps: int,
    num_images_per_prompt: int,
    callback_on_step_end_tensor_inputs: Sequence[str],
) -> None:
    """Raise InputError for what no base can draw."""
    if torch.is_inference_mode_enabled():
        raise InputError(
            "guidance needs gradients: leave out torch.inference_mode(), or use torch.no_grad()"
        )
    if output_type not in OUTPUTS:
        raise InputError(f"output_type is {output_type!r}: it is one of {', '.join(OUTPUTS)}")
    for name, number in (
        ("num_inference_steps", num_inference_steps),
        ("num_images_per_prompt", num_images_per_prompt),
    ):
        if number < 1:
            raise InputError(f"{name} is {number}: it must be at least 1")
    if lacking := set(callback_on_step_end_tensor_inputs) - {"latents"}:
        raise InputError(
            f"callback_on_step_end_tensor_inputs names {sorted(lacking)[0]}: latents is all that"
            " there is"
        )


def blend_of(blend: Blend | str) -> Blend:
    """A blend by its name, with its default settings, or as it is."""
    if isinstance(blend, Blend):
        return blend
    if blend not in BLENDS:
        raise InputError(f"blend is {blend!r}: it is one of {', '.join(BLENDS)}, or a Blend")
    return BLENDS[blend]()


def strength_of(**attention_kwargs: dict[str, Any] | None) -> float | tuple[float, float] | None:
    """The scale of the adapters, which is in a dictionary that diffusers' families call by
    several names.
    """
    given = {name: kwargs for name, kwargs in attention_kwargs.items() if kwargs is not None}
    if not given:
        return None
    (name, kwargs), *more = given.items()
    if more:
        raise InputError(f"{name} and {more[0][0]} mean the same here: give one")
    if kwargs.keys() != {"scale"}:
        raise InputError(f'{name} has {sorted(kwargs)}: {{"scale": ...}} is all that there is')
    scale = kwargs["scale"]
    both = scale if isinstance(scale, (list, tuple)) else (scale, scale)
    if len(both) != 2 or not all(isinstance(one, (int, float)) for one in both):
        raise InputError(f"{name} has the scale {scale!r}: it is a number, or (early, late)")
    return float(both[0]), float(both[1])


def prompts_of(
    prompt: str | list[str] | None,
    each: int,
    subject: str,
    blend: Blend,
    embeds: Tensor | list[Tensor] | None,
) -> list[str]:
    """One prompt an image. Where only embeddings are given they are empty: they have no words."""
    if prompt is None and embeds is not None:
        if blend.needs_words:
            raise InputError(
                f"prompt_embeds do not say which tokens name the subject, and {blend.name} needs to"
                " know: give the prompts beside them, or another blend, such as score"
            )
        return [""] * (len(embeds) * each)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if not prompts or not all(isinstance(one, str) for one in prompts):
        raise InputError("prompt is no text: give one, or a list of them, or prompt_embeds")
    return [one.replace("{subject}", subject) for one in prompts for _ in range(each)]


def negative_of(
    negative: str | list[str] | None, count: int, each: int, embeds: Tensor | list[Tensor] | None
) -> str | list[str] | None:
    """One for all images, or one for each."""
    if negative is not None and embeds is not None:
        raise InputError("negative_prompt and negative_prompt_embeds are both given: leave one out")
    if negative is None or isinstance(negative, str):
        return negative
    if len(negative) * each != count:
        raise InputError(
            f"there are {len(negative)} negative prompts for {count // each} prompts: give one, or"
            " one for each prompt"
        )
    return [one for one in negative for _ in range(each)]


def noise_of(
    model: Backbone,
    count: int,
    height: int | None,
    width: int | None,
    generator: Random | None,
    latents: Tensor | None,
) -> Tensor:
    """(count, channels, height, width), in fp32 as `predict` has it, on the model's device."""
    if isinstance(generator, list) and len(generator) != count:
        raise InputError(
            f"there are {len(generator)} generators for {count} images: give one, or one for each"
            " image"
        )
    channels = model.latent_shape[0]
    if latents is None:
        sides = model.latent_size(height or model.size, width or model.size)
        return randn_tensor((count, channels, *sides), generator, model.device, torch.float32)
    if latents.ndim != 4 or latents.shape[:2] != (count, channels):
        raise InputError(
            f"latents are {tuple(latents.shape)}: they are ({count}, {channels}, height, width)"
            " here, whatever form the family's own pipeline has them in"
        )
    size = latents.shape[2], latents.shape[3]
    if (height or width) and size != model.latent_size(height or model.size, width or model.size):
        raise InputError(
            f"latents of {size[0]} x {size[1]} are of another size than height and width: leave"
            " these out"
        )
    return latents.to(model.device, torch.float32)


def reference_of(
    reference: Image.Image | str | Path | None, blend: Blend, calls: int
) -> Image.Image | None:
    """The image whose layout guides a blend."""
    if reference is not None and not blend.guided_steps(calls):
        raise InputError(
            f"reference guides CAG alone, and {blend.name} is drawn: set blend to cag, or leave it"
            " out"
        )
    if isinstance(reference, (str, Path)):
        return open_photo(Path(reference).expanduser())
    return None if reference is None else as_photo(reference)
