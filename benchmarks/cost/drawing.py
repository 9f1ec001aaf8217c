"""What a blend costs beside the plain pipeline of diffusers: seconds, denoiser passes, floating
point operations and memory, for the same weights, prompts, scheduler, steps and size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.cost.clock import in_turn, over, shown, spread
from benchmarks.counted import counted, weights
from benchmarks.tables import markdown
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import BLENDS, Blend
from dreamblend.blending.models import Models
from dreamblend.models import Backbone
from dreamblend.storage.photos import to_images

PLAIN = "plain"
SCALE = 4.0  # of guidance
PLACES = ("on the beach", "in the snow", "in the desert", "in a kitchen")


def pairs_of(noun: str, count: int) -> list[tuple[str, int]]:
    """(prompt, seed) of as many images."""
    return [(f"a sks {noun} {PLACES[i % len(PLACES)]}", i) for i in range(count)]


def plain(
    model: Backbone, pairs: list[tuple[str, int]], steps: int, size: tuple[int, int]
) -> Callable[[], list[Image.Image]]:
    """The pipeline of diffusers over a model's modules, by its own call."""
    pipe = model.pipe
    pipe.set_progress_bar_config(disable=True)

    def draw() -> list[Image.Image]:
        model.activate()
        return pipe(
            [prompt for prompt, _ in pairs],
            generator=[torch.Generator().manual_seed(seed) for _, seed in pairs],
            num_inference_steps=steps,
            guidance_scale=SCALE,
            height=size[0],
            width=size[1],
        ).images

    return draw


def blended(
    models: Models,
    blend: Blend,
    pairs: list[tuple[str, int]],
    noun: str,
    steps: int,
    size: tuple[int, int],
) -> Callable[[], list[Image.Image]]:
    """A blend alone, with the reference that it needs, to images."""

    @torch.no_grad()
    def draw() -> list[Image.Image]:
        batch = Batch.of(models, pairs, "sks", noun, steps, SCALE, size=size)
        latents = blend.draw(batch).latents
        return [to_images(models.late.decode(z[None]))[0] for z in latents]

    return draw


class Passes:
    """Counts the rows that denoisers of a kind are given inside the `with` block, those of a pass
    that ends early too: each is one pass for one prompt.
    """

    def __init__(self, kind: type[nn.Module]):
        self.kind, self.rows = kind, 0

    def __enter__(self) -> Passes:
        # of the class: a blend may make a denoiser of its own
        self._forward = forward = self.kind.forward

        @functools.wraps(forward)
        def counting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 2)
            self.rows += len(next(given))
            return forward(module, *args, **kwargs)

        setattr(self.kind, "forward", counting)  # noqa: B010  # its type has no place for another
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.kind, "forward", self._forward)  # noqa: B010


def held(*views: Backbone) -> int:
    """Bytes of the weights that these views draw with, those of each module once; adapters that
    none of them has do not count.
    """
    modules = {module: None for view in views for module in view.modules()}
    kept = {id(w): w for w in weights(modules)}
    names = {name for view in views for name in view.adapters or {}}
    for module in modules:
        for name, weight in module.named_parameters():
            if "lora_" in name and not names & set(name.split(".")):
                kept.pop(id(weight), None)
    return sum(w.numel() * w.element_size() for w in kept.values())


def taken(run: Callable[[], object], models: Models) -> dict[str, float]:
    """Passes, TFLOP and the bytes of what is made beside the weights, of a first run."""
    device = models.late.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        made = torch.cuda.max_memory_allocated(device) - before
    with Passes(type(models.late.denoiser)) as passes, counted() as count:
        run()
    if device.type != "cuda":
        made = count.peak
    return {"passes": passes.rows, "tflop": count.flop / 1e12, "made": made}


def compare(
    models: Models,
    noun: str,
    images: int,
    steps: int,
    size: tuple[int, int],
    rounds: int,
    blends: list[Blend] | None = None,
) -> list[dict]:
    """A row for the plain pipeline and each blend. Seconds, passes and TFLOP are of one image;
    `times` is the ratio of its seconds to plain's of the same round.
    """
    blends = [kind() for kind in BLENDS.values()] if blends is None else blends
    pairs = pairs_of(noun, images)
    runs: dict[str, Callable[[], list[Image.Image]]] = {
        PLAIN: plain(models.late, pairs, steps, size),
        **{b.name: blended(models, b, pairs, noun, steps, size) for b in blends},
    }
    first = {name: taken(run, models) for name, run in runs.items()}
    found = in_turn(runs, rounds, models.late.device)
    there = {name: held(models.early, models.late) for name in runs} | {PLAIN: held(models.late)}
    return [
        {
            "name": name,
            "seconds": spread([s / images for s in found[name]]),
            "times": over(found[name], found[PLAIN]),
            "passes": first[name]["passes"] / images,
            "tflop": first[name]["tflop"] / images,
            "gb": (there[name] + first[name]["made"]) / 1e9,
        }
        for name in runs
    ]


def table(rows: list[dict]) -> str:
    """In Markdown."""
    plain = rows[0]
    return markdown(
        [
            {
                "kind": r["name"],
                "seconds an image": f"{r['seconds']['median']:.3g}",
                "of plain": shown(r["times"]),
                "denoiser passes": f"{r['passes']:.4g}",
                "passes, of plain": f"{r['passes'] / plain['passes']:.2f}",
                "TFLOP, of plain": f"{r['tflop'] / plain['tflop']:.2f}",
                "GB": f"{r['gb']:.3g}",
                "GB, of plain": f"{r['gb'] / plain['gb']:.2f}",
            }
            for r in rows
        ]
    )
