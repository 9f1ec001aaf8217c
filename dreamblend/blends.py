"""The ways to draw from a pair of snapshots, behind one interface: `early`, `late`, `cag`, `switch`, `merge`, `score`, `region`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamblend.attention import Maps, by_grid, record
from dreamblend.errors import InputError
from dreamblend.guidance import distance_and_gradient, guidance_step, map_energy
from dreamblend.models import Backbone
from dreamblend.sampling import Predictor, classifier_free, predicts_twice, sample
from dreamblend.task import Task


@dataclass
class Drawn:
    """Latents (batch, channels, height, width), and word maps (batch, words, queries) averaged over the steps."""

    latents: Tensor
    maps: Tensor
    distance: Tensor | None = None  # (batch,) map distance to the reference, averaged over the guided steps


class Blend(ABC):
    """A way to draw from a pair."""

    name: str

    @abstractmethod
    def draw(self, task: Task) -> Drawn:
        """Draw one image for each pair of the task."""

    def guided_steps(self, steps: int) -> range:
        """Those of `steps` calls of the model at which the early snapshot's maps are wanted."""
        return range(0)

    @property
    def settings(self) -> dict:
        return {"blend": self.name, **vars(self)}


def watched(
    task: Task, model: Backbone, predict: Predictor, adjust=None, keep: range = range(0), reads: range | None = None, mix=None
) -> tuple[Drawn, dict[int, Maps]]:
    """Sample with `predict` while reading the maps of `model`: their average, and whole at the steps of `keep`.

    `reads` are the steps that `model` makes, where not all: what another one records in shared layers is not its own.
    `mix` makes the output of the model's, given also the word maps just read: (output, maps, latents, timestep, step).
    """
    total, read, kept = 0, 0, {}
    with record(model.denoiser, model.sites(task.grid), task.tokens, conditional_only=predicts_twice(model, task.scale)) as maps:

        def reading(z: Tensor, t: Tensor, step: int) -> Tensor:
            nonlocal total, read
            maps.clear()
            output = predict(z, t, step)
            if reads is None or step in reads:
                seen = word_maps(maps, task.words)
                total, read = total + seen, read + 1
                if step in keep:
                    kept[step] = dict(maps)
            return output if mix is None else mix(output, seen, z, t, step)

        z = sample(reading, task.noise, model.scheduler, task.steps, adjust, task.seeds)
    return Drawn(z, total / read), kept


def word_maps(maps: Maps, words: Tensor) -> Tensor:
    """Token maps (batch, heads, queries, tokens) of sites of one grid to the words' share of attention (batch, words, queries)."""
    return words @ by_grid(maps).transpose(1, 2)


class Early(Blend):
    """The early snapshot alone. Leaves the maps of the task's guided steps as its reference."""

    name = "early"

    def draw(self, task: Task) -> Drawn:
        drawn, task.reference = watched(task, task.early, task.predictor(task.early), keep=task.guided)
        return drawn


class Late(Blend):
    """The late snapshot alone."""

    name = "late"

    def draw(self, task: Task) -> Drawn:
        return watched(task, task.late, task.predictor(task.late))[0]


class CAG(Blend):
    """The late snapshot, its cross-attention guided to the early one's (DreamBlend, Ram et al., WACV 2025).

    Args:
        strength: of a guidance step: how far it may reach, in shares of the latents' norm; 0 is the late snapshot alone.
        window: first and last share of the model's calls that are guided, of those that begin a step.
        repeats: guidance steps before each denoising step.
    """

    name = "cag"

    def __init__(self, strength: float = .5, window: tuple[float, float] = (0., .6), repeats: int = 1):
        _share("window", *window)
        if not strength >= 0 or repeats < 1:
            raise InputError(f"strength is {strength} and repeats {repeats}: strength is 0 or more, repeats 1 or more")
        self.strength, self.window, self.repeats = strength, tuple(window), repeats

    def guided_steps(self, steps: int) -> range:
        return range(round(self.window[0] * steps), round(self.window[1] * steps))

    def draw(self, task: Task) -> Drawn:
        conditioned, unconditioned = task.encode(task.late)
        predict = classifier_free(task.late, conditioned, unconditioned, task.scale)
        sites, distances = task.late.sites(task.grid), []
        guided = self.guided_steps(task.calls) if self.strength else range(0)
        if not task.reference.keys() >= set(guided):
            raise ValueError("there is no reference: Early has to draw the task first, with the blend's guided steps")

        def adjust(z: Tensor, t: Tensor, step: int, scheduler) -> Tensor:
            if step not in guided:
                return z

            def read(z: Tensor) -> Maps:
                with record(task.late.denoiser, sites, task.tokens, stop_at_last=True) as maps:
                    task.late.denoise(scheduler.scale_model_input(z, t), t, conditioned)
                return maps

            energy = map_energy(task.reference[step], task.weights)
            for _ in range(self.repeats):
                distance, gradient = distance_and_gradient(read, z, task.reference[step], task.weights)
                z = guidance_step(z, distance, gradient, energy, self.strength)
            distances.append(distance)
            return z

        drawn = watched(task, task.late, predict, adjust)[0]
        drawn.distance = torch.stack(distances).mean(0) if distances else None
        return drawn


class Switch(Blend):
    """The early snapshot for the first steps, the late one for the rest.

    Args:
        point: share of the steps that the early snapshot takes.
    """

    name = "switch"

    def __init__(self, point: float = .4):
        _share("point", point)
        self.point = point

    def draw(self, task: Task) -> Drawn:
        early, late = task.predictor(task.early), task.predictor(task.late)
        first, last = round(self.point * task.calls), task.calls
        reader, reads = (task.late, range(first, last)) if first < last else (task.early, range(last))
        return watched(task, reader, lambda z, t, step: (early if step < first else late)(z, t, step), reads=reads)[0]


class Merge(Blend):
    """One sampling with interpolated weights.

    Args:
        weight: of the late snapshot; 0 is the early one, 1 the late one.
    """

    name = "merge"

    def __init__(self, weight: float = .5):
        self.weight = _finite(weight)

    def draw(self, task: Task) -> Drawn:
        model = task.merged(self.weight)
        return watched(task, model, task.predictor(model))[0]


class Score(Blend):
    """Both snapshots at every step, their predictions mixed: early + weight (late - early).

    A weight above 1 extrapolates away from the early snapshot: autoguidance (Karras et al., 2024).

    Args:
        weight: of the late snapshot's prediction.
    """

    name = "score"

    def __init__(self, weight: float = .5):
        self.weight = _finite(weight)

    def draw(self, task: Task) -> Drawn:
        early, late = task.predictor(task.early), task.predictor(task.late)
        return watched(task, task.late, late, mix=lambda output, _, *at: torch.lerp(early(*at), output, self.weight))[0]


class Region(Blend):
    """Both snapshots at every step: the late one's prediction where it sees the subject, the early one's everywhere else.

    Where the subject is, is read from the late snapshot's own cross-attention while it predicts. The place, the light and all
    else that a prompt asks for are drawn by the snapshot that has not forgotten them, so nothing needs to be guided back.

    Args:
        edge: share of the range of the subject's map over which the late snapshot fades in: towards 0 it draws everything but
            what its subject attends to least, and at 1 it fades over the whole range.
        grow: cells of the map's grid by which the region is grown: a subject's outline, and parts that only the late snapshot
            knows of (a mug's handle), lie between the cells or beside them.
        weight: of the late snapshot's prediction in there, as `Score`'s is everywhere: below 1 nearer to the prompt, above nearer to the subject.
    """

    name = "region"

    def __init__(self, edge: float = .2, grow: int = 1, weight: float = 1.3):
        if not 0 < edge <= 1 or grow < 0:
            raise InputError(f"edge is {edge} and grow {grow}: edge is a share of the map's range, above 0 and up to 1, grow 0 cells or more")
        self.edge, self.grow, self.weight = edge, grow, _finite(weight)

    def draw(self, task: Task) -> Drawn:
        early, late = task.predictor(task.early), task.predictor(task.late)
        mix = lambda output, maps, *at: torch.lerp(early(*at), output, self.share(maps, task).to(output.dtype))
        return watched(task, task.late, late, mix=mix)[0]

    def share(self, maps: Tensor, task: Task) -> Tensor:
        """The late snapshot's share of each latent (batch, 1, height, width), from its word maps (batch, words, queries)."""
        own = (maps * (task.subject & task.mask).unsqueeze(-1)).sum(1)
        low, high = own.amin(-1, keepdim=True), own.amax(-1, keepdim=True)
        rises = ((own - low) / (high - low).clamp(min=1e-12)).view(-1, 1, task.grid, task.grid)
        grown = F.max_pool2d(rises, 2 * self.grow + 1, stride=1, padding=self.grow)
        return (F.interpolate(grown, task.noise.shape[2:], mode="bilinear") / self.edge).clamp(max=1) * self.weight


def _finite(weight: float) -> float:
    if not math.isfinite(weight):
        raise InputError(f"weight is {weight}: it is a number, 0 for the early snapshot and 1 for the late one")
    return weight


def _share(name: str, *values: float) -> None:
    if not all(0 <= v <= 1 for v in values) or list(values) != sorted(values):
        raise InputError(f"{name} is {values if len(values) > 1 else values[0]}: it is a share of the steps, from 0 to 1")


BLENDS = {blend.name: blend for blend in (Early, Late, CAG, Switch, Merge, Score, Region)}
