"""Every method and every blend on the sandbox: `python -m benchmarks.sandbox`, hours on two cores;
interrupted, the same command goes on.

Eight subjects that no setting was chosen on, 20 prompts each (places, recolouring, accessories,
second objects) with 4 seeds. DreamBooth (full), LoRA, Custom Diffusion, Textual Inversion and
T-LoRA, each as a dense sweep of its snapshots; for full and LoRA the blends of one pair over their
dials.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from benchmarks.command import ask_subjects, carry_out, study_parser
from benchmarks.study import Study
from benchmarks.training import IDENTIFIER, Recipe, sandbox_subject
from dreamblend.blending.blends import CAG, Merge, Region, Score, Switch
from dreamblend.cli import entry
from dreamblend.sandbox import world
from dreamblend.tuning import CustomDiffusion, Full, LoRA, TextualInversion, TLoRA

CHOSEN_ON = ("teal_mug", "olive_backpack")  # settings were: they are never measured here
SUBJECTS = (
    "pink_teapot",
    "lilac_vase",
    "mint_lamp",
    "brown_boot",
    "navy_cat",
    "coral_robot",
    "turquoise_car",
    "salmon_duck",
)
STEPS = (25, 50, 100, 200, 400)
BLENDS = (
    Region(weight=1.0),
    Region(),
    CAG(0.3),
    CAG(1.0),
    Switch(0.2),
    Switch(0.4),
    Merge(0.6),
    Score(0.6),
)
# to three settings each: with the base and the pair as many points as the snapshots' sweep, so that
# hypervolumes are of one footing
MORE = (
    Region(weight=1.6),
    CAG(0.5, repeats=3),
    Switch(0.6),
    Merge(0.3),
    Merge(0.8),
    Score(0.3),
    Score(1.3),
)
RECIPES = (
    Recipe("full", lambda: Full(text_encoder=True), 5e-4, (25, 200), BLENDS + MORE),
    Recipe("lora", lambda: LoRA(rank=16), 2e-3, (25, 400), BLENDS),
    Recipe("t-lora", lambda: TLoRA(rank=16, min_rank=8), 2e-3),
    Recipe("custom-diffusion", CustomDiffusion, 1e-3, priors=40),
    Recipe("textual-inversion", lambda: TextualInversion(vectors=2), 5e-3),
)


def prompts(noun: str) -> tuple[str, ...]:
    """20 prompts of a class: each place where it was not photographed, four colours, three
    accessories, three second objects.
    """
    places = [place for place in world.PLACES if place not in world.HOME_PLACES]
    rng = Random(f"benchmark {noun}")
    colours, others = rng.sample(list(world.COLOURS), 4), rng.sample(list(world.COLOURS), 3)
    somewhere = [rng.sample(places, 4) for _ in range(3)]
    own = f"{IDENTIFIER} {noun}"

    def article(word):
        return "an" if word[0] in "aeiou" else "a"

    return (
        *(f"a {own} {place}" for place in places),
        *(
            f"{article(colour)} {colour} {own} {place}"
            for colour, place in zip(colours, somewhere[0])
        ),
        *(
            f"a {own} wearing a {thing} {place}"
            for thing, place in zip(world.WEARABLES, somewhere[1])
        ),
        *(
            f"a {own} next to {article(colour)} {colour} {thing} {place}"
            for colour, thing, place in zip(others, (*world.PROPS, *world.PROPS), somewhere[2])
        ),
    )


@entry
def main() -> None:
    asked = study_parser(
        __doc__, [r.name for r in RECIPES], prompts=20, sampling=6, out=Path("runs/sandbox")
    )
    ask_subjects(asked, SUBJECTS, set(world.SUBJECTS) - set(CHOSEN_ON))
    asked.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=STEPS,
        help=(
            "snapshots; the first and the last are blended where a method's own pair is not among"
            " them"
        ),
    )
    args = asked.parse_args()
    subjects = tuple(
        sandbox_subject(
            name, args.out / "photos" / name, lambda noun: prompts(noun)[: args.prompts]
        )
        for name in args.subjects
    )
    steps = tuple(args.steps)
    recipes = tuple(r.within(steps) for r in RECIPES if r.name in args.methods)
    study = Study(
        "sandbox",
        args.out,
        "sandbox",
        subjects,
        recipes,
        steps,
        tuple(range(args.seeds)),
        "sandbox",
        args.sampling,
        dtype=args.dtype,
    )
    carry_out(study, args, "benchmarks.sandbox")


if __name__ == "__main__":
    main()
