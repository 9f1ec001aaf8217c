"""One batch drawn in every way that is asked for: what the predict loop and the pipeline share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import Blend, Drawing, Late, draw_reference
from dreamblend.blending.inversion import inverted

# (kind, latents, timestep, call number) -> latents, after each call of the model
After = Callable[[str, Tensor, Tensor, int], Tensor]


def kinds(blend: Blend, compare: bool) -> list[str]:
    """What is drawn, in its order: early, the blend, late; the blend alone without `compare`."""
    return list(dict.fromkeys(["early", blend.name, "late"] if compare else [blend.name]))


def draw(
    batch: Batch,
    blend: Blend,
    compare: bool = False,
    after: After | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> dict[str, Drawing]:
    """Kind -> what it draws, for the blend and, with `compare`, for each snapshot alone. A blend
    that is `interrupted` ends as it is then, and late is not drawn after it.

    A blend that is guided gets the early snapshot's drawing as its reference, which is drawn once;
    or the batch's own reference, inverted.
    """

    def watched(kind: str) -> Batch:
        if after is None:
            return batch
        ends = interrupted if kind in (blend.name, "late") else None
        return replace(batch, after=partial(after, kind), interrupted=ends)

    drawings: dict[str, Drawing] = {}
    reference: Drawing | None = None
    if batch.reference is not None:
        if compare:
            drawings["early"] = draw_reference(watched("early"), [])
        latents = batch.early.encode(batch.reference.to(batch.early.device))[0]
        reference = inverted(batch, [blend], latents)
    elif compare or blend.guided_steps(batch.calls):
        reference = draw_reference(watched("early"), [blend], image=compare)
        drawings["early"] = reference
    drawings[blend.name] = blend.draw(watched(blend.name), reference)
    if compare and "late" not in drawings and not (interrupted and interrupted()):
        drawings["late"] = Late().draw(watched("late"))
    return {kind: drawings[kind] for kind in kinds(blend, compare) if kind in drawings}
