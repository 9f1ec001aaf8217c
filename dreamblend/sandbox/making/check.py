"""Is the sandbox true enough to show the effects? Measures its judges, what its base draws, and
what its attention means.
"""

from __future__ import annotations

from collections import defaultdict
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dreamblend.attention.recording import record
from dreamblend.attention.words import by_grid
from dreamblend.models import Backbone, load_backbone
from dreamblend.sampling import classifier_free, initial_noise, sample
from dreamblend.sandbox import world
from dreamblend.sandbox.judges import PromptJudge, SubjectJudge, claims, load_judges
from dreamblend.storage.photos import to_pixels

# What the sandbox must reach: measure -> (bound, whether it is a lower one).
BOUNDS = {
    "judge_place": (0.95, True),
    "judge_colour": (0.95, True),
    "judge_noun": (0.95, True),
    "judge_instance": (0.95, True),
    "photos_kept": (0.95, True),
    "base_place": (0.95, True),
    "base_noun": (0.90, True),
    "base_colour": (0.85, True),
    "noun_on_an_object": (0.90, True),
    "noun_on_its_own": (0.85, True),
    "place_outside": (0.95, True),
    "map_correlation": (0.3, False),
}


@torch.no_grad()
def judged_claims(judge: PromptJudge, pixels: Tensor, prompts: list[str]) -> dict[str, float]:
    """Zero-shot accuracy by kind of claim: how often the stated prompt beats each of its
    alternatives.
    """
    right = defaultdict(list)
    for image, prompt in zip(judge.embed_images(pixels), prompts):
        for kind, texts in claims(prompt):
            right[kind].append(
                float(judge.logits(image[None], judge.embed_texts(texts)).argmax() == 0)
            )
    return {kind: float(np.mean(values)) for kind, values in right.items()}


@torch.no_grad()
def retrieval(judge: SubjectJudge, rng: Random, trials: int = 25) -> float:
    """How often an instance is found among 16 of its class, from another photo of it."""
    hits = []
    for _ in range(trials):
        looks = [world.random_look(rng, rng.choice(world.NOUNS))]
        looks += [world.random_look(rng, looks[0].noun) for _ in range(15)]
        views = [
            judge(
                to_pixels(
                    [
                        world.render(
                            world.Scene(
                                (world.pose(rng, look),),
                                rng.choice(world.PLACES),
                                rng.getrandbits(32),
                            )
                        )[0]
                        for look in looks
                    ]
                )
            )
            for _ in range(2)
        ]
        hits += ((views[0] @ views[1].T).argmax(1) == torch.arange(16)).float().tolist()
    return float(np.mean(hits))


@torch.no_grad()
def photos_kept(base: Backbone, judge: SubjectJudge) -> float:
    """What the autoencoder leaves of the subjects: likeness of photos, encoded and decoded, to a
    subject's other photos, over that of the photos themselves; the mean over subjects. No snapshot
    can look more like its subject than this allows.
    """
    shares = []
    for subject in world.SUBJECTS:
        pixels = to_pixels(world.photos(subject))
        real, decoded = judge(pixels), judge(base.decode(base.encode(pixels)[0]).clamp(-1, 1))
        others = ~torch.eye(len(pixels), dtype=torch.bool)
        shares.append(((decoded @ real.T)[others].mean() / (real @ real.T)[others].mean()).item())
    return float(np.mean(shares))


@torch.no_grad()
def draw(
    base: Backbone,
    prompts: list[str],
    seeds: list[int],
    steps: int = 25,
    scale: float = 4.0,
    batch: int = 32,
) -> Tensor:
    """Pixels (prompts, 3, 64, 64) of each prompt from its seed."""
    out = []
    for i in tqdm(range(0, len(prompts), batch), desc="drawing"):
        some, noise = prompts[i : i + batch], initial_noise(base.latent_shape, seeds[i : i + batch])
        predict = classifier_free(
            base, base.encode_prompts(some), base.encode_prompts([""] * len(some)), scale
        )
        out.append(base.decode(sample(predict, noise, base.schedule(steps))).clamp(-1, 1))
    return torch.cat(out)


@torch.no_grad()
def attention(
    base: Backbone, rng: Random, scenes: int = 200, times: tuple[int, ...] = (300, 500, 700)
) -> dict[str, float]:
    """Where the words' maps lie on two-object renders with known masks, at the sites that guidance
    uses.
    """
    grid = base.default_grid()
    rates = defaultdict(list)
    for index in tqdm(range(scenes), desc="attention"):
        scene = world.random_scene(rng, things=2, wears=False)
        image, masks = world.render(scene)
        captioned = world.caption(rng, scene, plain=True)
        cells = F.adaptive_avg_pool2d(torch.from_numpy(masks).float(), grid).flatten(
            1
        )  # share of each cell that a thing covers
        z = base.encode(to_pixels([image]))[0]
        spans, words = base.spans(captioned.text), captioned.text.split()
        owners = [captioned.owners[words.index(s.word)] for s in spans]
        nouns = {
            s.word: o for s, o in zip(spans, owners) if s.word in world.SHAPES and o is not None
        }
        for t in times:
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(index * 1000 + t))
            noisy = base.scheduler.add_noise(z, noise, torch.tensor([t]))
            with record(base.denoiser, base.sites(grid), stop_at_last=True) as maps:
                base.denoise(noisy, torch.tensor([t]), base.encode_prompts([captioned.text]))
            mean = by_grid(maps)[0]  # (queries, tokens)
            word_maps = {s.word: mean[:, list(s.tokens)].sum(1) for s in spans}
            for noun, owner in nouns.items():
                peak = word_maps[noun].argmax()
                rates["noun_on_an_object"].append(float(cells[:, peak].sum() > 0.25))
                density = [(word_maps[noun] * c).sum() / c.sum() for c in cells]
                rates["noun_on_its_own"].append(float(density[owner] > density[1 - owner]))
            place = word_maps[spans[[i for i, o in enumerate(owners) if o == -1][-1]].word]
            rates["place_outside"].append(float(cells[:, place.argmax()].sum() < 0.5))
            chosen = torch.stack(
                [m for word, m in word_maps.items() if word in nouns or m is place]
            )
            correlation = torch.corrcoef(chosen)
            rates["map_correlation"].append(
                correlation[~torch.eye(len(chosen), dtype=torch.bool)].mean().item()
            )
    return {k: float(np.mean(v)) for k, v in rates.items()}


def check(
    base: Backbone | None = None,
    judges: tuple[PromptJudge, SubjectJudge] | None = None,
    prompts: int = 200,
    renders: int = 1000,
) -> dict[str, float]:
    """Every measure of BOUNDS, on scenes that no training stage has seen (seed 1000); `pairs_` are
    of prompts with two things.
    """
    base, rng = base or load_backbone("sandbox"), Random(1000)
    prompt_judge, subject_judge = judges or load_judges()
    scenes = [world.random_scene(rng, things=1) for _ in range(renders)]
    texts = [world.caption(rng, s, plain=True).text for s in scenes]
    result = {
        f"judge_{k}": v
        for k, v in judged_claims(
            prompt_judge, to_pixels([world.render(s)[0] for s in scenes]), texts
        ).items()
    }
    result["judge_instance"] = retrieval(subject_judge, rng)
    result["photos_kept"] = photos_kept(base, subject_judge)
    for kind, things, count in (("base", 1, prompts), ("pairs", 2, prompts // 4)):
        texts = [
            world.caption(rng, world.random_scene(rng, things=things, wears=False), plain=True).text
            for _ in range(count)
        ]
        result |= {
            f"{kind}_{k}": v
            for k, v in judged_claims(
                prompt_judge, draw(base, texts * 2, list(range(2 * count))), texts * 2
            ).items()
        }
    return result | attention(base, rng, prompts)


def table(result: dict[str, float]) -> str:
    """What was measured, as text."""
    lines = []
    for name, value in result.items():
        bound = BOUNDS.get(name)
        ok = (
            ""
            if bound is None
            else (
                f"  {'>=' if bound[1] else '<='} {bound[0]} "
                f" {'ok' if (value >= bound[0]) == bound[1] else 'MISSED'}"
            )
        )
        lines.append(f"{name:20} {value:.3f}{ok}")
    return "\n".join(lines)
