"""Z-Image and Z-Image Turbo (Tongyi, 2025): a language model as text, image and text in one stream,
a rectified flow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamblend.models import flow
from dreamblend.models.backbone import Site
from dreamblend.models.blocks import block_sites
from dreamblend.models.pipelines import Layout
from dreamblend.models.text import Conditioning, Offsets
from dreamblend.models.through_pipeline import ThroughPipeline, offsets_of, place_in

LAYOUT = Layout(
    "Z-Image",
    ("ZImagePipeline",),
    ("transformer", "vae", "text_encoder"),
    variants=("ZImageImg2ImgPipeline",),
    kinds=("z-image-turbo",),
    as_saved=True,
)
MULTIPLE = 32  # of which the numbers of image tokens and of text tokens are


class ZImage(ThroughPipeline):
    """Wraps diffusers' ZImagePipeline."""

    plain_timesteps = False
    prompt_first = True
    multiple = 16

    feed_forward = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    def __init__(self, pipe: Any, base: str):
        super().__init__(pipe, base, others=("text_encoder",))
        self.size = 1024  # as the pipeline's own
        side = self.size // pipe.vae_scale_factor
        self.latent_shape = (self.denoiser.config.in_channels, side, side)
        self.length = 512

    # -- text
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        self.activate()
        # a copy: the pipeline writes its template into the list
        each, _ = self.pipe.encode_prompt(
            list(prompts), self.device, do_classifier_free_guidance=False
        )
        return Conditioning.of_each(each)

    def offsets(self, prompt: str) -> Offsets:
        """The template stays."""
        text, place = place_in(self._templated, prompt)
        return offsets_of(self._pipe.tokenizer, text, self.length, place)

    def _templated(self, prompt: str) -> str:
        return self._pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=True,
        )

    # -- sampling
    def schedule_options(
        self, num_inference_steps: int, latent_size: tuple[int, int]
    ) -> dict[str, Any]:
        return flow.even_options(self.scheduler, num_inference_steps, latent_size)

    def predicts_twice(self, guidance_scale: float) -> bool:
        """The pipeline's scale counts what is added to the prompt's own prediction: 0 is none."""
        return guidance_scale > 0

    def combine(self, unguided: Tensor, guided: Tensor, guidance_scale: float) -> Tensor:
        return guided + guidance_scale * (guided - unguided)

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.activate()
        dtype = self.denoiser.dtype
        texts = [
            states[: int(count)]
            for states, count in zip(
                conditioning.states.to(dtype), conditioning.extras["mask"].sum(1)
            )
        ]
        # its time runs from noise to the image, and so does what it predicts
        time = (1000 - t.expand(len(latents))) / 1000
        output = self.denoiser(list(latents.to(dtype).unsqueeze(2)), time, texts)[0]
        return -torch.stack([x.squeeze(1) for x in output])

    def sites(
        self,
        grid: int | None = None,
        latent_size: tuple[int, int] | None = None,
        layers: list[str] | None = None,
    ) -> dict[str, Site]:
        """The image comes first, filled up to a multiple of 32, then the text. The refiners see one
        of both.
        """
        height, width = (side // 2 for side in latent_size or self.latent_shape[1:])
        image = height * width
        return block_sites(
            self.denoiser,
            r"layers\.\d+\.attention",
            (height, width),
            grid,
            layers,
            self.base,
            rows=slice(0, image),
            columns=slice(-(-image // MULTIPLE) * MULTIPLE, None),
        )


def load(
    path: Path,
    config: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
) -> ZImage:
    """Load a base as it was saved. Args as `stable_diffusion.load`."""
    return ZImage(flow.pipeline(path, LAYOUT, config, prediction, variant), str(path))
