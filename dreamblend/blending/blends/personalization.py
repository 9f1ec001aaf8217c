"""The late snapshot's prompt, guided away from an empty prompt that knows less of the subject."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends.blend import Blend, Drawing, finite, one_of
from dreamblend.blending.recorder import Recorder
from dreamblend.errors import InputError
from dreamblend.models import Backbone


class Personalization(Blend):
    """Personalization guidance: weak + scale (late - weak), late's prediction for the prompt and a
    weak model's for the empty one (Park et al., ICCV 2025, arXiv 2508.00319).

    The weak model has weights between those that the training began with and the late ones: as it
    knows less of the subject, guidance leads towards the subject as well as the prompt. It takes
    as many predictions as the late snapshot alone, and a model of classifier-free guidance: the
    scale is the guidance scale.

    Args:
        weight: of the late snapshot in the weak model: 1 is the late snapshot alone.
        start: what else the weak model is made of: base, as published, or early.
    """

    name = "personalization"
    needs_words = False

    def __init__(self, weight: float = 0.5, start: Literal["base", "early"] = "base"):
        self.weight, self.start = finite(weight), one_of("start", start, ("base", "early"))

    def check(self, model: Backbone, guidance_scale: float) -> None:
        if not model.predicts_twice(guidance_scale):
            why = (
                f"{model.base} is distilled"
                if model.distilled
                else f"guidance_scale is {guidance_scale}"
            )
            raise InputError(
                "personalization guidance replaces the empty prompt's prediction of classifier-free"
                f" guidance, and {why}, so that there is none: choose another blend"
            )

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        self.check(batch.late, batch.guidance_scale)
        weak = batch.models.merged(self.weight, self.start)
        empty, late = batch.encode(weak)[1], Recorder(batch.unguided, batch.late)

        def predict(z: Tensor, t: Tensor, step: int) -> Tensor:
            _, guided = late.halves(z, t, step)
            return batch.combined(batch.late, weak.denoise(z, t, empty), guided)

        return Drawing(batch.sample(predict), late.average)
