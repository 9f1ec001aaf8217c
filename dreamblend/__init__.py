"""Personalised text-to-image diffusion that keeps both the prompt and the subject."""

from typing import TYPE_CHECKING, Any

from dreamblend.renamed import install as _install

if TYPE_CHECKING:
    from dreamblend.blending.pipeline import DreamBlendPipeline

__all__ = ["DreamBlendPipeline"]

_install()


def __getattr__(name: str) -> Any:
    """The pipeline, once it is asked for: it imports torch and diffusers, which takes seconds."""
    if name == "DreamBlendPipeline":
        from dreamblend.blending.pipeline import DreamBlendPipeline

        return DreamBlendPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
