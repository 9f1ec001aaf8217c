"""PixArt-Sigma (Chen et al., 2024): T5 as text, a transformer with cross-attention that learns its
variance too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dreamblend.models import pipelines
from dreamblend.models.backbone import Site
from dreamblend.models.blocks import block_sites
from dreamblend.models.marks import check_prediction, predicting
from dreamblend.models.pipelines import Layout
from dreamblend.models.text import Conditioning, Offsets
from dreamblend.models.through_pipeline import ThroughPipeline, offsets_of, padded

LAYOUT = Layout(
    "PixArt-Sigma", ("PixArtSigmaPipeline",), ("transformer", "vae", "text_encoder"), as_saved=True
)


class PixArt(ThroughPipeline):
    """Wraps diffusers' PixArtSigmaPipeline, which has no loader of adapters: those are ours."""

    multiple = 16
    mask_argument = "prompt_attention_mask"

    def __init__(self, pipe: Any, base: str):
        super().__init__(pipe, base, others=("text_encoder",))
        side = self.denoiser.config.sample_size
        self.latent_shape = (self.denoiser.config.in_channels, side, side)
        self.size = side * pipe.vae_scale_factor
        self.length = 300

    # -- text
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        self.activate()
        states, mask, *_ = self.pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.length,
        )
        return Conditioning(states, {"mask": mask})

    def offsets(self, prompt: str) -> Offsets:
        """The prompt is stripped and in small letters."""
        before = len(prompt) - len(prompt.lstrip())
        places = offsets_of(self._pipe.tokenizer, prompt.lower().strip(), self.length)
        return padded([(a + before, b + before) if b else (a, b) for a, b in places], self.length)

    # -- denoising
    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.activate()
        dtype = self.denoiser.dtype
        output = self.denoiser(
            latents.to(dtype),
            encoder_hidden_states=conditioning.states.to(dtype),
            encoder_attention_mask=conditioning.extras["mask"],
            timestep=t.expand(len(latents)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return output[:, : latents.shape[1]]  # the rest is its variance

    def sites(
        self,
        grid: int | None = None,
        latent_size: tuple[int, int] | None = None,
        layers: list[str] | None = None,
    ) -> dict[str, Site]:
        height, width = latent_size or self.latent_shape[1:]
        patch = self.denoiser.config.patch_size
        pattern, size = r"transformer_blocks\.\d+\.attn2", (height // patch, width // patch)
        return block_sites(self.denoiser, pattern, size, grid, layers, self.base)


def load(
    path: Path,
    config: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
) -> PixArt:
    """Load a base as it was saved. Args as `stable_diffusion.load`."""
    check_prediction(prediction)
    pipe = pipelines.load_folder(path, LAYOUT, variant)
    if prediction:
        pipe.scheduler = predicting(pipe.scheduler, prediction)
    return PixArt(pipe, str(path))
