"""How long training waits for what a run keeps: its snapshots and the states it could go on from.

Lightning's profiler takes the time of every callback. A snapshot is written beside the training, so
what counts is the copying, and the waiting for a file before it; a state is waited for.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import median

import yaml
from lightning.pytorch.profilers import SimpleProfiler

from benchmarks.cost.bases import ROOT, Base
from benchmarks.cost.training import fit
from benchmarks.tables import markdown
from benchmarks.training import Subject
from dreamblend.callbacks import ResumeState, SnapshotCheckpoint
from dreamblend.callbacks.resume import wait_after

KEPT = 4  # snapshots and states of the run that is measured


def measure(base: Base, method: str, subject: Subject, out: Path) -> dict:
    """Seconds that training waits for one snapshot and for one state, of a step, and the share that
    both have in the recipe in configs/.
    """
    steps = [base.steps * (i + 1) for i in range(KEPT)]
    profiler = SimpleProfiler()
    callbacks = [SnapshotCheckpoint(steps), ResumeState(every=base.steps)]
    run = fit(base, method, subject, steps[-1], out, "saving", callbacks, profiler=profiler)
    files = (run / "snapshots").glob("*/**/*")
    size = sum(file.stat().st_size for file in files if file.is_file()) / KEPT
    shutil.rmtree(run)
    times = {name: list(each) for name, each in profiler.recorded_durations.items()}
    step = median(times["run_training_batch"][1:])
    snapshot = sum(waited(times, "SnapshotCheckpoint")) / KEPT
    state = sum(waited(times, "ResumeState")) / KEPT
    recipe = yaml.safe_load((ROOT / "configs" / f"train_{method}.yaml").read_text())
    last, snapshots = recipe["trainer"]["max_steps"], len(recipe["snapshots"]["steps"])
    states = 1 + int(last * step / wait_after(state))  # the last one is kept, too
    waits = snapshots * snapshot + states * state
    return {
        "step": step,
        "snapshot": snapshot,
        "snapshot_mb": size / 1e6,
        "state": state,
        "of_snapshots": snapshots * snapshot / (last * step + waits),
        "of_states": states * state / (last * step + waits),
    }


def waited(times: dict[str, list[float]], callback: str) -> list[float]:
    """What a callback took after each batch, and at the end."""
    hooks = (f"[Callback]{callback}.on_train_batch_end", f"[Callback]{callback}.on_train_end")
    return [seconds for hook in hooks for seconds in times.get(hook, [])]


def table(rows: list[dict]) -> str:
    """In Markdown."""
    return markdown(
        [
            {
                "kind": r["name"],
                "a step": f"{r['step']:.3g} s",
                "waits for a snapshot": f"{r['snapshot']:.3g} s",
                "MB": f"{r['snapshot_mb']:.3g}",
                "waits for a state": f"{r['state']:.3g} s",
                "snapshots, of the recipe's run": f"{r['of_snapshots']:.2%}",
                "states": f"{r['of_states']:.2%}",
            }
            for r in rows
        ]
    )
