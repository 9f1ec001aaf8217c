"""The base draws the class, and the late snapshot adds what it has learned."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends.blend import Blend, Drawing, finite, one_of
from dreamblend.blending.recorder import Recorder
from dreamblend.sampling import combined, rescaled


class Reward(Blend):
    """Reward guidance: the base's guided prediction for the class prompt, and weight times what the
    late snapshot's prediction for the prompt has beyond the base's for the class prompt (Lee et
    al., 2024, Direct Consistency Optimization, arXiv 2402.12004).

    The difference of the two is the gradient of the reward that their training maximised. The class
    prompt has no identifier: "a mug on a beach".

    Args:
        weight: of what the late snapshot adds, and 0 draws without it.
        start: what draws the scene: base, as published; or early, on the prompt itself, since it
            knows the identifier.
    """

    name = "reward"
    passes = 3

    def __init__(self, weight: float = 3.0, start: Literal["base", "early"] = "base"):
        self.weight, self.start = finite(weight), one_of("start", start, ("base", "early"))

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        late = Recorder(batch.unguided, batch.late)
        scene, model = batch, batch.early
        if self.start == "base":
            scene, model = batch.of_class, batch.models.plain
        both = scene.halves(model, *scene.encode(model))

        def predict(z: Tensor, t: Tensor, step: int) -> Tensor:
            _, subject = late.halves(z, t, step)
            empty, guided = both(z, t)
            drawn = combined(model, empty, guided, batch.guidance_scale)
            output = drawn + self.weight * (subject - guided)
            return rescaled(output, guided, batch.guidance_rescale)

        return Drawing(batch.sample(predict), late.average)
