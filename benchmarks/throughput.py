"""How much more do more processes draw? `python -m benchmarks.throughput`: images a second of
`blend.py predict` by 1 and by n processes of one thread.

Each process draws as many batches as one alone does, into its folder. The clock runs from when as
many batches are written as there are processes until the last image is: what starts up is left out,
and waiting for the slowest process is not. Quiet cores are needed, one a process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.command import parser
from benchmarks.tables import markdown
from benchmarks.training import Recipe, places, sandbox_subject, tune
from dreamblend.cli import entry
from dreamblend.errors import InputError
from dreamblend.tuning import Full

BATCH = 4  # pairs
KINDS = 3  # early, region and late of each


def measure(run: Path, processes: int, batches: int, steps: int, out: Path) -> float:
    """Images a second of so many processes, each with `batches` batches."""
    prompts = places("mug")[:BATCH]
    seeds = processes * batches * BATCH // len(prompts)
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "blend.py",
        "predict",
        "--config",
        "configs/blend.yaml",
        "--run",
        run,
        "--early",
        1,
        "--late",
        2,
        "--prompts",
        json.dumps(prompts),
        "--seeds",
        f"0-{seeds - 1}",
        "--out",
        out,
        "--model.num_inference_steps",
        steps,
        "--data.batch_size",
        BATCH,
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        processes,
        "--trainer.callbacks",
        "[]",
    ]
    done = subprocess.run(
        [*map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise InputError(
            f"blend.py ended with status {done.returncode}: {done.stderr.strip().splitlines()[-1]}"
        )
    written = sorted(path.stat().st_mtime for path in (out / "images").glob("*/*.png"))
    first = processes * BATCH * KINDS
    return (len(written) - first) / (written[-1] - written[first - 1])


@entry
def main() -> None:
    asked = parser(__doc__, Path("runs/throughput"))
    asked.add_argument("--processes", type=int, nargs="+", default=[2])
    asked.add_argument("--batches", type=int, default=12, help=f"of {BATCH} pairs, a process")
    asked.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="measurements of each, taken in turn; the fastest counts",
    )
    args = asked.parse_args()
    if args.batches < 2 or min(args.processes) < 1:
        raise InputError(
            f"--batches is {args.batches} and --processes {args.processes}: the clock needs one"
            " process and two batches of each at least"
        )
    subject = sandbox_subject("teal_mug", args.out / "photos")
    run = tune("sandbox", Recipe("full", Full, 1e-4), subject, [1, 2], args.out / "run")
    counts = [1, *(n for n in args.processes if n != 1)]
    found: dict[int, list[float]] = {n: [] for n in counts}
    for _ in range(args.repeats):
        for n in counts:
            found[n].append(measure(run, n, args.batches, args.sampling, args.out / f"of-{n}"))
    best = {n: max(rates) for n, rates in found.items()}
    rows = [
        {
            "kind": f"{n} processes",
            "images a second": best[n],
            "over one": best[n] / best[1],
            "share of n": best[n] / best[1] / n,
        }
        for n in counts
    ]
    print("\n" + markdown(rows))


if __name__ == "__main__":
    main()
