"""Is the sandbox true enough to show the effects? Measures its judges, its autoencoder, what its
base draws, and what its attention means.
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
from dreamblend.sandbox.v2 import world
from dreamblend.sandbox.v2.judges import (
    PartsJudge,
    PromptJudge,
    SubjectJudge,
    claims,
    load_judges,
)
from dreamblend.sandbox.v2.making.judges import losing
from dreamblend.storage.photos import to_pixels

# What the sandbox must reach: measure -> (bound, whether it is a lower one).
BOUNDS = {
    "judge_place": (0.97, True),
    "judge_colour": (0.97, True),
    "judge_noun": (0.97, True),
    "judge_instance": (0.97, True),
    "judge_part": (0.97, True),
    "photos_kept": (0.95, True),
    "parts_kept": (0.95, True),
    "base_place": (1.00, True),
    "base_noun": (0.97, True),
    "base_colour": (0.95, True),
    "pairs_noun": (0.85, True),
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


def _alone(rng: Random, look: world.Look, height: tuple[float, float] = (32, 44)) -> world.Scene:
    thing = world.pose(rng, look, height=height)
    return world.Scene((thing,), rng.choice(world.PLACES), rng.getrandbits(32))


@torch.no_grad()
def retrieval(judge: SubjectJudge, rng: Random, trials: int = 25) -> float:
    """How often an instance is found among 16 of its class, from another photo of it."""
    hits = []
    for _ in range(trials):
        looks = [world.random_look(rng, rng.choice(world.NOUNS))]
        looks += [world.random_look(rng, looks[0].noun) for _ in range(15)]
        views = [
            judge(to_pixels([world.render(_alone(rng, look))[0] for look in looks]))
            for _ in range(2)
        ]
        hits += ((views[0] @ views[1].T).argmax(1) == torch.arange(16)).float().tolist()
    return float(np.mean(hits))


@torch.no_grad()
def parts_told(judge: PartsJudge, rng: Random, renders: int) -> tuple[float, dict[str, float]]:
    """How often a part is told to be there or lost, each as often: the mean over parts, and each
    part's own.
    """
    right = defaultdict(list)
    for _ in range(renders):
        look = losing(rng, world.random_look(rng, rng.choice(world.NOUNS)))
        guess = judge.parts(to_pixels([world.render(_alone(rng, look))[0]]), look.noun)[0]
        for part, p in zip(world.STANDING_OUT[look.noun], guess.tolist()):
            right[f"{look.noun} {part}"].append(float((p > 0.5) == (part not in look.lacks)))
    each = {part: float(np.mean(values)) for part, values in sorted(right.items())}
    return float(np.mean(list(each.values()))), each


@torch.no_grad()
def kept(base: Backbone, subject: SubjectJudge, parts: PartsJudge) -> tuple[float, float]:
    """What the autoencoder leaves of the subjects. First likeness: of photos, encoded and decoded,
    to a subject's other photos, over that of the photos themselves. No snapshot can look more like
    its subject than this allows. Then how likely the parts that stand out are held to be there.
    Means over subjects.
    """
    shares, there = [], []
    for name, look in world.SUBJECTS.items():
        pixels = to_pixels(world.photos(name))
        again = base.decode(base.encode(pixels)[0]).clamp(-1, 1)
        real, decoded = subject(pixels), subject(again)
        others = ~torch.eye(len(pixels), dtype=torch.bool)
        shares.append(((decoded @ real.T)[others].mean() / (real @ real.T)[others].mean()).item())
        there.append(parts.parts(again, look.noun).mean().item())
    return float(np.mean(shares)), float(np.mean(there))


@torch.no_grad()
def draw(
    base: Backbone,
    prompts: list[str],
    seeds: list[int],
    steps: int = 25,
    scale: float = 4.0,
    batch: int = 32,
) -> Tensor:
    """Pixels (prompts, 3, 128, 128) of each prompt from its seed."""
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
    found = defaultdict(list)
    for index in tqdm(range(scenes), desc="attention"):
        scene = world.random_scene(rng, things=2, extras=False)
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
            own = {s.word: mean[:, list(s.tokens)].sum(1) for s in spans}
            for noun, owner in nouns.items():
                peak = own[noun].argmax()
                found["noun_on_an_object"].append(float(cells[:, peak].sum() > 0.25))
                density = [(own[noun] * c).sum() / c.sum() for c in cells]
                found["noun_on_its_own"].append(float(density[owner] > density[1 - owner]))
            place = own[spans[[i for i, o in enumerate(owners) if o == -1][-1]].word]
            found["place_outside"].append(float(cells[:, place.argmax()].sum() < 0.5))
            chosen = torch.stack([m for word, m in own.items() if word in nouns or m is place])
            correlation = torch.corrcoef(chosen)
            found["map_correlation"].append(
                correlation[~torch.eye(len(chosen), dtype=torch.bool)].mean().item()
            )
    return {k: float(np.mean(v)) for k, v in found.items()}


def check_judges(
    judges: tuple[PromptJudge, SubjectJudge, PartsJudge], renders: int = 1000
) -> dict[str, float]:
    """The judges on scenes that no training stage has seen (seed 1000); `seen_pairs_` are of two
    things.
    """
    prompt_judge, subject_judge, parts_judge = judges
    rng = Random(1000)
    result: dict[str, float] = {}
    for kind, things in (("judge", 1), ("seen_pairs", 2)):
        scenes = [world.random_scene(rng, things=things) for _ in range(renders)]
        texts = [world.caption(rng, s, plain=True).text for s in scenes]
        pixels = to_pixels([world.render(s)[0] for s in scenes])
        found = judged_claims(prompt_judge, pixels, texts)
        result |= {f"{kind}_{k}": v for k, v in found.items()}
    result["judge_instance"] = retrieval(subject_judge, rng)
    result["judge_part"], each = parts_told(parts_judge, rng, renders)
    return result | {f"part {k}": v for k, v in each.items()}


def check(
    base: Backbone | None = None,
    judges: tuple[PromptJudge, SubjectJudge, PartsJudge] | None = None,
    prompts: int = 200,
    renders: int = 1000,
) -> dict[str, float]:
    """Every measure of BOUNDS, on scenes that no training stage has seen. `base_` are of plain
    prompts of one thing, `pairs_` of two, `hard_` with things worn and held and unusual views.
    """
    base, judges = base or load_backbone("sandbox"), judges or load_judges()
    prompt_judge, subject_judge, parts_judge = judges
    result, rng = check_judges(judges, renders), Random(1001)
    result["photos_kept"], result["parts_kept"] = kept(base, subject_judge, parts_judge)
    for kind, things, extras, count in (
        ("base", 1, False, prompts),
        ("pairs", 2, False, prompts // 4),
        ("hard", 1, True, prompts // 4),
    ):
        scenes: list[world.Scene] = []
        while len(scenes) < count:
            scene = world.random_scene(rng, things=things, extras=extras)
            if not extras or scene.view or scene.things[0].wears or scene.things[0].holds:
                scenes.append(scene)
        texts = [world.caption(rng, scene, plain=True).text for scene in scenes]
        pixels = draw(base, texts * 2, list(range(2 * count)))
        found = judged_claims(prompt_judge, pixels, texts * 2)
        result |= {f"{kind}_{k}": v for k, v in found.items()}
        if kind == "base":
            there = [
                parts_judge.parts(image[None], scene.things[0].look.noun).mean().item()
                for image, scene in zip(pixels, scenes * 2)
            ]
            result["base_parts"] = float(np.mean(there))
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


def main() -> None:
    """Measure the judges, and where there is a base, all the rest."""
    import argparse
    from pathlib import Path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="the recipe's --out")
    weights = parser.parse_args().weights
    judges = load_judges(weights / "judges")
    if (weights / "base" / "model_index.json").is_file():
        print(table(check(load_backbone(str(weights / "base")), judges)))
    else:
        print(table(check_judges(judges)))


if __name__ == "__main__":
    main()
