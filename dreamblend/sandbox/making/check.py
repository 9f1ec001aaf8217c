"""Is the sandbox true enough to show the effects? Measures its judges, its autoencoder, what its
bases draw, and what their attention means.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dreamblend.attention.recording import record
from dreamblend.attention.words import token_table, word_maps
from dreamblend.evaluation.diagnosis import TIMES
from dreamblend.models import SHIPPED, Backbone, load_backbone
from dreamblend.sampling import initial_noise, sample_plain
from dreamblend.sandbox import world
from dreamblend.sandbox.judges import PartsJudge, PromptJudge, SubjectJudge, claims, load_judge
from dreamblend.sandbox.making.judges import losing
from dreamblend.sandbox.making.recipe import WEIGHTS
from dreamblend.storage.photos import to_pixels
from dreamblend.training.objective import add_noise

Bounds = dict[str, tuple[float, bool]]  # measure -> (bound, whether it is a lower one)
DRAWN: Bounds = {
    "place": (1.00, True),
    "noun": (0.97, True),
    "colour": (0.95, True),
    "pairs_noun": (0.85, True),
}
# What the sandbox must reach, by what is measured: the judges, the autoencoder, and each base.
BOUNDS: dict[str, Bounds] = {
    "judges": dict.fromkeys(("place", "colour", "noun", "instance", "part"), (0.97, True)),
    "autoencoder": dict.fromkeys(("photos_kept", "parts_kept"), (0.95, True)),
    "sandbox": {
        **DRAWN,
        "noun_on_an_object": (0.90, True),
        "noun_on_its_own": (0.85, True),
        "place_outside": (0.95, True),
        "map_correlation": (0.3, False),
    },
    "sandbox-dit": {**DRAWN, "noun": (0.85, True)},  # nothing grounds its maps
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
def kept(base: Backbone, subject: SubjectJudge, parts: PartsJudge) -> dict[str, float]:
    """What the autoencoder leaves of the subjects, means over them. `photos_kept`: likeness of
    photos, encoded and decoded, to a subject's other photos, over that of the photos themselves. No
    snapshot can look more like its subject than this allows. `parts_kept`: how likely the parts
    that stand out are held to be there.
    """
    shares, there = [], []
    for name, look in world.SUBJECTS.items():
        pixels = to_pixels(world.photos(name))
        again = base.decode(base.encode(pixels)[0]).clamp(-1, 1)
        real, decoded = subject(pixels), subject(again)
        others = ~torch.eye(len(pixels), dtype=torch.bool)
        shares.append(((decoded @ real.T)[others].mean() / (real @ real.T)[others].mean()).item())
        there.append(parts.parts(again, look.noun).mean().item())
    return {"photos_kept": float(np.mean(shares)), "parts_kept": float(np.mean(there))}


@torch.no_grad()
def draw(base: Backbone, prompts: list[str], batch: int = 32) -> Tensor:
    """Pixels (prompts, 3, 128, 128) of each prompt, from the seeds 0, 1, 2 and so on."""
    out = []
    for i in tqdm(range(0, len(prompts), batch), desc="drawing"):
        some = prompts[i : i + batch]
        latents = sample_plain(base, some, list(range(i, i + len(some))), 25, 4.0)
        out.append(base.decode(latents).clamp(-1, 1))
    return torch.cat(out)


@torch.no_grad()
def attention(base: Backbone, rng: Random, scenes: int = 200) -> dict[str, float]:
    """Where the words' maps lie on two-object renders with known masks, at the sites and noise
    levels that are read by default.
    """
    grid, levels = base.default_grid(), base.training_noise()
    sites, found = base.sites(grid), defaultdict(list)
    for index in tqdm(range(scenes), desc="attention"):
        scene = world.random_scene(rng, things=2, extras=False)
        image, masks = world.render(scene)
        captioned = world.caption(rng, scene, plain=True)
        text = captioned.text
        # the share of each cell that a thing covers
        cells = F.adaptive_avg_pool2d(torch.from_numpy(masks).float(), grid).flatten(1)
        z, encoded = base.encode(to_pixels([image]))[0], base.encode_prompts([text])
        noise = initial_noise(base.latent_shape, [index])
        tokens, words = token_table(base, [text])
        spans = base.spans(text)
        owners = [captioned.owners[text.split().index(s.word)] for s in spans]
        nouns = {
            i: o
            for i, (s, o) in enumerate(zip(spans, owners))
            if s.word in world.SHAPES and o is not None
        }
        place = max(i for i, owner in enumerate(owners) if owner == -1)  # its last word
        for share in TIMES:
            level = torch.tensor([levels.at(share)])
            noisy = add_noise(z, noise, levels.alpha[level], levels.sigma[level])
            with record(base.denoiser, sites, tokens, mean_heads=True, stop_at_last=True) as maps:
                base.denoise(noisy, levels.timestep(level), encoded)
            own = word_maps(maps, words)[0]
            for i, owner in nouns.items():
                found["noun_on_an_object"].append(float(cells[:, own[i].argmax()].sum() > 0.25))
                density = [(own[i] * c).sum() / c.sum() for c in cells]
                found["noun_on_its_own"].append(float(density[owner] > density[1 - owner]))
            found["place_outside"].append(float(cells[:, own[place].argmax()].sum() < 0.5))
            correlation = torch.corrcoef(own[[*nouns, place]])
            apart = ~torch.eye(len(correlation), dtype=torch.bool)
            found["map_correlation"].append(correlation[apart].mean().item())
    return {k: float(np.mean(v)) for k, v in found.items()}


def check_judges(
    prompt: PromptJudge, subject: SubjectJudge, parts: PartsJudge, renders: int = 1000
) -> dict[str, float]:
    """The judges on scenes that no training stage has seen (seed 1000); `pairs_` are of two
    things.
    """
    rng, result = Random(1000), dict[str, float]()
    for kind, things in (("", 1), ("pairs_", 2)):
        scenes = [world.random_scene(rng, things=things) for _ in range(renders)]
        texts = [world.caption(rng, s, plain=True).text for s in scenes]
        pixels = to_pixels([world.render(s)[0] for s in scenes])
        result |= {f"{kind}{k}": v for k, v in judged_claims(prompt, pixels, texts).items()}
    result["instance"] = retrieval(subject, rng)
    result["part"], each = parts_told(parts, rng, renders)
    return result | each


def check_base(
    base: Backbone, prompt: PromptJudge, parts: PartsJudge, prompts: int = 200
) -> dict[str, float]:
    """What a base draws of prompts that no training stage has seen, two seeds each, and where its
    words' maps lie. Plain prompts are of one thing, `pairs_` of two, `hard_` have things worn and
    held and unusual views.
    """
    rng, result = Random(1001), dict[str, float]()
    for kind, things, extras, count in (
        ("", 1, False, prompts),
        ("pairs_", 2, False, prompts // 4),
        ("hard_", 1, True, prompts // 4),
    ):
        scenes: list[world.Scene] = []
        while len(scenes) < count:
            scene = world.random_scene(rng, things=things, extras=extras)
            if not extras or scene.view or scene.things[0].wears or scene.things[0].holds:
                scenes.append(scene)
        texts = [world.caption(rng, scene, plain=True).text for scene in scenes] * 2
        pixels = draw(base, texts)
        result |= {f"{kind}{k}": v for k, v in judged_claims(prompt, pixels, texts).items()}
        if not kind:
            nouns = [scene.things[0].look.noun for scene in scenes * 2]
            there = [parts.parts(image[None], n).mean().item() for image, n in zip(pixels, nouns)]
            result["parts"] = float(np.mean(there))
    return result | attention(base, rng, prompts)


def check(
    weights: Path = WEIGHTS, prompts: int = 200, renders: int = 1000
) -> dict[str, dict[str, float]]:
    """Every measure of BOUNDS, and more, of what the recipe made; of the bases that are there."""
    judges = weights / "judges"
    prompt, subject = load_judge(PromptJudge, judges), load_judge(SubjectJudge, judges)
    parts = load_judge(PartsJudge, judges)
    result = {"judges": check_judges(prompt, subject, parts, renders)}
    for name, shipped in SHIPPED.items():
        folder = weights / shipped.folder.name
        if not (folder / "model_index.json").is_file():
            continue
        base = load_backbone(str(folder))
        if "autoencoder" not in result:  # one serves both bases
            result["autoencoder"] = kept(base, subject, parts)
        result[name] = check_base(base, prompt, parts, prompts)
    return result


def table(result: dict[str, dict[str, float]]) -> str:
    """What was measured, as text."""
    lines: list[str] = []
    for of, measured in result.items():
        lines += ["", of]
        for name, value in measured.items():
            line = f"  {name:20} {value:.3f}"
            if name in BOUNDS.get(of, {}):
                bound, lower = BOUNDS[of][name]
                ok = value >= bound if lower else value <= bound
                line += f"  {'>=' if lower else '<='} {bound}  {'ok' if ok else 'MISSED'}"
            lines.append(line)
    return "\n".join(lines[1:])
