"""Every method and every blend on the sandbox: `python -m benchmarks.sandbox`, hours on two cores; interrupted, the same command goes on.

Eight subjects that no setting was chosen on, 20 prompts each (places, recolouring, accessories, second objects) with 4 seeds. DreamBooth
(full), LoRA, Custom Diffusion, Textual Inversion and T-LoRA, each as a dense sweep of its snapshots; for full and LoRA the blends of one
pair over their dials.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

from benchmarks.study import Recipe, Study, Subject, spread
from benchmarks.training import IDENTIFIER, render_photos
from dreamblend.blends import CAG, Merge, Region, Score, Switch
from dreamblend.cli import entry
from dreamblend.errors import InputError
from dreamblend.evaluation.scores import table
from dreamblend.report import write_comparison
from dreamblend.sandbox import world
from dreamblend.tuning import CustomDiffusion, Full, LoRA, TextualInversion, TLoRA

CHOSEN_ON = ("teal_mug", "olive_backpack")  # settings were: they are never measured here
SUBJECTS = ("pink_teapot", "lilac_vase", "mint_lamp", "brown_boot", "navy_cat", "coral_robot", "turquoise_car", "salmon_duck")
STEPS = (25, 50, 100, 200, 400)
RECIPES = (
    Recipe("full", lambda: Full(text_encoder=True), 5e-4, (50, 400)),
    Recipe("lora", lambda: LoRA(rank=16), 2e-3, (50, 400)),
    Recipe("t-lora", lambda: TLoRA(rank=16, min_rank=8), 2e-3),
    Recipe("custom-diffusion", CustomDiffusion, 1e-3, priors=40),
    Recipe("textual-inversion", lambda: TextualInversion(vectors=2), 5e-3),
)
BLENDS = (Region(.2), Region(.5), CAG(.3), CAG(1.), Switch(.4), Merge(.5), Score(.5))


def prompts(noun: str) -> tuple[str, ...]:
    """20 prompts of a class: each place where it was not photographed, four colours, three accessories, three second objects."""
    places = [place for place in world.PLACES if place not in world.HOME_PLACES]
    rng = Random(f"benchmark {noun}")
    colours, others = rng.sample(list(world.COLOURS), 4), rng.sample(list(world.COLOURS), 3)
    somewhere = [rng.sample(places, 4) for _ in range(3)]
    own = f"{IDENTIFIER} {noun}"
    article = lambda word: "an" if word[0] in "aeiou" else "a"
    return (
        *(f"a {own} {place}" for place in places),
        *(f"{article(colour)} {colour} {own} {place}" for colour, place in zip(colours, somewhere[0])),
        *(f"a {own} wearing a {thing} {place}" for thing, place in zip(world.WEARABLES, somewhere[1])),
        *(f"a {own} next to {article(colour)} {colour} {thing} {place}"
          for colour, thing, place in zip(others, (*world.PROPS, *world.PROPS), somewhere[2])),
    )


@entry
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=sorted(set(world.SUBJECTS) - set(CHOSEN_ON)), metavar="NAME")
    parser.add_argument("--methods", nargs="+", default=[r.name for r in RECIPES], choices=[r.name for r in RECIPES], metavar="NAME")
    parser.add_argument("--prompts", type=int, default=20, help="how many of the 20")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--sampling", type=int, default=8, help="denoising steps")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="snapshots; the blends take 50 and 400, or the first and the last of others")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--shard", help="I/N: do every N-th job from the I-th on, and no more")
    parser.add_argument("--out", type=Path, default=Path("runs/sandbox"))
    args = parser.parse_args()
    nouns = {name: world.SUBJECTS[name].noun for name in args.subjects}
    subjects = [Subject(name, render_photos(name, args.out / "photos" / name), noun, prompts(noun)[: args.prompts]) for name, noun in nouns.items()]
    steps = tuple(args.steps)
    recipes = [r if r.pair is None or set(r.pair) <= set(steps) else Recipe(r.name, r.tuning, r.rate, (steps[0], steps[-1])) for r in RECIPES]
    study = Study(
        "sandbox", args.out, "sandbox", tuple(subjects), tuple(r for r in recipes if r.name in args.methods), steps, BLENDS,
        tuple(range(args.seeds)), "sandbox", args.sampling, dtype=args.dtype,
    )
    if args.shard:
        study.run(read_shard(args.shard))
        return
    given = [w for k, v in vars(args).items() if k not in ("processes", "shard") for w in (f"--{k}", *(map(str, v) if isinstance(v, list | tuple) else [str(v)]))]
    spread(study, args.processes, ["benchmarks.sandbox", *given])
    if results := study.finish():
        show(results)
        print(f"\nresults are in {args.out / 'results.json'}, the report is {write_comparison(args.out).resolve()}")


def read_shard(text: str) -> tuple[int, int]:
    """I/N, from 0/N to N-1/N."""
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        i, n = 0, 0
    if not 0 <= i < n:
        raise InputError(f"--shard is {text}: write 0/4, 1/4, 2/4 or 3/4 for four processes")
    return i, n


def show(results: dict) -> None:
    """The fronts and the comparisons, as text."""
    interval = lambda row: f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}"
    fronts = sorted(results["front"], key=lambda row: -row["hypervolume"])
    print("\n" + table([{"kind": row["name"], "hypervolume": row["hypervolume"], "95 %": interval(row)} for row in fronts]))
    print("\n" + table([{"kind": f"{row['a']} over {row['b']}", "difference": row["difference"], "95 %": interval(row)} for row in results["paired"]]))


if __name__ == "__main__":
    main()
