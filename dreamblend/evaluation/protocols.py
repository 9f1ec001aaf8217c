"""How fidelity is measured, by name. Published numbers differ by model, preprocessing, pairing and
scale: a number without them means little.

Every stored score carries its protocol's `as_dict()`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from dreamblend.blending.prompts import without_identifier
from dreamblend.errors import InputError
from dreamblend.evaluation.preprocess import IMAGENET, OPENAI, Preprocess
from dreamblend.models.bases import own_judges


@dataclass(frozen=True)
class Protocol:
    """What is compared with what, by which model, and on what scale.

    subject, prompt: evaluators, `sandbox` or a transformers id. `prompt` also judges images against
    photos (CLIP-I).
    subject_preprocess, prompt_preprocess: what images go through; None is what the model's own
    files say.
    pairing: an image against all photos, or image i against photo i (modulo their count).
    subject_scale, prompt_scale: factors of the published numbers.
    prompt_floor: cosines below it count as it (CLIPScore's max(cos, 0)).
    identifier: whether the judged prompt keeps the subject's rare token, which means nothing to an
    evaluator.
    diversity: `perceptual` (LPIPS over the sandbox judge's features), or `dino` (cosine distance of
    the subject's evaluator).
    parts: the evaluator of what stands out of the subject, `sandbox`; None where none can tell.
    """

    name: str
    subject: str
    prompt: str
    subject_preprocess: Preprocess | None = None
    prompt_preprocess: Preprocess | None = None
    pairing: Literal["all-pairs", "one-to-one"] = "all-pairs"
    subject_scale: float = 1.0
    prompt_scale: float = 1.0
    prompt_floor: float | None = None
    identifier: bool = False
    diversity: Literal["perceptual", "dino"] = "dino"
    parts: str | None = None

    @property
    def diversity_name(self) -> str:
        """What a table calls it: a distance of DINO is never passed off as LPIPS."""
        return {"perceptual": "diversity", "dino": "diversity_dino"}[self.diversity]

    def text(self, prompt: str, identifier: str) -> str:
        """The text that an image of `prompt` is judged on."""
        return prompt if self.identifier else without_identifier(prompt, identifier)

    def as_dict(self) -> dict[str, Any]:
        """Every setting in plain types, to be stored with the numbers."""
        return asdict(self)


# DINO's own evaluation transform. The hub's dino-vits* state others, so all published protocols set
# this one by hand.
DINO = Preprocess(256, 224, **IMAGENET)
CLIP = Preprocess(224, 224, **OPENAI)
VITS16 = "facebook/dino-vits16"
VITS8 = "facebook/dino-vits8"
VITB32 = "openai/clip-vit-base-patch32"

PRESETS = {
    p.name: p
    for p in (
        # The shipped judges. Prompt fidelity is a probability, not a cosine.
        Protocol("sandbox", "sandbox", "sandbox", diversity="perceptual", parts="sandbox"),
        # Ruiz et al., CVPR 2023, section 4.1: mean pairwise cosine of ViT-S/16 DINO, and of CLIP,
        # embeddings of generated and real images. The paper does not say which CLIP or
        # preprocessing; ViT-B/32 and these are what its followers use. Its DIV is LPIPS.
        Protocol("dreambooth", VITS16, VITB32, DINO, CLIP),
        # Kumari et al., CVPR 2023, customconcept101/evaluate.py: all pairs; text alignment is
        # CLIPScore, 2.5 max(cos, 0) (Hessel et al., EMNLP 2021), without its prefix "A photo
        # depicts".
        Protocol(
            "custom-diffusion", VITS16, VITB32, DINO, CLIP, prompt_scale=2.5, prompt_floor=0.0
        ),
        # Peng et al., ICLR 2025, dreambench_plus/metrics: dino_vits8; image i against its own
        # reference; all times 100, CLIP-T without max(., 0).
        Protocol(
            "dreambench-plus",
            VITS8,
            VITB32,
            DINO,
            CLIP,
            pairing="one-to-one",
            subject_scale=100.0,
            prompt_scale=100.0,
        ),
    )
}


def find(name: str, base: str | None = None) -> Protocol:
    """The preset of a name; of `auto` and a base, that of the base's own judges, and `dreambooth`
    for a base that has none. Raises InputError for an unknown name.
    """
    if name == "auto" and base:
        name = own_judges(base) or "dreambooth"
    if name not in PRESETS:
        raise InputError(
            f"there is no evaluation protocol {name!r}: name one of {', '.join(PRESETS)}"
        )
    return PRESETS[name]
