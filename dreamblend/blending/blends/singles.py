"""Each snapshot of a pair alone."""

from __future__ import annotations

from collections.abc import Iterable

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends.blend import Blend, Drawing
from dreamblend.blending.recorder import Recorder


class Early(Blend):
    """The early snapshot alone."""

    name = "early"
    needs_words = False

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        return reference or draw_reference(batch, [])


class Late(Blend):
    """The late snapshot alone."""

    name = "late"
    needs_words = False

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        late = Recorder(batch, batch.late)
        return Drawing(batch.sample(late), late.average)


def draw_reference(batch: Batch, blends: Iterable[Blend], image: bool = True) -> Drawing:
    """What the early snapshot draws, with the maps of the steps that these blends are guided at.

    Where its image is not wanted, it ends with the last of these steps.
    """
    wanted = {step for blend in blends for step in blend.guided_steps(batch.calls)}
    keep = range(min(wanted), max(wanted) + 1) if wanted else range(0)
    early = Recorder(batch, batch.early, keep)
    latents = batch.sample(early, calls=None if image else keep.stop)
    return Drawing(latents, early.average, site_maps=early.kept)
