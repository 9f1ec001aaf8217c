"""Do the paper's effects show? `python -m benchmarks.orderings`: tune subjects, score every
snapshot and the blends.

Reports, for each subject and on average, subject fidelity, prompt fidelity and diversity of every
snapshot and of each blend, the collapse measures over the steps, and by how much each blend lies
above the snapshots' own trade-off: its prompt fidelity minus that of the snapshots at the same
subject fidelity (`dreamblend.evaluation.statistics.above`).
"""

from __future__ import annotations

import argparse
import json
from operator import itemgetter
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from benchmarks.training import IDENTIFIER, places, render_photos, tune
from dreamblend.blending.blends import CAG, Merge, Region, Score, Switch
from dreamblend.blending.pair import Models, Pair
from dreamblend.cli import entry
from dreamblend.evaluation.bench import Bench, means
from dreamblend.evaluation.diagnosis import diagnose
from dreamblend.evaluation.scores import table
from dreamblend.evaluation.statistics import above
from dreamblend.models import load_backbone
from dreamblend.sandbox import world
from dreamblend.storage import snapshots
from dreamblend.storage.files import save_text
from dreamblend.tuning import Full, LoRA, restore

STEPS = [10, 25, 50, 100, 200, 300, 400, 600]
METHODS = {
    "full": Full,
    "full+text": lambda: Full(text_encoder=True),
    "lora": lambda: LoRA(rank=16),
}


def study(
    subject: str, method: str, base: str, rate: float, early: int, late: int, seeds: int, out: Path
) -> dict:
    """Every snapshot alone, the blends of (early, late), and the collapse curve of one subject."""
    noun = world.SUBJECTS[subject].noun
    photos = render_photos(subject, out / subject / "photos")
    run = tune(base, METHODS[method](), rate, photos, noun, STEPS, out / subject / method)
    backbone = load_backbone(base)
    bench = Bench(photos, IDENTIFIER, noun, places(noun), list(range(seeds)))
    found = [snapshots.read(path) for _, path in snapshots.find(run)]
    rows = [{"kind": "base", **means(bench.single(backbone))}]
    for snapshot in tqdm(found, desc=subject):
        rows.append(
            {"kind": snapshot.name, **means(bench.single(restore(snapshot, backbone, "single")))}
        )
        backbone.forget("single")
    singles = list(rows)
    trade = itemgetter("subject", "prompt_fidelity")
    pair = Models.load(Pair.find(run, str(early), str(late)), base)
    blends = {
        blend.name: blend for blend in (Region(weight=1.0), CAG(), Switch(), Merge(), Score())
    }
    for name, drawn in bench.blends(blends, pair).items():
        row = {"kind": name, **means(drawn)}
        rows.append(
            {**row, "above": float(above(trade(row), [trade(single) for single in singles]))}
        )
    curve = diagnose(
        load_backbone(base), found, bench.prompts, IDENTIFIER, noun, backbone.default_grid()
    )
    return {"subject": subject, "rows": [{"above": None, **row} for row in rows], "collapse": curve}


@entry
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--subjects",
        nargs="+",
        default=["navy_cat", "coral_robot", "pink_teapot"],
        choices=sorted(world.SUBJECTS),
        metavar="NAME",
    )
    parser.add_argument("--method", default="full+text", choices=METHODS)
    parser.add_argument("--base", default="sandbox")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--early", type=int, default=50)
    parser.add_argument("--late", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/orderings"))
    args = parser.parse_args()
    results = []
    for subject in args.subjects:
        path = args.out / subject / f"{args.method}-{args.early}-{args.late}.json"
        if path.exists():
            results.append(json.loads(path.read_text()))
        else:
            results.append(
                study(
                    subject,
                    args.method,
                    args.base,
                    args.rate,
                    args.early,
                    args.late,
                    args.seeds,
                    args.out,
                )
            )
            save_text(json.dumps(results[-1], indent=2), path)
        print(f"\n{subject}\n{table(results[-1]['rows'])}")
        print(
            table(
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
        table(
            [
                {"kind": kind, **{n: mean(v) if (v := gather(kind, n)) else None for n in names}}
                for kind in kinds
            ]
        )
    )
    print(f"\nresults are in {args.out}")


if __name__ == "__main__":
    main()
