"""Trains the sandbox's judges, each on renders of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dreamblend.sandbox.making.fitting import fit
from dreamblend.sandbox.v2 import world
from dreamblend.sandbox.v2.drawing import LABELS
from dreamblend.sandbox.v2.judges import PARTS, PartsJudge, PromptJudge, SubjectJudge, claims
from dreamblend.sandbox.v2.making.autoencoder import shares
from dreamblend.storage.photos import to_pixels


def fit_prompt_judge(steps: int, scratch: Path, device: str) -> PromptJudge:
    """Images against their captions: every other caption of the batch, and the caption with two of
    its claims swapped.
    """
    judge = PromptJudge().to(device)

    def some_of(rng: Random, caption: str) -> list[list[str]]:
        stated = [texts for _, texts in claims(caption)]
        return rng.sample(stated, min(2, len(stated)))

    def loss(step: int, rng: Random, generator: torch.Generator) -> Tensor:
        scenes = [world.random_scene(rng) for _ in range(64)]
        captions = [world.caption(rng, s).text for s in scenes]
        images = judge.embed_images(
            _jitter(to_pixels([world.render(s)[0] for s in scenes]), generator).to(device)
        )
        own = judge.logits(images, judge.embed_texts(captions))
        target = torch.arange(len(scenes), device=device)
        claimed = [(i, texts) for i, text in enumerate(captions) for texts in some_of(rng, text)]
        image_of = torch.tensor([i for i, _ in claimed], device=device)
        options = [texts for _, texts in claimed]
        longest = max(map(len, options))
        texts = judge.embed_texts(
            [t for texts in options for t in texts + [""] * (longest - len(texts))]
        ).unflatten(0, (-1, longest))
        there = torch.tensor(
            [[i < len(texts) for i in range(longest)] for texts in options], device=device
        )
        swapped = judge.log_scale.exp() * torch.einsum("id,itd->it", images[image_of], texts)
        swapped = F.cross_entropy(swapped.masked_fill(~there, -1e4), torch.zeros_like(image_of))
        return 0.3 * (F.cross_entropy(own, target) + F.cross_entropy(own.T, target)) + swapped

    fit("prompt-judge", judge, loss, steps, 1.5e-3, scratch, device, seed=101)
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


def fit_subject_judge(steps: int, scratch: Path, device: str) -> SubjectJudge:
    """Two views of 12 instances of each of 3 classes: find the other view (InfoNCE)."""
    judge = SubjectJudge().to(device)

    def view(rng: Random, look: world.Look) -> Image.Image:
        return world.render(_scene_of(rng, look, (30, 48)))[0]

    def loss(step: int, rng: Random, generator: torch.Generator) -> Tensor:
        looks = [
            world.random_look(rng, noun) for noun in rng.sample(world.NOUNS, 3) for _ in range(12)
        ]
        a, b = (
            judge(_jitter(to_pixels([view(rng, look) for look in looks]), generator).to(device))
            for _ in range(2)
        )
        target = torch.arange(len(looks), device=device)
        return F.cross_entropy(a @ b.T / 0.1, target) + F.cross_entropy(b @ a.T / 0.1, target)

    fit("subject-judge", judge, loss, steps, 1.5e-3, scratch, device, seed=102)
    return judge


def losing(rng: Random, look: world.Look) -> world.Look:
    """The look, each of its parts lost with a chance of .4."""
    parts = world.STANDING_OUT[look.noun]
    return replace(look, lacks=frozenset(p for p in parts if rng.random() < 0.4))


def fit_parts_judge(steps: int, scratch: Path, device: str) -> PartsJudge:
    """Things that have lost some of their parts: which are there, and which squares show them?"""
    judge = PartsJudge().to(device)
    index = torch.tensor([LABELS.index(part) for part in PARTS])

    def loss(step: int, rng: Random, generator: torch.Generator) -> Tensor:
        looks = [losing(rng, world.random_look(rng, rng.choice(world.NOUNS))) for _ in range(48)]
        drawn = [world.draw(_scene_of(rng, look, (28, 48))) for look in looks]
        pixels = _jitter(to_pixels([d.image for d in drawn]), generator).to(device)
        labels = torch.from_numpy(np.stack([d.labels for d in drawn])).long()
        shown = (shares(labels)[:, index] > 0.12).float().to(device)
        logits = judge(pixels)
        asked = torch.tensor([[noun == look.noun for noun, _ in PARTS] for look in looks])
        asked = asked.to(device)  # what a hat hides is not there to be seen
        whole = F.binary_cross_entropy_with_logits(
            logits.amax((2, 3))[asked], shown.amax((2, 3))[asked]
        )
        squares = F.binary_cross_entropy_with_logits(
            logits, shown, pos_weight=torch.tensor(3.0, device=device), reduction="sum"
        )
        return 0.3 * whole + squares / shown.sum()

    fit("parts-judge", judge, loss, steps, 1.5e-3, scratch, device, seed=103)
    return judge


def _jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Noise and blur of random strength: what a denoiser draws is softer than what the renderer
    does.
    """
    b = pixels.shape[0]
    soft = F.avg_pool2d(pixels, 5, 1, 2, count_include_pad=False)
    pixels = pixels.lerp(soft, torch.rand(b, 1, 1, 1, generator=generator) ** 2)
    return pixels + 0.1 * torch.rand(b, 1, 1, 1, generator=generator) * torch.randn(
        pixels.shape, generator=generator
    )
