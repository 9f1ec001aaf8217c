"""What the blends' settings do: `python -m benchmarks.guidance`, on the two subjects that settings
are chosen on and no other, by the prompts that the plan has for it.

CAG over its strength, window and sites, Region over its edge, growth, weight, guidance and sites,
and the published samplers, with an early snapshot and a late one at every stage of the run. A row
says the mean over the subjects' images of subject and prompt fidelity, diversity and the subject's
parts, the utility of `dreamblend.selection`, and, of CAG, how far guidance brings the maps'
distance down from that of the unguided late snapshot: where that is near 1, guidance no longer
works. --plan names the plan of another base.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from benchmarks import plan
from benchmarks.command import ask_subjects, parser
from benchmarks.record import Record
from benchmarks.tables import markdown
from benchmarks.training import bench_of, load_pair, sandbox_subject, singles, tune
from dreamblend.blending.blends import (
    CAG,
    Autoguidance,
    Blend,
    Masked,
    Personalization,
    Region,
    Reward,
    Similarity,
)
from dreamblend.cli import entry
from dreamblend.evaluation.bench import means
from dreamblend.models import load_backbone
from dreamblend.selection.utility import Utility
from dreamblend.storage.files import save_text

UNGUIDED = 1e-6  # a strength that measures the distance and moves nothing
LATE = (100, 200, 400)
COARSE, FINE = 8, 16  # sides of the sandbox's sites
SETTINGS: dict[str, tuple[Blend, int]] = {
    **{f"cag strength {s}": (CAG(s), COARSE) for s in (UNGUIDED, 0.2, 0.5, 1.0, 2.0)},
    **{f"cag window 0-{w}": (CAG(0.5, (0.0, w)), COARSE) for w in (0.3, 1.0)},
    "cag window 0.3-1.0": (CAG(0.5, (0.3, 1.0)), COARSE),
    "cag repeats 3": (CAG(0.5, repeats=3), COARSE),
    "cag 16 x 16": (CAG(0.5), FINE),
    **{f"region edge {e}": (Region(e), COARSE) for e in (0.1, 0.2, 0.5, 1.0)},
    **{f"region grow {g}": (Region(grow=g), COARSE) for g in (0, 2)},
    **{f"region weight {w}": (Region(weight=w), COARSE) for w in (0.6, 1.0, 1.6, 2.0)},
    **{f"region asked {a}": (Region(asked=a), COARSE) for a in (0.5, 1.0)},
    **{f"region margin {m}": (Region(margin=m), COARSE) for m in (0.1, 0.2, 0.4, 1.0)},
    "region 16 x 16": (Region(), FINE),
    **{f"personalization {w}": (Personalization(w), COARSE) for w in (0.3, 0.5, 0.7)},
    "personalization early": (Personalization(start="early"), COARSE),
    **{f"autoguidance {w}": (Autoguidance(w), COARSE) for w in (1.3, 1.5, 2.0)},
    **{f"reward {w}": (Reward(w), COARSE) for w in (1.0, 2.0, 3.0)},
    **{f"masked share {s}": (Masked(share=s), COARSE) for s in (0.5, 1.0)},
    "masked quantile 0.5": (Masked(quantile=0.5), COARSE),
    **{f"similarity {t}": (Similarity(2, t, 1.0), COARSE) for t in (0.03, 0.1, 0.3)},
}


def settings_of(base: str) -> dict[str, tuple[Blend, int]]:
    """SETTINGS of the sites that a base has."""
    there = {site.height for site in load_backbone(base).sites().values()}
    return {name: (blend, grid) for name, (blend, grid) in SETTINGS.items() if grid in there}


def sweep(
    name: str, planned: plan.Plan, early: int, seeds: list[int], sampling: int, out: Path
) -> Record:
    """late step -> setting -> means, and the snapshots' own means by step (base is 0), of one
    subject. What is there is not measured again.
    """
    subject = sandbox_subject(name, out / "photos" / name, planned.chosen_by_prompts_of)
    base, full, wanted = planned.base, planned.methods[0], settings_of(planned.base)
    run = tune(base, full, subject, planned.steps, out / "runs" / name / full.name)
    settings = {"base": base, "early": early, "seeds": seeds, "sampling": sampling}
    record = Record(out / "guidance" / f"{name}.json", settings, singles={}, blends={})
    benches = {
        grid: bench_of(subject, seeds, sampling, grid=grid)
        for grid in {grid for _, grid in wanted.values()}
    }
    if not record["singles"]:
        alone = singles(benches[COARSE], base, run)
        record["singles"] = {str(step): row for step, row in alone.items()}
    for late in (step for step in LATE if step > early):
        of = record["blends"].setdefault(str(late), {})
        missing = {name: setting for name, setting in wanted.items() if name not in of}
        pair = load_pair(run, (early, late), base) if missing else None
        for grid in {grid for _, grid in missing.values()}:
            blends = {name: blend for name, (blend, at) in missing.items() if at == grid}
            # one reference serves them all
            for setting, rows in benches[grid].blends(blends, pair).items():
                of[setting] = means(rows)
            record.save()
    return record


def rows(found: list[dict], late: str) -> list[dict]:
    """A table's rows for one late step, means over subjects."""

    def over(values):
        return mean(values) if all(v is not None for v in values) else None

    lines = [{"kind": f"snapshot {late}", "of": [said["singles"][late] for said in found]}]
    lines += [
        {"kind": name, "of": [said["blends"][late][name] for said in found]}
        for name in SETTINGS
        if name in found[0]["blends"][late]
    ]
    apart = [said["blends"][late][f"cag strength {UNGUIDED}"]["distance"] for said in found]
    out = []
    for line in lines:
        worth = []
        for said, of in zip(found, line["of"]):
            base, *singles = said["singles"].values()
            worth.append(Utility(base, singles)(of))
        measured = {
            name: over([of[name] for of in line["of"]])
            for name in ("subject", "prompt_fidelity", "diversity", "parts")
        }
        share = over(
            [
                None if of["distance"] is None else of["distance"] / d
                for of, d in zip(line["of"], apart)
            ]
        )
        out.append(
            {
                "kind": line["kind"],
                **measured,
                "utility": mean(worth),
                "distance left": None if "16 x 16" in line["kind"] else share,
            }
        )
    return out


@entry
def main() -> None:
    planned, parent = plan.named()
    asked = parser(__doc__, Path("runs/sandbox"), parents=[parent])
    ask_subjects(asked, planned.chosen_on, planned.chosen_on)
    asked.add_argument("--early", type=int, default=planned.steps[0], choices=planned.steps[:-1])
    asked.add_argument("--seeds", type=int, default=2)
    args = asked.parse_args()
    found = [
        sweep(subject, planned, args.early, list(range(args.seeds)), args.sampling, args.out)
        for subject in args.subjects
    ]
    tables = "\n\n".join(
        f"early {args.early}, late {late}; means of {', '.join(args.subjects)}\n\n"
        f"{markdown(rows(found, late))}"
        for late in found[0]["blends"]
    )
    folder = args.out / "guidance"
    save_text(tables + "\n", folder / "tables.md")
    print(f"\n{tables}\n\nresults are in {folder}")


if __name__ == "__main__":
    main()
