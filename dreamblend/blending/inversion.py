"""A reference from any image: inverted with a snapshot, so that its words' maps can be read as if
that snapshot had drawn it.

A deterministic sampler is run backwards: DDIM's for models that predict noise or v (Song et al.,
2021), the straight path's for flows. Each step is solved for the latents that denoise to those
before (Pan et al., 2023; Garibi et al., 2024), as the plain reverse drifts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import Blend, Drawing
from dreamblend.blending.recorder import Recorder
from dreamblend.models import Backbone
from dreamblend.storage.photos import to_pixels

ITERATIONS = 4  # predictions a step


def fitted(image: Image.Image, height: int, width: int) -> Tensor:
    """The middle of an image at a size: pixels (1, 3, height, width) in [-1, 1]."""
    return to_pixels([ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)])


@torch.no_grad()
def inverted(batch: Batch, blends: Iterable[Blend], latents: Tensor) -> Drawing:
    """What the early snapshot attends to in an image, with the maps of the steps that these blends
    are guided at. Its latents are the noise that the image is inverted to, of the first timestep.

    The prompts' own predictions are followed: guidance would lead away from the image.

    Args:
        latents: of the image (1, channels, height, width), of the size of the batch's.
    """
    early = batch.early
    batch = batch.unguided
    wanted = {step for blend in blends for step in blend.guided_steps(batch.calls)}
    keep = range(min(wanted), max(wanted) + 1) if wanted else range(0)
    recorder, plain = Recorder(batch, early, keep), batch.predictor(early)
    z, before = latents.float().expand(len(batch.prompts), -1, -1, -1), (1.0, 0.0)
    for t, calls in _upwards(batch.schedule().timesteps):
        level = levels(early, float(t))
        share, added = step_back(early.training_noise().prediction, before, level)
        there = z
        for _ in range(ITERATIONS - 1):
            there = (z - added * plain(there, t, calls[0]).float()) / share
        read = next((call for call in calls if call in keep), calls[0])
        z, before = (z - added * recorder(there, t, read).float()) / share, level
        recorder.kept.update({call: recorder.kept[read] for call in calls if call in keep})
    return Drawing(z, recorder.average, site_maps=recorder.kept)


def levels(model: Backbone, t: float) -> tuple[float, float]:
    """The shares of image and noise in latents at a timestep, which may lie between two."""
    noise, count = model.training_noise(), model.scheduler.config.num_train_timesteps
    if noise.prediction == "flow_prediction":
        return 1 - t / count, t / count
    ratios = noise.sigma / noise.alpha.clamp(min=1e-4)
    low = min(int(t), len(ratios) - 1)
    high = min(low + 1, len(ratios) - 1)
    ratio = float(torch.lerp(ratios[low], ratios[high], t - low))
    alpha = (1 + ratio**2) ** -0.5
    return alpha, ratio * alpha


def step_back(
    prediction: str, to: tuple[float, float], level: tuple[float, float]
) -> tuple[float, float]:
    """(p, q) of a step from one level of image and noise to another: p latents + q prediction."""
    alpha, sigma = level
    if prediction == "epsilon":  # the shares of latents and prediction in the image, and in noise
        image, noise = (1 / alpha, -sigma / alpha), (0.0, 1.0)
    elif prediction == "v_prediction":
        image, noise = (alpha, -sigma), (sigma, alpha)
    else:
        image, noise = (1.0, -sigma), (1.0, 1 - sigma)
    p, q = (to[0] * of_image + to[1] * of_noise for of_image, of_noise in zip(image, noise))
    return p, q


def _upwards(timesteps: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
    """Each timestep once, from the cleanest on, with the calls that are at it."""
    calls: dict[float, list[int]] = {}
    for call, t in enumerate(timesteps):
        calls.setdefault(float(t), []).append(call)
    for t in sorted(calls):
        yield timesteps[calls[t][0]], calls[t]
