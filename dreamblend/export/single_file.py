"""One file, under the names of the model's first publication: a whole Stable Diffusion or SDXL
checkpoint, or the denoiser of a later family, which other tools load beside its text encoders.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dreamblend.errors import InputError
from dreamblend.export import metadata
from dreamblend.export.form import Form, save
from dreamblend.export.what import WORDS, What
from dreamblend.models import Backbone, original_weights
from dreamblend.models.loading import layout_of
from dreamblend.storage.snapshots import DTYPES

OPEN_CLIP = 1024  # channels of the text encoder that is OpenCLIP's, of Stable Diffusion 2


class SingleFile(Form):
    """A .safetensors checkpoint; adapters are added to its weights."""

    is_file = True

    def check(self, what: What) -> None:
        what.check_model()
        if self.rank is not None:
            raise InputError(
                "--rank is the rank of a LoRA, and this form has none: leave it out, or choose"
                " --form diffusers or kohya"
            )
        if what.method in WORDS:
            raise InputError(
                f"{what.snapshots[0].path} is a {what.method} snapshot, whose learned word a single"
                " file cannot hold: export it with --form pipeline"
            )

    def write(self, what: What, path: Path) -> None:
        layout = layout_of(what.backbone)
        if not layout.kinds:
            raise InputError(
                f"diffusers reads no single file of {layout.family}, so none is written: export it"
                " with --form pipeline"
            )
        model = what.model(DTYPES[self.dtype] if self.dtype else None)
        if model.denoiser_name != "unet":
            ours = what.backbone.text_encoders
            if trained := [n for n, m in model.text_encoders.items() if not same(m, ours[n])]:
                raise InputError(
                    f"{what.described} holds a trained {trained[0]}, and a single file of"
                    f" {layout.family} holds the denoiser alone: export it with --form pipeline"
                )
        save(named(model), path, metadata.marks(what, model, self.license))


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules have the same weights."""
    theirs = b.state_dict()
    return a is b or all(torch.equal(v, theirs[k].to(v.dtype)) for k, v in a.state_dict().items())


def named(model: Backbone) -> dict[str, Tensor]:
    """The tensors of the file."""
    if model.denoiser_name != "unet":
        return original_weights.denoiser(model.denoiser)
    parts = {
        "model.diffusion_model.": original_weights.denoiser(model.denoiser),
        "first_stage_model.": original_weights.autoencoder(model.vae),
    }
    first, *second = model.text_encoders.values()
    if second:
        parts["conditioner.embedders.0.transformer."] = original_weights.clip(first)
        parts["conditioner.embedders.1.model."] = original_weights.open_clip(second[0])
    elif first.config.hidden_size == OPEN_CLIP:
        parts["cond_stage_model.model."] = original_weights.open_clip(first)
    else:
        parts["cond_stage_model.transformer."] = original_weights.clip(first)
    found = {start + name: value for start, of in parts.items() for name, value in of.items()}
    # empty tensors, by which ComfyUI and others know
    config = model.scheduler.config
    if config.prediction_type == "v_prediction":
        found["v_pred"] = torch.zeros(0)
    if config.get("rescale_betas_zero_snr"):
        found["ztsnr"] = torch.zeros(0)
    return found
