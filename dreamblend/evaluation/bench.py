"""Draws a fixed set of prompts and seeds with any snapshot or blend, and scores each image, for the
comparisons of selection and benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import Blend, Drawing, Early, draw_reference
from dreamblend.blending.models import Models
from dreamblend.blending.options import Options
from dreamblend.blending.picture import Picture, pictures
from dreamblend.errors import InputError
from dreamblend.evaluation.measures import IMAGE_COLLAPSE
from dreamblend.evaluation.protocols import Protocol
from dreamblend.evaluation.scores import Scores
from dreamblend.models import Backbone
from dreamblend.storage.photos import to_pixels

JUDGED = ("subject", "subject_clip", "prompt_fidelity", "parts", "diversity")
Keep = Callable[[Picture], None]  # takes each image; its kind is the blend's name


class Bench:
    """Prompts and seeds of one subject, and the judges of their images.

    Args:
        photos: the subject's photos, or their folder.
        identifier, class_noun: how the prompts name the subject.
        prompts: texts, with the identifier.
        seeds: of the noise.
        num_inference_steps, guidance_scale: of sampling.
        grid: side of the attention sites that are read; the backbone's default where None.
        protocol: how images are judged; None measures only what needs no judge.
        batch: about how many images are drawn at once; those of one prompt always are.
        size: height and width of the images in pixels, each the base's own where None.
        layers: attention layers that are read (`Backbone.sites`).
        options: of drawing; the models have them applied.
    """

    def __init__(
        self,
        photos: Path | list[Path] | None,
        identifier: str,
        class_noun: str,
        prompts: list[str],
        seeds: list[int],
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        grid: int | None = None,
        protocol: str | Protocol | None = "sandbox",
        device: str | torch.device = "cpu",
        batch: int = 16,
        size: tuple[int | None, int | None] = (None, None),
        layers: list[str] | None = None,
        options: Options = Options(),
    ):
        self._scores: Scores | None = None
        if protocol is not None:
            assert photos is not None, "judges compare with photos"
            self._scores = Scores(photos, identifier, protocol, device)
        self.size, self.layers, self.options = size, layers, options
        self.identifier = identifier
        self.class_noun = class_noun
        self.prompts = prompts
        self.seeds = seeds
        self.num_inference_steps, self.guidance_scale, self.grid = (
            num_inference_steps,
            guidance_scale,
            grid,
        )
        self.chunk = max(1, batch // len(seeds))  # prompts

    @property
    def scores(self) -> Scores:
        assert self._scores is not None, "this bench has no judges"
        return self._scores

    def single(self, model: Backbone, keep: Keep | None = None) -> list[dict]:
        """Rows of a model alone, as `blends` gives them."""
        return self.blends({"single": Early()}, Models(model, model, model), keep)["single"]

    @torch.no_grad()
    def blends(
        self,
        blends: dict[str, Blend],
        models: Models,
        keep: Keep | None = None,
    ) -> dict[str, list[dict]]:
        """Draw and score every prompt and seed with each blend of one pair. The reference is drawn
        once for all of them.

        Returns, by the blend's name here, one row an image: prompt, seed, distance (of the maps, of
        guided blends), and what was measured: subject, subject_clip (by the prompt's judge),
        prompt_fidelity, parts, diversity (mean distance to the prompt's other images), overlap and
        context_mass; None where a measure does not apply. An image that is not finite has no row.
        Raises InputError where none is.
        """
        rows: dict[str, list[dict]] = {name: [] for name in blends}
        for start in range(0, len(self.prompts), self.chunk):
            pairs = [
                (prompt, seed)
                for prompt in self.prompts[start : start + self.chunk]
                for seed in self.seeds
            ]
            for name, batch, drawing in self._draw(blends, models, pairs):
                rows[name] += self._judged(name, batch, drawing, pairs, keep)
        self._demand_some(rows)
        return rows

    @torch.no_grad()
    def prior(self, blends: dict[str, Blend], models: Models) -> dict[str, float]:
        """PRES by the blend's name: how like the subject are images of the class noun alone, one a
        seed. Raises InputError as `blends` does.
        """
        pairs = [(f"a {self.class_noun}", seed) for seed in self.seeds]
        drawings = {
            name: pictures(pairs, batch, name, drawing)
            for name, batch, drawing in self._draw(blends, models, pairs)
        }
        self._demand_some(drawings)
        return {
            name: self.scores.prior(to_pixels([picture.image for picture in made]))
            for name, made in drawings.items()
        }

    def measured(self, model: Backbone) -> dict[str, float | None]:
        """The means of all that is measured of a model alone, its prior too."""
        alone = Models(model, model, model)
        return means(self.single(model)) | self.prior({"prior": Early()}, alone)

    def _demand_some(self, images: Mapping[str, Sequence[Any]]) -> None:
        """Raise InputError where a name has no image."""
        if empty := [name for name, of_name in images.items() if not of_name]:
            raise InputError(
                f"every image of {', '.join(empty)} is NaN or infinite: the snapshots were trained"
                f" too far, or the scale {self.guidance_scale} is too high"
            )

    def _draw(
        self, blends: dict[str, Blend], models: Models, pairs: list[tuple[str, int]]
    ) -> Iterator[tuple[str, Batch, Drawing]]:
        """What each blend draws of the pairs, over one reference."""
        height, width = (side or models.late.size for side in self.size)
        batch = Batch.of(
            models,
            pairs,
            self.identifier,
            self.class_noun,
            self.num_inference_steps,
            self.guidance_scale,
            self.grid,
            (height, width),
            self.layers,
            negative_prompt=self.options.negative_prompt,
            guidance_rescale=self.options.guidance_rescale,
        )
        needed = any(blend.guided_steps(batch.calls) for blend in blends.values())
        image = any(isinstance(blend, Early) for blend in blends.values())
        reference = draw_reference(batch, blends.values(), image) if needed else None
        for name, blend in blends.items():
            yield name, batch, blend.draw(batch, reference)

    def _judged(
        self,
        name: str,
        batch: Batch,
        drawing: Drawing,
        pairs: list[tuple[str, int]],
        keep: Keep | None,
    ) -> list[dict]:
        """The rows of a few prompts' images, all seeds of each."""
        made, rows = pictures(pairs, batch, name, drawing), []
        for prompt, same in groupby(made, lambda picture: picture.prompt):
            some = list(same)
            scores: dict[str, Sequence[float | None]] = dict.fromkeys(JUDGED, [None] * len(some))
            if self._scores is not None:
                pixels = to_pixels([picture.image for picture in some])
                scores = {
                    **self._scores.each(pixels, prompt),
                    "diversity": self._scores.distances(pixels),
                }
            for i, picture in enumerate(some):
                measured = {
                    **{k: v[i] for k, v in scores.items()},
                    **{k: picture.collapse[k] for k in IMAGE_COLLAPSE},
                    "distance": picture.distance,
                }
                rows.append({"prompt": prompt, "seed": picture.seed, **measured})
        if keep is not None:
            for picture in made:
                keep(picture)
        return rows


def means(rows: Iterable[dict]) -> dict[str, float | None]:
    """Each measure's mean over the images that have it; None where no image has it."""
    rows = list(rows)
    names = [name for name in rows[0] if name not in ("prompt", "seed")]
    known = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    return {name: mean(values) if values else None for name, values in known.items()}
