"""The denoising loop, and the predictors that it calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamblend.models import Backbone, Conditioning
from dreamblend.storage.photos import to_images

Predictor = Callable[
    [Tensor, Tensor, int], Tensor
]  # (scaled latents, timestep, step number) -> model output
Random = torch.Generator | list[torch.Generator]  # one for a batch, or one for each of its samples


def initial_noise(shape: tuple[int, ...], seeds: list[int]) -> Tensor:
    """Noise (batch, *shape). Each row comes from its own seed on the CPU, the same as from
    `torch.Generator().manual_seed(seed)` in a diffusers pipeline.
    """
    return torch.cat(
        [torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def classifier_free(
    model: Backbone,
    conditioned: Conditioning,
    unconditioned: Conditioning,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
) -> Predictor:
    """Classifier-free guidance (Ho and Salimans, 2022). Args as `Halves` and `combined`."""
    both = Halves(model, conditioned, unconditioned, guidance_scale)

    def predict(z: Tensor, t: Tensor, step: int) -> Tensor:
        return combined(model, *both(z, t), guidance_scale, guidance_rescale)

    return predict


class Halves:
    """What classifier-free guidance combines: a model's predictions without the prompt and with it.

    `twice` says whether guidance takes both: at a scale of 1 and below, and of a distilled model,
    it takes the prompt's own alone.
    """

    def __init__(
        self,
        model: Backbone,
        conditioned: Conditioning,
        unconditioned: Conditioning,
        guidance_scale: float,
    ):
        self.twice = model.predicts_twice(guidance_scale)
        self._model, self._prompts = model, model.guided(conditioned, guidance_scale)
        self._both = Conditioning.cat([unconditioned, self._prompts]) if self.twice else None

    def __call__(self, z: Tensor, t: Tensor, both: bool = True) -> tuple[Tensor | None, Tensor]:
        """The predictions for scaled latents at a timestep, in one batch; None for that without the
        prompt where guidance does not take it, or it is not asked for.
        """
        if self._both is None or not both:
            return None, self._model.denoise(z, t, self._prompts)
        unguided, guided = self._model.denoise(torch.cat([z, z]), t, self._both).chunk(2)
        return unguided, guided


def combined(
    model: Backbone,
    unguided: Tensor | None,
    guided: Tensor,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
) -> Tensor:
    """The guided prediction of both halves; the prompt's own where that is all there is.

    `guidance_rescale` is the share in which it gets the deviation of the prompt's own, against
    overexposure (Lin et al., 2024).
    """
    if unguided is None:
        return guided
    return rescaled(model.combine(unguided, guided, guidance_scale), guided, guidance_rescale)


def rescaled(prediction: Tensor, guided: Tensor, share: float) -> Tensor:
    """A guided prediction with the deviation of the prompt's own, in this share."""
    if not share:
        return prediction
    from diffusers.guiders.guider_utils import rescale_noise_cfg  # slow to import: when needed

    return rescale_noise_cfg(prediction, guided, share)


@torch.no_grad()
def sample(
    predict: Predictor,
    noise: Tensor,
    scheduler: Any,
    adjust: Callable[[Tensor, Tensor, int, object], Tensor] | None = None,
    seeds: list[int] | None = None,
    generator: Random | None = None,
    after: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    calls: int | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> Tensor:
    """Denoise from noise to latents.

    Args:
        predict: the model's output at a step.
        noise: (batch, channels, height, width), unit variance.
        scheduler: any scheduler of diffusers, its timesteps just set (`Backbone.schedule`).
        adjust: (latents, t, call number, scheduler) -> latents. It may move the latents before each
            call of the model that begins a step (`beginnings`). They are the sampler's latents,
            before `scale_model_input`.
        seeds: of the samples, for schedulers that add noise at their steps. The generator of each
            sample goes on where its `initial_noise` ended, as in a diffusers pipeline. If None, the
            global generator is used, and a sample depends on its batch.
        generator: instead of seeds, one or one for each sample, as they stand after the noise. They
            stay as they are: copies of them go on.
        after: (latents, t, call number) -> latents, after each call of the model: those to go on
            from.
        calls: how many calls of the model are made, where the rest is not wanted; all where None.
        interrupted: asked after each call of the model whether to end with its latents.
    """
    random = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        random["generator"] = _going_on(generator, seeds, noise)
    z, first = noise * getattr(scheduler, "init_noise_sigma", 1.0), beginnings(scheduler)
    for i, t in enumerate(scheduler.timesteps[:calls]):
        if adjust is not None and i in first:
            moved = adjust(z, t, i, scheduler)
            if moved is not z and getattr(scheduler, "last_sample", None) is not None:
                # UniPC and SA-Solver would correct the previous step from here, and lose the move
                scheduler.last_sample = None
            z = moved
        output = predict(scaled(scheduler, z, t), t, i)
        z = scheduler.step(output.to(z.dtype), t, z, return_dict=False, **random)[0]
        if after is not None:
            z = after(z, t, i)
        if interrupted is not None and interrupted():
            break
    return z


def _going_on(generator: Random | None, seeds: list[int] | None, noise: Tensor) -> Random | None:
    """What draws the noise of the steps, after the noise that they begin with."""
    if isinstance(generator, torch.Generator):
        return generator.clone_state()
    if generator is not None:
        return [one.clone_state() for one in generator]
    if seeds is None:
        return None
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for one in generators:
        torch.randn((1, *noise.shape[1:]), generator=one)
    return generators


def sample_plain(
    model: Backbone,
    prompts: list[str],
    seeds: list[int],
    num_inference_steps: int,
    guidance_scale: float,
    latent_size: tuple[int, int] | None = None,
) -> Tensor:
    """Latents (batch, channels, height, width) of one model alone, one for each prompt and its
    seed; of the model's own height and width where `latent_size` is None.
    """
    empty = model.without_prompt(len(prompts))
    predict = classifier_free(model, model.encode_prompts(prompts), empty, guidance_scale)
    channels, *own = model.latent_shape
    noise = initial_noise((channels, *(latent_size or own)), seeds).to(model.device)
    return sample(predict, noise, model.schedule(num_inference_steps, latent_size), seeds=seeds)


@torch.no_grad()
def draw(
    model: Backbone,
    prompts: list[str],
    seeds: list[int],
    num_inference_steps: int,
    guidance_scale: float,
) -> list[Image.Image]:
    """Plain images, one for each prompt and its seed. They are decoded one at a time, as an
    autoencoder needs more memory than a denoiser.
    """
    latents = sample_plain(model, prompts, seeds, num_inference_steps, guidance_scale)
    return [to_images(model.decode(z[None]))[0] for z in latents]


def scaled(scheduler: Any, z: Tensor, t: Tensor) -> Tensor:
    """The sampler's latents as its model takes them. Schedulers of flows take them as they are."""
    return scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z


def beginnings(scheduler: Any) -> set[int]:
    """The calls of the model that begin a step, for a scheduler whose timesteps are set.

    The other calls continue from latents that the scheduler kept when the step began, so a change
    of the latents before them is lost. These are the repeated call of PNDM (Stable Diffusion's
    default), three of four of its Runge-Kutta calls, the second calls of Heun and KDPM2, and those
    by which single-step DPM-Solver raises its order.
    """
    n = len(scheduler.timesteps)
    if hasattr(scheduler, "prk_timesteps"):
        warmup = len(scheduler.prk_timesteps)
        return {*range(0, warmup, 4), *range(warmup, n)} - (set() if warmup else {1})
    if hasattr(scheduler, "order_list"):
        return {i for i, order in enumerate(scheduler.order_list[:n]) if order == 1}
    return set(range(0, n, getattr(scheduler, "order", 1)))
