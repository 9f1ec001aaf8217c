"""How images are drawn beside their prompts and steps: what diffusers' pipelines take too."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from dreamblend.errors import InputError
from dreamblend.models import Backbone, schedulers


@dataclass(frozen=True)
class Options:
    """The options of a drawing that change nothing where they are not set.

    Args:
        scheduler: the sampler's name (`models.schedulers`); the base's own where None.
        negative_prompt: what guidance leads away from; an empty prompt where None.
        guidance_rescale: 0 to 1, the share in which a guided prediction gets the deviation of the
            prompt's own.
    """

    scheduler: str | None = None
    negative_prompt: str | None = None
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        schedulers.check(self.scheduler)
        if not 0 <= self.guidance_rescale <= 1:
            raise InputError(
                f"model.guidance_rescale is {self.guidance_rescale}: it is a share, from 0 to 1"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """Those that are set, by name, but for the scheduler: images record what it is, not how it
        is called.
        """
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if name != "scheduler" and value != getattr(type(self), name)
        }

    def check(self, model: Backbone, guidance_scale: float) -> None:
        """Raise InputError where one of them would be without effect on this model."""
        if model.predicts_twice(guidance_scale):
            return
        why = (
            f"{model.base} is distilled"
            if model.distilled
            else f"model.guidance_scale is {guidance_scale}"
        )
        for name in ("negative_prompt", "guidance_rescale"):
            if name in self.settings:
                raise InputError(
                    f"model.{name} acts on what guidance adds, and {why}, so that the prompt's own"
                    " prediction is drawn: leave it out"
                )

    def apply(self, *models: Backbone) -> None:
        """Set up what models draw with. Called once, after they are loaded."""
        if self.scheduler is not None:
            (own,) = {id(model.scheduler): model.scheduler for model in models}.values()
            scheduler = schedulers.named(self.scheduler, own, models[0].base)
            for model in models:
                model.scheduler = scheduler
