"""How good is the pair that `blend.py select` picks? `python -m benchmarks.selection`: every pair
of every subject's run, against the picked one.

The rule was made with the pairs of other subjects in view, and mended once by what those of
benchmarks/plan.yaml showed (docs/results.md).
What a pair is worth is the utility of its blend's images for evaluation prompts
(`dreamblend.selection.utility`), which the selection never sees: its probes are worded and seeded
apart. The regret is what the picked pair is worth less than the best of all, in shares of the best;
by the images that choose the best one, and, with two seeds or more, by those of other seeds. Runs
of `benchmarks.sandbox` in the same --out are not trained again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

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
from dreamblend.selection.utility import Utility
from dreamblend.storage.files import save_text

PLAN = plan.read()
MADE_WITH = (*PLAN.chosen_on, *PLAN.seen_by_rule)
APART = "regret, best of another seed"


def search(name: str, seeds: list[int], sampling: int, out: Path) -> dict:
    """Every pair's means for one subject, seed by seed, and the picked pair. What is there is not
    measured again; other seeds that are there do not count.
    """
    subject, full = sandbox_subject(name, out / "photos" / name, PLAN.prompts_of), PLAN.methods[0]
    run = tune(PLAN.base, full, subject, PLAN.steps, out / "runs" / name / full.name)
    record = Record(out / "selection" / f"{name}.json", {"sampling": sampling}, seeds={})
    benches = {str(seed): bench_of(subject, [seed], sampling) for seed in seeds}
    found = {
        seed: record["seeds"].setdefault(seed, {"singles": [], "pairs": {}}) for seed in benches
    }
    for seed, bench in benches.items():
        if not found[seed]["singles"]:
            found[seed]["singles"] = list(singles(bench, PLAN.base, run).values())
    for early, late in tqdm(list(combinations(PLAN.steps, 2)), desc=f"{name}: pairs"):
        of = f"{early} {late}"
        if lacking := [seed for seed in benches if of not in found[seed]["pairs"]]:
            pair = load_pair(run, (early, late), PLAN.base)
            for seed in lacking:
                drawn = benches[seed].blends({"region": Region()}, pair)
                found[seed]["pairs"][of] = means(drawn["region"])
            record.save()
    select(run, num_inference_steps=sampling)  # measures nothing twice
    record["picked"] = list(picked(run))
    record.save()
    return record | {"seeds": found}


def worths(record: dict, seeds: Iterable[str]) -> tuple[dict[str, float], list[float]]:
    """The utility of every pair and of every snapshot alone, in these seeds' images."""
    parts = [record["seeds"][seed] for seed in seeds]
    base, *alone = map(means, zip(*(part["singles"] for part in parts)))
    pairs = {name: means(part["pairs"][name] for part in parts) for name in parts[0]["pairs"]}
    utility = Utility(base, alone)
    return {name: utility(row) for name, row in pairs.items()}, [utility(row) for row in alone]


def judged(subject: str, record: dict) -> dict:
    """The picked pair against the best one."""
    seeds, found = list(record["seeds"]), " ".join(map(str, record["picked"]))
    worth, alone = worths(record, seeds)
    best = max(worth, key=worth.__getitem__)
    row = {
        "kind": subject,
        "picked": found,
        "worth": worth[found],
        "best": best,
        "its worth": worth[best],
        "regret": 1 - worth[found] / worth[best],
        "best snapshot": max(alone),
        "mean pair": fmean(worth.values()),
    }
    return row | {APART: apart(record, found)} if len(seeds) > 1 else row


def apart(record: dict, found: str) -> float:
    """The regret where the best pair of one seed's images is judged by the others', the mean over
    seeds. The best of many that are judged by the same images owes part of its worth to chance, so
    that regret is too large; the best of one seed's may not be the best, so this one is too small.
    """
    regrets = []
    for seed in record["seeds"]:
        there, _ = worths(record, [seed])
        best = max(there, key=there.__getitem__)
        others, _ = worths(record, [other for other in record["seeds"] if other != seed])
        regrets.append(1 - others[found] / others[best])
    return fmean(regrets)


def beside(found: Sequence[dict], rows: list[dict]) -> dict[str, float]:
    """Mean regrets of what is not picked: of one pair for all, the best one for these subjects, and
    of the two last columns. All but the mean pair are known afterwards only.
    """
    best = [row["its worth"] for row in rows]

    def regret(values: Iterable[float]) -> float:
        return fmean(1 - value / top for value, top in zip(values, best))

    all_of = [worths(record, record["seeds"])[0] for record in found]
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
    asked.add_argument("--seeds", type=int, default=2)
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
        for kind in ("regret", APART) if part else ():
            if kind in part[0]:
                regret = said(estimate([row[kind] for row in part]))
                print(
                    f"mean {kind}, {len(part)} subjects {name}: {number(regret['value'])}, 95 %"
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
