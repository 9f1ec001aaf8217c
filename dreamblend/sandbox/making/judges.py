"""Trains the sandbox's judges, each on renders of its own."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamblend.sandbox import world
from dreamblend.sandbox.drawing import LABELS
from dreamblend.sandbox.judges import (
    PARTS,
    PartsJudge,
    PromptJudge,
    SubjectJudge,
    claims,
    numbered,
)
from dreamblend.sandbox.making.autoencoder import shares
from dreamblend.sandbox.making.fitting import Batch, Run, fit
from dreamblend.storage.photos import to_pixels


def fit_prompt_judge(steps: int, run: Run) -> PromptJudge:
    """Images against their captions: every other caption of the batch, and the caption with two of
    its claims swapped.
    """
    judge = PromptJudge().to(run.device)

    def batch(step: int, rng: Random) -> Batch:
        scenes = [world.random_scene(rng) for _ in range(64)]
        captions = [world.caption(rng, s).text for s in scenes]
        claimed = []
        for i, caption in enumerate(captions):
            stated = [texts for _, texts in claims(caption)]
            claimed += [(i, texts) for texts in rng.sample(stated, min(2, len(stated)))]
        options = [texts for _, texts in claimed]
        longest = max(map(len, options))
        padded = [t for texts in options for t in texts + [""] * (longest - len(texts))]
        there = [[i < len(texts) for i in range(longest)] for texts in options]
        return {
            "pixels": to_pixels([world.render(s)[0] for s in scenes]),
            "captions": numbered(captions),
            "image_of": torch.tensor([i for i, _ in claimed]),
            "options": numbered(padded).unflatten(0, (-1, longest)),
            "there": torch.tensor(there),
        }

    def loss(given: Batch, generator: torch.Generator) -> Tensor:
        images = judge.embed_images(_jitter(given["pixels"], generator))
        own = judge.logits(images, judge.embed_words(given["captions"]))
        target = torch.arange(len(own), device=own.device)
        texts = judge.embed_words(given["options"].flatten(0, 1)).unflatten(
            0, given["options"].shape[:2]
        )
        swapped = judge.log_scale.exp() * torch.einsum(
            "id,itd->it", images[given["image_of"]], texts
        )
        swapped = swapped.masked_fill(~given["there"], -1e4)
        stated = F.cross_entropy(swapped, torch.zeros_like(given["image_of"]))
        return 0.3 * (F.cross_entropy(own, target) + F.cross_entropy(own.T, target)) + stated

    fit("prompt-judge", judge, batch, loss, steps, 1.5e-3, run)
    return judge


def _scene_of(rng: Random, look: world.Look, height: tuple[float, float]) -> world.Scene:
    """A look somewhere: alone or beside another thing, now and then with something on."""
    worn = world.random_extra(rng, world.WEARABLES) if rng.random() < 0.12 else None
    held = world.random_extra(rng, world.HOLDABLES) if rng.random() < 0.12 else None
    slot = rng.randrange(2) if rng.random() < 0.3 else None
    view = rng.choice(("upside down", "on its side")) if rng.random() < 0.08 else None
    things = [world.pose(rng, look, worn, slot, height, held, view)]
    if slot is not None:
        other = rng.choice([n for n in world.SHAPES if n != look.noun])
        things.append(world.pose(rng, world.random_look(rng, other), None, 1 - slot))
    return world.Scene(tuple(things), rng.choice(world.PLACES), rng.getrandbits(32))


def fit_subject_judge(steps: int, run: Run) -> SubjectJudge:
    """Two views of 12 instances of each of 3 classes: find the other view (InfoNCE)."""
    judge = SubjectJudge().to(run.device)

    def batch(step: int, rng: Random) -> Batch:
        nouns = rng.sample(world.NOUNS, 3)
        looks = [world.random_look(rng, noun) for noun in nouns for _ in range(12)]
        views = [world.render(_scene_of(rng, look, (30, 48)))[0] for look in looks * 2]
        return {"pixels": to_pixels(views)}

    def loss(given: Batch, generator: torch.Generator) -> Tensor:
        a, b = judge(_jitter(given["pixels"], generator)).chunk(2)
        target = torch.arange(len(a), device=a.device)
        return F.cross_entropy(a @ b.T / 0.1, target) + F.cross_entropy(b @ a.T / 0.1, target)

    fit("subject-judge", judge, batch, loss, steps, 1.5e-3, run)
    return judge


def losing(rng: Random, look: world.Look) -> world.Look:
    """The look, each of its parts lost with a chance of .4."""
    parts = world.STANDING_OUT[look.noun]
    return replace(look, lacks=frozenset(p for p in parts if rng.random() < 0.4))


def fit_parts_judge(steps: int, run: Run) -> PartsJudge:
    """Things that have lost some of their parts: which are there, and which squares show them?"""
    judge = PartsJudge().to(run.device)
    index = torch.tensor([LABELS.index(part) for part in PARTS])

    def batch(step: int, rng: Random) -> Batch:
        looks = [losing(rng, world.random_look(rng, rng.choice(world.NOUNS))) for _ in range(48)]
        drawn = [world.draw(_scene_of(rng, look, (28, 48))) for look in looks]
        labels = torch.from_numpy(np.stack([d.labels for d in drawn])).long()
        return {
            "pixels": to_pixels([d.image for d in drawn]),
            "shown": (shares(labels)[:, index] > 0.12).float(),
            # what a hat hides is not there to be seen
            "asked": torch.tensor([[noun == look.noun for noun, _ in PARTS] for look in looks]),
        }

    def loss(given: Batch, generator: torch.Generator) -> Tensor:
        logits, shown = judge(_jitter(given["pixels"], generator)), given["shown"]
        whole = F.binary_cross_entropy_with_logits(
            logits.amax((2, 3)), shown.amax((2, 3)), weight=given["asked"].float(), reduction="sum"
        )
        squares = F.binary_cross_entropy_with_logits(
            logits, shown, pos_weight=logits.new_tensor(3.0), reduction="sum"
        )
        return 0.3 * whole / given["asked"].sum() + squares / shown.sum()

    fit("parts-judge", judge, batch, loss, steps, 1.5e-3, run)
    return judge


def _jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Noise and blur of random strength: what a denoiser draws is softer than what the renderer
    does.
    """

    def some() -> Tensor:
        return torch.rand(len(pixels), 1, 1, 1, generator=generator, device=pixels.device)

    soft = F.avg_pool2d(pixels, 5, 1, 2, count_include_pad=False)
    pixels = pixels.lerp(soft, some() ** 2)
    noise = torch.randn(pixels.shape, generator=generator, device=pixels.device)
    return pixels + 0.1 * some() * noise
