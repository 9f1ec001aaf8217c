"""The one table of measures: what each is called, what it means, and which way is better.

`MEASURES` is by name. A name is the word in code, and in what selections and benchmarks keep; where
the files of a blend have another word for it, `key` says so, and `find` knows both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Measure:
    """One measure of images, or of what was read while they were drawn.

    Args:
        name: in code.
        group: what it is measured on: the subject's photos and the prompt (fidelity), the other
            images (variety), the words' maps of attention (collapse), or the maps of two snapshots
            (distance).
        title: of an axis or a column.
        meaning: one sentence for a reader of a report, and what the end of its scale says.
        higher_is_better: None where neither is.
        key: in the results.jsonl and summary.json of a blend, where it is not the name.
    """

    name: str
    group: Literal["fidelity", "variety", "collapse", "distance"]
    title: str
    meaning: str
    higher_is_better: bool | None
    key: str | None = None


MEASURES = {
    measure.name: measure
    for measure in (
        Measure(
            "subject",
            "fidelity",
            "subject fidelity",
            "How like the subject's photos the images are.",
            True,
        ),
        Measure(
            "subject_clip",
            "fidelity",
            "subject fidelity, second judge",
            "The same by the judge of the prompt (CLIP-I).",
            True,
        ),
        Measure(
            "parts",
            "fidelity",
            "parts of the subject",
            "How sure a judge is that what stands out of the subject, as a handle does, is there.",
            True,
        ),
        Measure(
            "prompt_fidelity",
            "fidelity",
            "prompt fidelity",
            "How sure a judge is of what the prompt says.",
            True,
            key="prompt",
        ),
        Measure(
            "prior",
            "fidelity",
            "likeness of the class to the subject",
            "How like the subject images of its class alone have become (PRES).",
            False,
        ),
        Measure(
            "diversity",
            "variety",
            "diversity",
            "How different the images of one prompt are.",
            True,
        ),
        Measure(
            "diversity_dino",
            "variety",
            "diversity by DINO",
            "How different the images of one prompt are to DINO.",
            True,
        ),
        Measure(
            "copies",
            "variety",
            "copies",
            "Share of images that are nearer to a photo than two photos are to each other.",
            False,
        ),
        Measure(
            "nearest",
            "variety",
            "nearest photo",
            "Likeness to the photo that the image is most like.",
            None,
        ),
        Measure(
            "overlap",
            "collapse",
            "overlap of the maps",
            "Mean cosine of the subject's map with every other content word's map. 1 = collapsed.",
            False,
        ),
        Measure(
            "effective_rank",
            "collapse",
            "effective rank",
            "How many different maps the content words have, over their number n. 1/n = collapsed.",
            True,
        ),
        Measure(
            "entropy",
            "collapse",
            "entropy",
            "How evenly a word's attention is spread over the image. Higher = less localised.",
            None,
        ),
        Measure(
            "subject_mass",
            "collapse",
            "attention on the subject",
            "Share of each other word's attention that falls inside the subject's region.",
            False,
        ),
        Measure(
            "context_mass",
            "collapse",
            "attention on the context",
            "Share of the attention that goes to the words other than the subject's.",
            True,
        ),
        Measure(
            "divergence",
            "collapse",
            "divergence from the base",
            "How far the maps are from the base's, word by word. 0 = the same.",
            None,
        ),
        Measure(
            "prompt_sensitivity",
            "collapse",
            "prompt sensitivity",
            "How much the prediction changes when the context words change, relative to the base."
            " 0 = the prompt is ignored.",
            True,
        ),
        Measure(
            "distance",
            "distance",
            "map distance",
            "How far the maps are from the early snapshot's, which guidance brings down.",
            False,
        ),
    )
}

TRADE_OFF = ("subject", "prompt_fidelity", "diversity")  # what a pair is chosen by
IMAGE_COLLAPSE = ("overlap", "context_mass")  # of collapse, what tables say of images
SHOWN = (*TRADE_OFF, *IMAGE_COLLAPSE)
COMPARED = (*SHOWN, "parts", "subject_clip", "prior")  # what a benchmark keeps of each point
DIAGNOSED = tuple(name for name, measure in MEASURES.items() if measure.group == "collapse")

_KEYS = {name: measure.key for name, measure in MEASURES.items() if measure.key}
_NAMES = {key: name for name, key in _KEYS.items()}


def find(name: str) -> Measure | None:
    """The measure of a name or of a key; None of a word that is neither, as another version's."""
    return MEASURES.get(_NAMES.get(name, name))


def title(name: str) -> str:
    """The heading of what a file calls so."""
    measure = find(name)
    return measure.title if measure else name.replace("_", " ")


def keyed(measured: dict[str, Any]) -> dict[str, Any]:
    """Values by name, as the files of a blend call them."""
    return {_KEYS.get(name, name): value for name, value in measured.items()}
