"""Fidelity, diversity, prior preservation, copying and collapse as `torchmetrics.Metric`s. Tensors
only.

They take unit vectors of `encoders`, so that an image is embedded once for all of them. No state is
a list of images: sums are kept, which add up over batches and over processes, in any split. Sums
are in double precision: a small diversity is a difference of large ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dreamblend.attention import collapse
from dreamblend.errors import InputError
from dreamblend.evaluation.measures import MEASURES

PAIRINGS = ("all-pairs", "one-to-one")


class _Mean(Metric):
    """A mean over images; those of value NaN, which could not be judged, are left out. NaN where
    there is none.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.add_state("total", torch.zeros((), dtype=torch.float64), "sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), "sum")

    def _add(self, values: Tensor) -> None:
        known = values[~values.isnan()]
        self.total += known.double().sum()
        self.count += len(known)

    def compute(self) -> Tensor:
        return self.total / self.count


# -------------------------------------------------------------------------------------- the subject
class SubjectFidelity(_Mean):
    """Mean cosine of images to the subject's photos: DINO or CLIP-I, by whose vectors they are
    (Ruiz et al., CVPR 2023, section 4.1).

    Args:
        photos: unit vectors (m, dim) of the subject's photos.
        pairing: `all-pairs`, or `one-to-one`: image i against photo i mod m.
        scale: factor of the result.
    """

    higher_is_better = MEASURES["subject"].higher_is_better
    photos: Tensor

    def __init__(
        self, photos: Tensor, pairing: str = "all-pairs", scale: float = 1.0, **settings: Any
    ):
        super().__init__(**settings)
        if pairing not in PAIRINGS:
            raise InputError(f"pairing is {pairing!r}: set it to {' or '.join(PAIRINGS)}")
        if photos.ndim != 2 or not len(photos):
            raise InputError(
                "subject fidelity needs the vectors (m, dim) of at least one photo, and got the"
                f" shape {tuple(photos.shape)}"
            )
        self.pairing, self.scale = pairing, scale
        self.register_buffer("photos", photos, persistent=False)

    def each(self, features: Tensor, index: Tensor | None = None) -> Tensor:
        """The value of each image: (n,), of unit vectors (n, dim). `index` (n,) are their places in
        the whole set, for one-to-one.
        """
        if self.pairing == "all-pairs":
            return self.scale * features @ self.photos.mean(0)
        if index is None:
            raise InputError(
                "one-to-one pairing needs the index of every image in the whole set: a batch alone"
                " does not tell it"
            )
        return self.scale * (features * self.photos[index % len(self.photos)]).sum(-1)

    def update(self, features: Tensor, index: Tensor | None = None) -> None:
        self._add(self.each(features, index))


class PriorPreservation(SubjectFidelity):
    """PRES: the same cosine for images of the *class*. Lower is better: where the prior collapsed,
    any mug is this mug (Ruiz et al., section 4.3).
    """

    higher_is_better = MEASURES["prior"].higher_is_better


def likeness(photos: Tensor) -> float | None:
    """The highest cosine between two different photos, of their unit vectors (m, dim): what no new
    image of the subject should exceed.

    Photos that are there twice count as one; None where no two differ.
    """
    cosines = between(photos)
    return cosines.max().item() if len(cosines) else None


def between(photos: Tensor) -> Tensor:
    """The cosines between different photos, of their unit vectors (m, dim); each pair comes
    twice.
    """
    cosines = photos @ photos.T
    return cosines[cosines < 1 - 1e-5]  # at 1 it is a photo with itself, or the same file again


class Copying(_Mean):
    """The share of images that are nearer to one photo than any two different photos are to each
    other.

    Such an image repeats a training photo, which subject fidelity rewards. Few photos make a loose
    ceiling: where all pairs are alike, a new photo of the subject exceeds it by chance in 2 of m +
    1 cases (its m pairs against the photos' m (m - 1) / 2). So read the share against that.

    Args:
        photos: unit vectors (m, dim) of the subject's photos, at least two of them different.
    """

    higher_is_better = MEASURES["copies"].higher_is_better
    photos: Tensor

    def __init__(self, photos: Tensor, **settings: Any):
        super().__init__(**settings)
        ceiling = likeness(photos)
        if ceiling is None:
            raise InputError(
                "copies are judged by how alike different photos of the subject are: give at least"
                " two different photos"
            )
        self.ceiling = ceiling
        self.register_buffer("photos", photos, persistent=False)

    def nearest(self, features: Tensor) -> Tensor:
        """Cosine of each image to its nearest photo: (n,)."""
        return (features @ self.photos.T).amax(1)

    def update(self, features: Tensor) -> None:
        self._add((self.nearest(features) > self.ceiling).float())


# --------------------------------------------------------------------------------------- the prompt
class PromptFidelity(_Mean):
    """CLIP-T: mean agreement of images with their prompts.

    Args:
        scale: factor of the result; 2.5 and a floor of 0 make it CLIPScore (Hessel et al., EMNLP
            2021, eq. 1).
        floor: agreements below it count as it.
    """

    higher_is_better = MEASURES["prompt_fidelity"].higher_is_better

    def __init__(self, scale: float = 1.0, floor: float | None = None, **settings: Any):
        super().__init__(**settings)
        self.scale, self.floor = scale, floor

    def each(self, agreement: Tensor) -> Tensor:
        """The value of each image: (n,), of its evaluator's agreement (n,)."""
        return self.scale * (
            agreement if self.floor is None else agreement.clamp(min=self.floor)
        )  # clamp keeps NaN

    def update(self, agreement: Tensor) -> None:
        self._add(self.each(agreement))


class Parts(_Mean):
    """Mean probability (n,) that the parts that stand out of the subject are there."""

    higher_is_better = MEASURES["parts"].higher_is_better

    def each(self, there: Tensor) -> Tensor:
        """The value of each image: (n,), as its judge has it."""
        return there

    def update(self, there: Tensor) -> None:
        self._add(self.each(there))


class Diversity(Metric):
    """DIV: mean pairwise distance of the images of one prompt, then over prompts; NaN where no
    prompt has two images.

    Both distances here are squared ones, which need no pairs: over i < j, sum |a_i - a_j|^2 = n sum
    |a_i|^2 - |sum a_i|^2. So the images of a prompt can come in any batch of any process. LPIPS is
    the squared distance of flattened, scaled features (`SandboxPrompt.perceptual`), and a cosine
    distance half that of unit vectors: 1 - u.v = |u - v|^2 / 2.

    Args:
        prompts: how many prompts there are.
        dim: length of the vectors.
        factor: of the squared distance; 1/2 for cosine distances.
    """

    higher_is_better = MEASURES["diversity"].higher_is_better
    full_state_update = False
    sums: Tensor
    squares: Tensor
    counts: Tensor

    def __init__(self, prompts: int, dim: int, factor: float = 1.0, **settings: Any):
        super().__init__(**settings)
        self.factor = factor
        self.add_state("sums", torch.zeros(prompts, dim, dtype=torch.float64), "sum")
        self.add_state("squares", torch.zeros(prompts, dtype=torch.float64), "sum")
        self.add_state("counts", torch.zeros(prompts, dtype=torch.int64), "sum")

    def update(self, features: Tensor, prompt: Tensor) -> None:
        """Vectors (n, dim) and which prompt each is of, (n,) int64 from 0."""
        features = features.double()
        self.sums.index_add_(0, prompt, features)
        self.squares.index_add_(0, prompt, features.square().sum(1))
        self.counts.index_add_(0, prompt, torch.ones_like(prompt))

    def each(self) -> Tensor:
        """The value of each prompt: (prompts,), NaN where it has fewer than two images."""
        pairs = self.counts * (self.counts - 1) / 2
        distance = (self.counts * self.squares - self.sums.square().sum(1)).clamp(
            min=0
        ) / pairs  # below 0 by rounding only
        return torch.where(pairs > 0, self.factor * distance, torch.nan)

    def compute(self) -> Tensor:
        return self.each().nanmean()


# ----------------------------------------------------------------------------------------- collapse
class Collapse(Metric):
    """Means over images of the measures of `dreamblend.attention.collapse`: name -> value. Values
    NaN are left out.
    """

    full_state_update = False
    totals: Tensor
    counts: Tensor

    def __init__(self, measures: tuple[str, ...] = collapse.MEASURES, **settings: Any):
        super().__init__(**settings)
        self.measures = tuple(measures)
        self.add_state("totals", torch.zeros(len(self.measures), dtype=torch.float64), "sum")
        self.add_state("counts", torch.zeros(len(self.measures), dtype=torch.int64), "sum")

    def update(self, measured: dict[str, Tensor]) -> None:
        """Measures of a batch as `collapse.measure` gives them: name -> (batch,)."""
        values = torch.stack([measured[name].double() for name in self.measures])
        self.totals += values.nansum(1)
        self.counts += (~values.isnan()).sum(1)

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.measures, self.totals / self.counts))
