"""Do the paper's effects show? `python -m benchmarks.orderings`: tune subjects, score every
snapshot and the blends.

Reports, for each subject and on average, subject fidelity, prompt fidelity and diversity of every
snapshot and of each blend, the collapse measures over the steps, and by how much each blend lies
above the snapshots' own trade-off: its prompt fidelity minus that of the snapshots at the same
subject fidelity (`dreamblend.evaluation.statistics.above`).
"""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from statistics import mean

from benchmarks.command import ask_subjects, parser
from benchmarks.record import Record
from benchmarks.tables import markdown
from benchmarks.training import (
    IDENTIFIER,
    Recipe,
    bench_of,
    load_pair,
    sandbox_subject,
    singles,
    tune,
)
from dreamblend.blending.blends import CAG, Merge, Region, Score, Switch
from dreamblend.cli import entry
from dreamblend.evaluation.bench import means
from dreamblend.evaluation.diagnosis import diagnose
from dreamblend.evaluation.statistics import above
from dreamblend.models import load_backbone
from dreamblend.sandbox import world
from dreamblend.storage import snapshots
from dreamblend.tuning import Full, LoRA

STEPS = [10, 25, 50, 100, 200, 300, 400, 600]
METHODS = {
    "full": Full,
    "full+text": lambda: Full(text_encoder=True),
    "lora": lambda: LoRA(rank=16),
}


def study(
    name: str,
    recipe: Recipe,
    base: str,
    early: int,
    late: int,
    seeds: list[int],
    sampling: int,
    out: Path,
) -> Record:
    """Every snapshot alone, the blends of (early, late), and the collapse curve of one subject.
    What is there is not measured again.
    """
    settings = {"base": base, **recipe.settings, "seeds": seeds, "sampling": sampling}
    path = out / name / f"{recipe.name}-{early}-{late}.json"
    record = Record(path, settings, subject=name, rows=[], collapse=[])
    if record["rows"]:
        return record
    subject = sandbox_subject(name, out / name / "photos")
    run = tune(base, recipe, subject, STEPS, out / name / recipe.name)
    prompts = list(subject.prompts)
    bench = bench_of(subject, seeds, sampling)
    alone = singles(bench, base, run)
    rows = [{"above": None, "kind": str(step or "base"), **row} for step, row in alone.items()]
    trade = itemgetter("subject", "prompt_fidelity")
    pair = load_pair(run, (early, late), base)
    blends = {
        blend.name: blend for blend in (Region(weight=1.0), CAG(), Switch(), Merge(), Score())
    }
    for kind, drawn in bench.blends(blends, pair).items():
        row = means(drawn)
        higher = float(above(trade(row), [trade(single) for single in alone.values()]))
        rows.append({"above": higher, "kind": kind, **row})
    backbone = load_backbone(base)
    found = [snapshots.read(path) for _, path in snapshots.find(run)]
    record["collapse"] = diagnose(
        backbone, found, prompts, IDENTIFIER, subject.class_noun, backbone.default_grid()
    )
    record["rows"] = rows
    record.save()
    return record


@entry
def main() -> None:
    asked = parser(__doc__, Path("runs/orderings"), sampling=25)
    ask_subjects(asked, ["navy_cat", "coral_robot", "pink_teapot"], world.SUBJECTS)
    asked.add_argument("--method", default="full+text", choices=METHODS)
    asked.add_argument("--base", default="sandbox")
    asked.add_argument("--rate", type=float, default=5e-4)
    asked.add_argument("--early", type=int, default=50)
    asked.add_argument("--late", type=int, default=400)
    asked.add_argument("--seeds", type=int, default=4)
    args = asked.parse_args()
    recipe = Recipe(args.method, METHODS[args.method], args.rate)
    results = []
    for subject in args.subjects:
        results.append(
            study(
                subject,
                recipe,
                args.base,
                args.early,
                args.late,
                list(range(args.seeds)),
                args.sampling,
                args.out,
            )
        )
        print(f"\n{subject}\n{markdown(results[-1]['rows'])}")
        print(
            markdown(
                [
                    {"kind": r["name"], **{k: v for k, v in r.items() if k not in ("name", "step")}}
                    for r in results[-1]["collapse"]
                ]
            )
        )
    kinds = [row["kind"] for row in results[0]["rows"]]

    def gather(kind, name):
        return [
            v
            for r in results
            for row in r["rows"]
            if row["kind"] == kind and (v := row.get(name)) is not None
        ]

    names = [n for n in results[0]["rows"][0] if n != "kind"]
    print(f"\nmean of {len(results)} subjects")
    print(
        markdown(
            [
                {"kind": kind, **{n: mean(v) if (v := gather(kind, n)) else None for n in names}}
                for kind in kinds
            ]
        )
    )
    print(f"\nresults are in {args.out}")


if __name__ == "__main__":
    main()
