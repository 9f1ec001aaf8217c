"""What judges the images: encoders of images, and of images and texts, by name.

A name is one of OWN (the project's own judges), a transformers id, or a folder in the layout of
one. All give unit vectors, so that a dot product is a cosine. `preprocess` says what images are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from dreamblend.errors import InputError
from dreamblend.evaluation.preprocess import Pixels, Preprocess, own_preprocess
from dreamblend.sandbox.judges import PartsJudge, PromptJudge, SubjectJudge, load_judge
from dreamblend.sandbox.world import NOUNS, SIZE
from dreamblend.storage.hub import fetching

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

FAMILIES = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "clip": "CLIPModel",
}  # model_type in config.json -> class in transformers


# ----------------------------------------------------------------------------------------- encoders
class ImageEncoder:
    """Embeds images. `device` is where it runs; its vectors stay there."""

    name: str
    preprocess: Preprocess
    device: str | torch.device

    @torch.no_grad()
    def images(self, images: Pixels) -> Tensor:
        """Images to unit vectors (n, dim), float32."""
        return F.normalize(self._images(self.preprocess(images, self.device)).float(), dim=-1)

    def _images(self, prepared: Tensor) -> Tensor:
        raise NotImplementedError


class TextImageEncoder(ImageEncoder):
    """Embeds images and texts in one space."""

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """Texts to unit vectors (n, dim), float32."""
        return F.normalize(self._texts(texts).float(), dim=-1)

    def agreement(self, features: Tensor, text: str) -> Tensor:
        """How well images (n, dim, of `images`) agree with one text: (n,). Cosine, unless the
        encoder has a better measure.
        """
        return features @ self.texts([text])[0]

    def perceptual(self, images: Pixels) -> Tensor:
        """Vectors (n, D) whose squared distances are perceptual ones, where an encoder has them."""
        raise NotImplementedError

    def _texts(self, texts: list[str]) -> Tensor:
        raise NotImplementedError


class SandboxSubject(ImageEncoder):
    """The sandbox's judge of instances."""

    def __init__(self, device: str | torch.device = "cpu"):
        self.name, self.device, self.preprocess = "sandbox", device, Preprocess(SIZE, SIZE)
        self.judge = load_judge(SubjectJudge, device=device)

    def _images(self, prepared: Tensor) -> Tensor:
        return self.judge(prepared)


class SandboxPrompt(TextImageEncoder):
    """The sandbox's judge of prompts. Agreement is the mean probability of what the text claims
    beside the class noun.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        self.name, self.device, self.preprocess = "sandbox", device, Preprocess(SIZE, SIZE)
        self.judge = load_judge(PromptJudge, device=device)

    def _images(self, prepared: Tensor) -> Tensor:
        return self.judge.embed_images(prepared)

    def _texts(self, texts: list[str]) -> Tensor:
        return self.judge.embed_texts(texts)

    def agreement(self, features: Tensor, text: str) -> Tensor:
        """(n,); NaN where the text claims nothing that the sandbox knows."""
        try:
            return self.judge.agreement(features, text)
        except ValueError:
            return features.new_full((len(features),), torch.nan)

    @torch.no_grad()
    def perceptual(self, images: Pixels) -> Tensor:
        """Vectors (n, D) whose squared distances are those of LPIPS over the judge's levels: unit
        channels, mean over places, sum over levels.

        LPIPS is a squared distance too (Zhang et al., CVPR 2018, eq. 1), so scaling each level by 1
        / sqrt(places) is all it takes.
        """
        levels = self.judge.perceptual_features(self.preprocess(images, self.device))
        return torch.cat([f.flatten(1) / (f.shape[2] * f.shape[3]) ** 0.5 for f in levels], 1)


class SandboxParts:
    """The sandbox's judge of what stands out of a thing."""

    def __init__(self, device: str | torch.device = "cpu"):
        self.device, self.preprocess = device, Preprocess(SIZE, SIZE)
        self.judge = load_judge(PartsJudge, device=device)

    def there(self, images: Pixels, text: str) -> Tensor:
        """Mean probability (n,) that the parts of the thing that a text names first are there; NaN
        where it names none of the sandbox's classes.
        """
        pixels = self.preprocess(images, self.device)
        noun = next((word for word in re.findall("[a-z]+", text.lower()) if word in NOUNS), None)
        if noun is None:
            return pixels.new_full((len(pixels),), torch.nan)
        return self.judge.parts(pixels, noun).mean(1)


class VisionTransformer(ImageEncoder):
    """DINO's vision transformers (ViT, DINOv2): the class token after the last layer norm, as
    DINO's authors use it.
    """

    def __init__(
        self, name: str, preprocess: Preprocess | None = None, device: str | torch.device = "cpu"
    ):
        self.name, self.device = name, device
        self.model = _load(name, ("vit", "dinov2"), device)
        self.preprocess = preprocess or own_preprocess(
            name, self.model.config.image_size, self.model.config.model_type
        )
        _check_side(self, self.model.config)

    def _images(self, prepared: Tensor) -> Tensor:
        return self.model(pixel_values=prepared).last_hidden_state[:, 0]


class CLIP(TextImageEncoder):
    """CLIP: projected image and text embeddings."""

    def __init__(
        self, name: str, preprocess: Preprocess | None = None, device: str | torch.device = "cpu"
    ):
        from transformers import CLIPTokenizer

        self.name, self.device = name, device
        self.model = cast("CLIPModel", _load(name, ("clip",), device))
        # transformers declares that these may be dictionaries too, but they are so only in files
        vision = cast("PreTrainedConfig", self.model.config.vision_config)
        text = cast("PreTrainedConfig", self.model.config.text_config)
        self.length = text.max_position_embeddings
        self.preprocess = preprocess or own_preprocess(name, vision.image_size, "clip")
        _check_side(self, vision)
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(name)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"the evaluator {name} has no readable tokenizer ({_reason(error)}): download or"
                " save it again"
            ) from error
        # without its files the class makes a tokenizer of its special tokens alone
        if len(self.tokenizer) < 100:
            raise InputError(
                f"the evaluator {name} has no vocabulary for its tokenizer: download or save it"
                " again"
            )

    def _images(self, prepared: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=prepared))

    def _texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        return _pooled(
            self.model.get_text_features(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
        )


@dataclass(frozen=True)
class OwnJudges:
    """The encoders of a name that ships with the project, each made on a device."""

    subject: Callable[[str | torch.device], ImageEncoder]
    prompt: Callable[[str | torch.device], TextImageEncoder]
    parts: Callable[[str | torch.device], SandboxParts]


OWN = {"sandbox": OwnJudges(SandboxSubject, SandboxPrompt, SandboxParts)}


def subject_encoder(
    name: str, preprocess: Preprocess | None = None, device: str | torch.device = "cpu"
) -> ImageEncoder:
    """The image encoder of a name: one of OWN, or a DINO of transformers. Raises InputError where
    it cannot be loaded.
    """
    return OWN[name].subject(device) if name in OWN else VisionTransformer(name, preprocess, device)


def prompt_encoder(
    name: str, preprocess: Preprocess | None = None, device: str | torch.device = "cpu"
) -> TextImageEncoder:
    """The text-image encoder of a name: one of OWN, or a CLIP of transformers. Raises InputError
    where it cannot be loaded.
    """
    return OWN[name].prompt(device) if name in OWN else CLIP(name, preprocess, device)


def parts_judge(name: str | None, device: str | torch.device = "cpu") -> SandboxParts | None:
    """The judge of a subject's parts of a name of OWN; None of None."""
    return OWN[name].parts(device) if name else None


# ------------------------------------------------------------------------------------------ loading
def _load(name: str, families: tuple[str, ...], device: str | torch.device) -> PreTrainedModel:
    """A frozen model of one of the families, in fp32, from safetensors alone: a pickle can run code
    when it is read.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    wanted = " or ".join(families)
    try:
        family = transformers.AutoConfig.from_pretrained(name).model_type
        if family not in families:
            raise InputError(
                f"the evaluator {name} is of the family {family}, and here it must be {wanted}:"
                " name another"
            )
        extra = (
            {"add_pooling_layer": False} if family == "vit" else {}
        )  # DINO has no pooler: its weights would be made up
        with fetching(name):
            model, loading = getattr(transformers, FAMILIES[family]).from_pretrained(
                name, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **extra
            )
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(
            f"cannot load the evaluator {name!r} ({_reason(error)}): name `sandbox`, a folder or a"
            f" hub id of a {wanted} model with .safetensors weights, and check the connection and"
            " HF_HUB_OFFLINE"
        ) from error
    if lacking := sorted(loading["missing_keys"]):
        raise InputError(
            f"the evaluator {name} lacks {lacking[0]} and {len(lacking) - 1} more weights: download"
            " or save it again"
        )
    return model.requires_grad_(False).eval().to(device)


def _check_side(encoder: ImageEncoder, config: PreTrainedConfig) -> None:
    if (
        config.model_type != "dinov2" and encoder.preprocess.side != config.image_size
    ):  # DINOv2 fits its positions to any size by itself
        raise InputError(
            f"the evaluator {encoder.name} takes images of {config.image_size} pixels and its"
            f" preprocessing makes {encoder.preprocess.side}: name a protocol that fits it"
        )


def _pooled(output: Tensor | BaseModelOutputWithPooling) -> Tensor:
    """transformers 5 answers with an output object where 4 gave the tensor."""
    if isinstance(output, Tensor):
        return output
    assert output.pooler_output is not None  # CLIP's projections always have one
    return output.pooler_output


def _reason(error: Exception) -> str:
    """The first sentence of a library's error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
