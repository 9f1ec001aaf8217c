"""DreamBlend: the late snapshot, its cross-attention guided to the early one's."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamblend.attention import Maps, record
from dreamblend.blending.batch import Task
from dreamblend.blending.blends.blend import Blend, Drawn, share_of_steps, watched
from dreamblend.blending.guidance import distance_and_gradient, guidance_step, map_energy
from dreamblend.errors import InputError
from dreamblend.sampling import classifier_free


class CAG(Blend):
    """The late snapshot, its cross-attention guided to the early one's (DreamBlend, Ram et al.,
    WACV 2025).

    Args:
        strength: of a guidance step: how far it may reach, in shares of the latents' norm; 0 is the
            late snapshot alone.
        window: first and last share of the model's calls that are guided, of those that begin a
            step.
        repeats: guidance steps before each denoising step.
    """

    name = "cag"

    def __init__(
        self, strength: float = 0.5, window: tuple[float, float] = (0.0, 0.6), repeats: int = 1
    ):
        share_of_steps("window", *window)
        if not strength >= 0 or repeats < 1:
            raise InputError(
                f"strength is {strength} and repeats {repeats}: strength is 0 or more, repeats 1 or"
                " more"
            )
        self.strength, self.window, self.repeats = strength, tuple(window), repeats

    def guided_steps(self, steps: int) -> range:
        return range(round(self.window[0] * steps), round(self.window[1] * steps))

    def draw(self, task: Task) -> Drawn:
        conditioned, unconditioned = task.encode(task.late)
        predict = classifier_free(task.late, conditioned, unconditioned, task.scale)
        sites, distances = task.late.sites(task.grid), []
        guided = self.guided_steps(task.calls) if self.strength else range(0)
        if not task.reference.keys() >= set(guided):
            raise ValueError(
                "there is no reference: Early has to draw the task first, with the blend's guided"
                " steps"
            )

        def adjust(z: Tensor, t: Tensor, step: int, scheduler) -> Tensor:
            if step not in guided:
                return z

            def read(z: Tensor) -> Maps:
                with record(task.late.denoiser, sites, task.tokens, stop_at_last=True) as maps:
                    task.late.denoise(scheduler.scale_model_input(z, t), t, conditioned)
                return maps

            energy = map_energy(task.reference[step], task.weights)
            for _ in range(self.repeats):
                distance, gradient = distance_and_gradient(
                    read, z, task.reference[step], task.weights
                )
                z = guidance_step(z, distance, gradient, energy, self.strength)
            distances.append(distance)
            return z

        drawn = watched(task, task.late, predict, adjust)[0]
        drawn.distance = torch.stack(distances).mean(0) if distances else None
        return drawn
