"""How images are drawn beside their prompts and steps: what diffusers' pipelines take too."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from dreamblend.blending.models import Models
from dreamblend.errors import InputError
from dreamblend.models import Backbone, schedulers, weighted_prompts
from dreamblend.models.pipelines import autoencoder


def check_size(height: int | None, width: int | None, prefix: str = "model.") -> None:
    """Raise InputError for a size that no base draws: what is known before one is loaded, whose own
    rule may be stricter (`Backbone.latent_size`). `prefix` is how the options of a command begin.
    """
    for name, side in (("height", height), ("width", width)):
        if side is not None and (side < Backbone.multiple or side % Backbone.multiple):
            raise InputError(
                f"{prefix}{name} is {side}: it must be a multiple of {Backbone.multiple} pixels"
            )


def check_layers(attention_layers: list[str] | None, prefix: str = "model.") -> None:
    """Raise InputError where none are named; those of a base are known once it is loaded."""
    if attention_layers == []:
        raise InputError(f"{prefix}attention_layers is empty: name some, or leave it out")


@dataclass(frozen=True)
class Options:
    """The options of a drawing that change nothing where they are not set.

    Args:
        scheduler: the sampler's name (`models.schedulers`); the base's own where None.
        negative_prompt: what guidance leads away from; an empty prompt where None.
        guidance_rescale: 0 to 1, the share in which a guided prediction gets the deviation of the
            prompt's own.
        strength: scale of the snapshots' adapters, of both or of early and late each; 1 where None.
        clip_skip: last layers of the CLIP text encoders that prompts leave out, as diffusers counts
            them.
        vae: another autoencoder: a folder, a .safetensors file or a hub id.
        vae_tiling: decode in tiles, for less memory.
        prompt_weighting: compel reads prompts in its syntax, of any length.
    """

    scheduler: str | None = None
    negative_prompt: str | None = None
    guidance_rescale: float = 0.0
    strength: float | tuple[float, float] | None = None
    clip_skip: int | None = None
    vae: str | None = None
    vae_tiling: bool = False
    prompt_weighting: str | None = None

    def __post_init__(self) -> None:
        schedulers.check(self.scheduler)
        if not 0 <= self.guidance_rescale <= 1:
            raise InputError(
                f"model.guidance_rescale is {self.guidance_rescale}: it is a share, from 0 to 1"
            )
        if self.clip_skip is not None and self.clip_skip < 1:
            raise InputError(f"model.clip_skip is {self.clip_skip}: it is 1 or more, or left out")
        weighted_prompts.check(self.prompt_weighting)
        if self.prompt_weighting is not None and self.negative_prompt is not None:
            weighted_prompts.parsed(self.negative_prompt)

    @property
    def settings(self) -> dict[str, Any]:
        """Those that are set, by name, but for the scheduler and the autoencoder: images record
        what these are, not how they are called.
        """
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if name not in ("scheduler", "vae") and value != getattr(type(self), name)
        }

    def check(self, model: Backbone, guidance_scale: float) -> None:
        """Raise InputError where one of them would be without effect on this model."""
        if self.clip_skip is not None and self.clip_skip >= (model.clip_layers or 0):
            raise InputError(
                f"model.clip_skip is {self.clip_skip}, and {model.base} has"
                f" {model.clip_layers or 'no'} CLIP layers to leave out: leave it out"
                + (", or take fewer" if model.clip_layers else "")
            )
        if self.prompt_weighting is not None and not model.readers():
            raise InputError(
                f"model.prompt_weighting {self.prompt_weighting} weights the prompts of Stable"
                f" Diffusion and SDXL, and {model.base} is of another family: leave it out"
            )
        if self.prompt_weighting is not None and model.concept is not None:
            raise InputError(
                f"model.prompt_weighting {self.prompt_weighting} does not know the word"
                f" {model.concept.word!r} that these snapshots learned: leave it out"
            )
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

    def apply(self, models: Models) -> None:
        """Set up what a pair draws with. Called once, after it is loaded."""
        views = (models.early, models.late)
        if self.scheduler is not None:
            scheduler = schedulers.named(self.scheduler, views[0].scheduler, views[0].base)
            for model in views:
                model.scheduler = scheduler
        if self.vae is not None:
            vae = autoencoder(self.vae, views[0].vae)
            for model in views:
                model.vae = vae
        if self.vae_tiling:
            if not hasattr(views[0].vae, "enable_tiling"):
                raise InputError(
                    f"model.vae_tiling is set, and diffusers cannot tile {type(views[0].vae)}:"
                    " leave it out"
                )
            views[0].vae.enable_tiling()
        for model in (*views, models.base):
            model.clip_skip = self.clip_skip
            model.prompt_weighting = self.prompt_weighting
        if self.strength is not None:
            each = self.strength if isinstance(self.strength, tuple) else (self.strength,) * 2
            for model, strength in zip(views, each):
                if not model.adapters:
                    raise InputError(
                        "model.strength scales the adapters of LoRA snapshots, and these have none:"
                        " leave it out"
                    )
                model.adapters = {name: w * strength for name, w in model.adapters.items()}
