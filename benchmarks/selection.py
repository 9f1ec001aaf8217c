"""How good is the pair that `blend.py select` picks? `python -m benchmarks.selection`: every pair
of every subject's run, against the picked one.

The rule was made with the pairs of other subjects in view, and mended once by what those of
benchmarks/plan.yaml showed (docs/results.md).
What a pair is worth is the utility of its blend's images for evaluation prompts
(`dreamblend.selection.rule.utility`), which the selection never sees: its probes are worded and
seeded apart. The regret is what the picked pair is worth less than the best of all, in shares of
the best. Runs of `benchmarks.sandbox` in the same --out are not trained again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import plan
from benchmarks.command import ask_subjects, parser
from benchmarks.record import Record
from benchmarks.tables import markdown
from benchmarks.training import bench_of, load_pair, sandbox_subject, singles, tune
from dreamblend.blending.blends import Region
from dreamblend.blending.prompts import read_shard
from dreamblend.cli import entry
from dreamblend.evaluation.bench import means
from dreamblend.evaluation.outcome import said
from dreamblend.evaluation.statistics import estimate
from dreamblend.report.text import interval, number
from dreamblend.sandbox import world
from dreamblend.selection.command import picked, select
from dreamblend.selection.rule import utility
from dreamblend.storage.files import save_text

PLAN = plan.read()
MADE_WITH = (*PLAN.chosen_on, *PLAN.seen_by_rule)


def search(name: str, seeds: list[int], sampling: int, out: Path) -> Record:
    """Every pair's means for one subject, and the picked pair. What is there is not
    measured again.
    """
    subject, full = sandbox_subject(name, out / "photos" / name, PLAN.prompts_of), PLAN.methods[0]
    run = tune(PLAN.base, full, subject, PLAN.steps, out / "runs" / name / full.name)
    settings = {"seeds": seeds, "sampling": sampling}
    record = Record(out / "selection" / f"{name}.json", settings, singles=[], pairs={})
    bench = bench_of(subject, seeds, sampling)
    if not record["singles"]:
        record["singles"] = list(singles(bench, PLAN.base, run).values())
    for early, late in tqdm(list(combinations(PLAN.steps, 2)), desc=f"{name}: pairs"):
        if (of := f"{early} {late}") not in record["pairs"]:
            pair = load_pair(run, (early, late), PLAN.base)
            drawn = bench.blends({"region": Region()}, pair)
            record["pairs"][of] = means(drawn["region"])
            record.save()
    select(run, num_inference_steps=sampling)  # measures nothing twice
    record["picked"] = list(picked(run))
    record.save()
    return record


def worths(record: dict) -> dict[str, float]:
    """The utility of every pair."""
    base, *singles = record["singles"]
    return {name: utility(row, base, singles) for name, row in record["pairs"].items()}


def judged(subject: str, record: dict) -> dict:
    """The picked pair against the best one."""
    worth = worths(record)
    best, found = max(worth, key=worth.__getitem__), " ".join(map(str, record["picked"]))
    base, *singles = record["singles"]
    return {
        "kind": subject,
        "picked": found,
        "worth": worth[found],
        "best": best,
        "its worth": worth[best],
        "regret": 1 - worth[found] / worth[best],
        "best snapshot": max(utility(row, base, singles) for row in singles),
        "mean pair": float(np.mean(list(worth.values()))),
    }


def beside(records: list[dict], rows: list[dict]) -> dict[str, float]:
    """Mean regrets of what is not picked: of one pair for all, the best one for these subjects, and
    of the two last columns. All but the mean pair are known afterwards only.
    """
    best = [row["its worth"] for row in rows]

    def regret(values: Iterable[float]) -> float:
        return float(np.mean([1 - value / top for value, top in zip(values, best)]))

    all_of = [worths(record) for record in records]
    of_pairs = {name: regret(worth[name] for worth in all_of) for name in all_of[0]}
    same = min(of_pairs, key=of_pairs.__getitem__)
    return {
        f"{same} for all": of_pairs[same],
        **{name: regret(row[name] for row in rows) for name in ("best snapshot", "mean pair")},
    }


@entry
def main() -> None:
    asked = parser(__doc__, Path("runs/sandbox"))
    ask_subjects(asked, PLAN.subjects, world.SUBJECTS)
    asked.add_argument("--seeds", type=int, default=1)
    asked.add_argument(
        "--shard", help="I/N: search for every N-th subject from the I-th on, and no more"
    )
    args = asked.parse_args()
    subjects = args.subjects[read_shard(args.shard, "--shard")] if args.shard else args.subjects
    found = {
        subject: search(subject, list(range(args.seeds)), args.sampling, args.out)
        for subject in subjects
    }
    if args.shard:
        return
    rows = [judged(subject, record) for subject, record in found.items()]
    print("\n" + markdown(rows))
    for name, names in (("that the rule was made with", MADE_WITH), ("of the plan", PLAN.subjects)):
        part = [row for row in rows if row["kind"] in names]
        if part:
            regret = said(estimate([row["regret"] for row in part]))
            print(
                f"mean regret, {len(part)} subjects {name}: {number(regret['value'])}, 95 %"
                f" {interval(regret)}"
            )
    others = beside([found[row["kind"]] for row in rows], rows)
    print("beside it: " + ", ".join(f"{name} {number(of)}" for name, of in others.items()))
    said_of_all = {"rows": rows, "beside": others, "seeds": args.seeds, "sampling": args.sampling}
    save_text(
        json.dumps(said_of_all, indent=1),
        args.out / "selection.json",
    )
    print(f"results are in {args.out / 'selection.json'}")


if __name__ == "__main__":
    main()
