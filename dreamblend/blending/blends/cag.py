"""DreamBlend: the late snapshot, its cross-attention guided to the early one's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamblend.attention import Maps, record
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends.blend import Blend, Drawing, share_of_steps
from dreamblend.blending.blends.singles import draw_reference
from dreamblend.blending.guidance import distance_and_gradient, guidance_step, map_energy
from dreamblend.blending.recorder import Recorder
from dreamblend.errors import InputError
from dreamblend.sampling import scaled


class CAG(Blend):
    """The late snapshot, its cross-attention guided to the early one's (DreamBlend, Ram et al.,
    WACV 2025).

    Args:
        strength: how far a guidance step may move the latents, as a share of their norm; 0 is the
            late snapshot alone.
        window: the first and the last guided call of the model, as shares of its calls; only calls
            that begin a step count.
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

    @property
    def passes(self) -> float:  # type: ignore[override]  # the image, the reference, and the reads
        first, last = self.window
        return 2 + 2 * last + self.repeats * (last - first) if self.strength else 2

    def guided_steps(self, calls: int) -> range:
        if not self.strength:
            return range(0)
        return range(round(self.window[0] * calls), round(self.window[1] * calls))

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        guided = self.guided_steps(batch.calls)
        reference = reference or (draw_reference(batch, [self], image=False) if guided else None)
        wanted = reference.site_maps if reference else {}
        if not wanted.keys() >= set(guided):
            raise ValueError("the reference was drawn without the maps of the guided steps")
        late = Recorder(batch, batch.late)
        distances: list[Tensor] = []

        def guide(z: Tensor, t: Tensor, step: int, scheduler: Any) -> Tensor:
            if step not in guided:
                return z

            def read(z: Tensor) -> Maps:
                with record(
                    batch.late.denoiser, batch.sites, batch.tokens, stop_at_last=True
                ) as maps:
                    batch.late.denoise(scaled(scheduler, z, t), t, late.prompts)
                return maps

            energy = map_energy(wanted[step], batch.weights)
            for _ in range(self.repeats):
                distance, gradient = distance_and_gradient(read, z, wanted[step], batch.weights)
                z = guidance_step(z, distance, gradient, energy, self.strength)
            distances.append(distance)
            return z

        latents = batch.sample(late, guide)
        distance = torch.stack(distances).mean(0) if distances else None
        return Drawing(latents, late.average, distance)
