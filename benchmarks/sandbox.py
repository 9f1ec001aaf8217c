"""The benchmark of the sandbox: `python -m benchmarks.sandbox --processes 2`, hours on two cores;
interrupted, the same command goes on.

What it measures and asks was written down before it ran: benchmarks/plan.yaml, with subjects,
prompts, seeds, methods, blends and their settings, and the questions; --plan names another. Every
method is a dense sweep of its snapshots; blends are of one pair unless they say another. The
options make it smaller, to try it.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import plan
from benchmarks.command import ask_subjects, carry_out, study_parser
from benchmarks.study import Study
from benchmarks.training import sandbox_subject
from dreamblend.cli import entry
from dreamblend.evaluation.protocols import find


@entry
def main() -> None:
    planned, parent = plan.named()
    asked = study_parser(
        __doc__,
        [recipe.name for recipe in planned.methods],
        prompts=len(planned.prompts),
        sampling=planned.sampling,
        out=Path("runs/sandbox"),
        seeds=planned.seeds,
        parents=[parent],
    )
    ask_subjects(asked, planned.subjects, planned.subjects)
    asked.add_argument(
        "--steps",
        type=int,
        nargs="+",
        help="snapshots of every method; blends of pairs that are not among them are left out",
    )
    args = asked.parse_args()
    subjects = tuple(
        sandbox_subject(
            name,
            args.out / "photos" / name,
            lambda noun: planned.prompts_of(noun)[: args.prompts],
        )
        for name in args.subjects
    )
    steps = tuple(args.steps or planned.steps)
    recipes = [recipe for recipe in planned.methods if recipe.name in args.methods]
    study = Study(
        "sandbox",
        args.out,
        planned.base,
        subjects,
        tuple(recipe.within(steps) if args.steps else recipe for recipe in recipes),
        steps,
        tuple(range(args.seeds)),
        find("auto", planned.base).name,
        args.sampling,
        planned.scale,
        args.dtype,
        more={"plan": planned.about},
        questions=planned.questions,
    )
    carry_out(study, args, "benchmarks.sandbox", planned.speed)


if __name__ == "__main__":
    main()
