"""Scores of the images of a blend by a named protocol: each image's, and each kind's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dreamblend.evaluation import measures
from dreamblend.evaluation.encoders import Pixels, parts_judge, prompt_encoder, subject_encoder
from dreamblend.evaluation.metrics import (
    Collapse,
    Copying,
    Diversity,
    Parts,
    PriorPreservation,
    PromptFidelity,
    SubjectFidelity,
    likeness,
)
from dreamblend.evaluation.protocols import Protocol, find
from dreamblend.storage.blend_folder import Result, in_order
from dreamblend.storage.photos import list_photos, open_photo, to_pixels

BATCH = 16  # images that are embedded at once
# a metric's computation would otherwise wait for all other processes
ALONE: dict[str, Any] = {"sync_on_compute": False}


class Scores:
    """Scores images of one subject. Pixels are as `encoders` takes them: (n, 3, height, width) in
    [-1, 1], or a list.

    Args:
        photos: the subject's photos, or their folder.
        identifier: the subject's rare token, which no evaluator knows.
        protocol: a preset's name, or a protocol.
        device: where the evaluators run, in fp32; on Apple's GPUs, which have no fp64 for the sums,
            the CPU.

    One process scores all of the images, so that nothing is added up over processes.

    Raises InputError where photos or evaluators cannot be read.
    """

    def __init__(
        self,
        photos: Path | list[Path],
        identifier: str,
        protocol: str | Protocol = "sandbox",
        device: str | torch.device = "cpu",
    ):
        self.protocol = p = find(protocol) if isinstance(protocol, str) else protocol
        device = "cpu" if torch.device(device).type == "mps" else device
        self.identifier = identifier
        self.subject_judge = subject_encoder(p.subject, p.subject_preprocess, device)
        self.prompt_judge = prompt_encoder(p.prompt, p.prompt_preprocess, device)
        self.parts_judge = parts_judge(p.parts, device)
        photos = photos if isinstance(photos, list) else list_photos(photos)
        images = map(_read, photos)  # one at a time: they may be large
        vectors = [
            (self.subject_judge.images(image), self.prompt_judge.images(image)) for image in images
        ]
        self.photos, self.photos_clip = map(torch.cat, zip(*vectors))

    # -- metrics
    def metrics(self, prompts: int) -> dict[str, Any]:
        """Fresh metrics by the names of their measures, for images of this many prompts. No
        `parts` where the protocol has no judge of them, no `copies` where no two photos differ.
        """
        p, device = self.protocol, self.photos.device
        _, dim, factor = self._spread(torch.zeros(1, 3, 8, 8))
        metrics: dict[str, Metric] = {
            "subject": SubjectFidelity(self.photos, p.pairing, p.subject_scale, **ALONE),
            "subject_clip": SubjectFidelity(self.photos_clip, p.pairing, p.subject_scale, **ALONE),
            "prompt_fidelity": PromptFidelity(p.prompt_scale, p.prompt_floor, **ALONE),
            p.diversity_name: Diversity(prompts, dim, factor, **ALONE),
        }
        if self.parts_judge:
            metrics["parts"] = Parts(**ALONE)
        if likeness(self.photos) is not None:
            metrics["copies"] = Copying(self.photos, **ALONE)
        return {name: metric.to(device) for name, metric in metrics.items()}

    def update(
        self, metrics: dict[str, Any], pixels: Pixels, prompt: str, number: int, index: Tensor
    ) -> list[dict]:
        """Add images of one prompt to `metrics`.

        Args:
            number: which of the prompts it is.
            index: the images' places in the whole set, (n,).

        Returns each image's scores, None where it could not be judged.
        """
        index = index.to(self.photos.device)
        vectors, clip = self.subject_judge.images(pixels), self.prompt_judge.images(pixels)
        agreement = self.prompt_judge.agreement(clip, self.protocol.text(prompt, self.identifier))
        spread, _, _ = self._spread(pixels, vectors)
        arguments: dict[str, tuple[Tensor, ...]] = {
            "subject": (vectors, index),
            "subject_clip": (clip, index),
            "prompt_fidelity": (agreement,),
        }
        if self.parts_judge:
            arguments["parts"] = (self.parts_judge.there(pixels, prompt),)
        for name, of_metric in arguments.items():
            metrics[name].update(*of_metric)
        metrics[self.protocol.diversity_name].update(spread, torch.full_like(index, number))
        each = {name: metrics[name].each(*of_metric) for name, of_metric in arguments.items()}
        if "copies" in metrics:
            metrics["copies"].update(vectors)
            each["nearest"] = metrics["copies"].nearest(vectors)
        return [
            {name: _known(v) for name, v in zip(each, values)}
            for values in zip(*(v.tolist() for v in each.values()))
        ]

    def _spread(self, pixels: Pixels, vectors: Tensor | None = None) -> tuple[Tensor, int, float]:
        """The input of diversity: vectors (n, dim), dim, and the factor of their squared distance.
        `vectors` are the images' by the subject's judge, if known.
        """
        if self.protocol.diversity == "perceptual":
            vectors, factor = self.prompt_judge.perceptual(pixels), 1.0
        else:
            vectors, factor = self.subject_judge.images(pixels) if vectors is None else vectors, 0.5
        return vectors, vectors.shape[1], factor

    # -- a few images
    def each(self, pixels: Pixels, prompt: str) -> Mapping[str, Sequence[float | None]]:
        """Of each image of one prompt: subject, subject_clip, prompt_fidelity and parts, of one
        embedding by each judge; None of what the protocol has no judge of.
        """
        clip = self.prompt_judge.images(pixels)
        return {
            "subject": self.subject(pixels),
            "subject_clip": self._likeness(self.photos_clip, clip),
            "prompt_fidelity": self._agreement(clip, prompt),
            "parts": self._parts(pixels, prompt),
        }

    def subject(self, pixels: Pixels) -> list[float]:
        """Subject fidelity of each image."""
        return self._likeness(self.photos, self.subject_judge.images(pixels))

    def prompt_fidelity(self, pixels: Pixels, prompt: str) -> list[float | None]:
        """Prompt fidelity of each image; None where the prompt claims nothing that the evaluator
        knows.
        """
        return self._agreement(self.prompt_judge.images(pixels), prompt)

    def prior(self, pixels: Pixels) -> float:
        """PRES of images of the class noun alone: always against all photos."""
        metric = PriorPreservation(self.photos, scale=self.protocol.subject_scale, **ALONE).to(
            self.photos.device
        )
        metric.update(self.subject_judge.images(pixels))
        return metric.compute().item()

    def _likeness(self, photos: Tensor, vectors: Tensor) -> list[float]:
        metric = SubjectFidelity(
            photos, self.protocol.pairing, self.protocol.subject_scale, **ALONE
        )
        return metric.each(vectors, torch.arange(len(vectors), device=photos.device)).tolist()

    def _agreement(self, clip: Tensor, prompt: str) -> list[float | None]:
        agreement = self.prompt_judge.agreement(clip, self.protocol.text(prompt, self.identifier))
        return [
            _known(v)
            for v in (
                PromptFidelity(self.protocol.prompt_scale, self.protocol.prompt_floor, **ALONE)
                .each(agreement)
                .tolist()
            )
        ]

    def _parts(self, pixels: Pixels, prompt: str) -> list[float | None]:
        if self.parts_judge is None:
            return [None] * len(pixels)
        return [_known(v) for v in self.parts_judge.there(pixels, prompt).tolist()]

    def diversity(self, pixels: Pixels) -> float | None:
        """Mean pairwise distance of the images of one prompt; None of a single image."""
        vectors, dim, factor = self._spread(pixels)
        metric = Diversity(1, dim, factor, **ALONE).to(vectors.device)
        metric.update(vectors, torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device))
        return _known(metric.compute().item())

    def distances(self, pixels: Pixels) -> list[float | None]:
        """Of each image of one prompt, its mean distance to the others, which averages to the
        diversity; None of a single image.
        """
        vectors, _, factor = self._spread(pixels)
        if len(vectors) == 1:
            return [None]
        vectors = vectors.double()
        return (
            factor
            * torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
            .square()
            .sum(1)
            / (len(vectors) - 1)
        ).tolist()


def score(
    out: Path,
    results: list[Result],
    photos: Path | list[Path],
    identifier: str,
    protocol: str | Protocol = "sandbox",
    device: str | torch.device = "cpu",
) -> tuple[list[Result], list[dict]]:
    """Score the images in the output folder `out` of a blend.

    Returns the results with their scores and the protocol's name, and a summary: one row a kind,
    early first and late last.
    """
    judge = Scores(photos, identifier, protocol, device)
    scored, summary = list(results), []
    for kind in in_order(result.kind for result in results):
        of_kind = [i for i, result in enumerate(results) if result.kind == kind]
        groups: dict[str, list[int]] = defaultdict(list)
        for place, i in enumerate(of_kind):
            groups[results[i].prompt].append(place)
        metrics = judge.metrics(len(groups))
        for number, (prompt, places) in enumerate(groups.items()):
            for some in (places[i : i + BATCH] for i in range(0, len(places), BATCH)):
                pixels = [_read(out / results[of_kind[place]].file)[0] for place in some]
                each = judge.update(metrics, pixels, prompt, number, torch.tensor(some))
                for place, scores in zip(some, each):
                    i = of_kind[place]
                    kept = {**measures.keyed(scores), "protocol": judge.protocol.name}
                    scored[i] = replace(results[i], scores=kept)
        collapsed = Collapse(measures.IMAGE_COLLAPSE, **ALONE)
        collapsed.update(
            {
                name: _column(results[i].collapse.get(name) for i in of_kind)
                for name in measures.IMAGE_COLLAPSE
            }
        )
        values = {name: metric.compute() for name, metric in metrics.items()} | collapsed.compute()
        means = measures.keyed({name: _known(value.item()) for name, value in values.items()})
        summary.append({"kind": kind, **means, "n": len(of_kind)})
    return scored, summary


def table(summary: list[dict]) -> str:
    """The summary as text."""
    names = [k for k in summary[0] if k != "kind"]

    def cell(v: object) -> str:
        return "-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v)

    lines = [["", *names], *([row["kind"], *(cell(row[n]) for n in names)] for row in summary)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names) + 1)]
    return "\n".join(
        "  ".join(v.rjust(w) if i else v.ljust(w) for i, (v, w) in enumerate(zip(line, widths)))
        for line in lines
    )


def _read(path: Path) -> Tensor:
    """The image in a file: (1, 3, height, width)."""
    return to_pixels([open_photo(path)])


def _known(value: float) -> float | None:
    """None for NaN, which JSON cannot write."""
    return None if math.isnan(value) else value


def _column(values: Iterable[float | None]) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
