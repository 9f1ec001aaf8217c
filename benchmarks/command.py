"""What the benchmarks' command lines share: their options, their jobs in processes side by side,
and the end with the table and the page.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from math import isnan
from pathlib import Path

import torch

from benchmarks.study import Study
from dreamblend.blending.prompts import read_shard
from dreamblend.errors import InputError
from dreamblend.evaluation.measures import COMPARED
from dreamblend.evaluation.scores import table
from dreamblend.report import beside, write_comparison
from dreamblend.report.figures import mean


def parser(description: str, out: Path, sampling: int = 6) -> ArgumentParser:
    """A parser with what is asked of every benchmark."""
    asked = ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("--sampling", type=int, default=sampling, help="denoising steps")
    asked.add_argument("--out", type=Path, default=out)
    return asked


def ask_subjects(asked: ArgumentParser, default: Sequence[str], choices: Iterable[str]) -> None:
    """Add the option of which subjects of the sandbox."""
    asked.add_argument(
        "--subjects", nargs="+", default=default, choices=sorted(choices), metavar="NAME"
    )


def study_parser(
    description: str, methods: list[str], prompts: int, sampling: int, out: Path
) -> ArgumentParser:
    """A parser with the options of every study of many methods."""
    asked = parser(description, out, sampling)
    asked.add_argument(
        "--methods",
        nargs="+",
        default=methods,
        choices=methods,
        metavar="NAME",
        help=", ".join(methods),
    )
    asked.add_argument("--prompts", type=int, default=prompts, help=f"how many of the {prompts}")
    asked.add_argument("--seeds", type=int, default=4, help="images of each prompt")
    asked.add_argument(
        "--dtype", default="bf16" if torch.cuda.is_available() else "fp32", choices=("fp32", "bf16")
    )
    asked.add_argument(
        "--processes",
        type=int,
        default=1,
        help="how many work side by side; where there are GPUs, each on one",
    )
    asked.add_argument(
        "--shard", help="I/N: do every N-th job from the I-th on, and no more (an array of jobs)"
    )
    return asked


def carry_out(study: Study, args: Namespace, module: str) -> None:
    """Do the shard that was asked for; or all of the study in processes, and then show what came
    out.

    Args:
        module: the benchmark's, which each process runs with the same options.
    """
    if args.shard:
        study.run(read_shard(args.shard, "--shard"))
        return
    print(
        f"{len(study.jobs)} jobs, {study.images():,} images at most, in {args.processes} processes;"
        f" results come into {study.out}"
    )
    spread(args.processes, [module, *sys.argv[1:]])
    if results := study.finish():
        show(results)
        print(
            f"\nresults are in {study.out / 'results.json'}, the report is"
            f" {write_comparison(study.out).resolve()}"
        )


def spread(processes: int, command: list[str]) -> None:
    """Run a benchmark's command (module and options) once a process, each with its shard of the
    jobs.

    Raises InputError where one fails, and ends the others.
    """
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", *command, "--shard", f"{i}/{processes}"],
            env=_environment(i, processes),
        )
        for i in range(processes)
    ]
    try:
        waiting = list(workers)
        while waiting:
            for worker in list(waiting):
                try:
                    status = worker.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    continue
                waiting.remove(worker)
                if status:
                    ended = (
                        f"process {workers.index(worker)} of {processes} ended with status {status}"
                    )
                    raise InputError(
                        f"{ended}; its message is above; run the same command to go on"
                    )
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()


def _environment(number: int, processes: int) -> dict[str, str]:
    """Of one process: its share of the cores, and one GPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    if torch.cuda.is_available():
        given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
            map(str, range(torch.cuda.device_count()))
        )
        gpus = given.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return environment


def _interval(row: dict) -> str:
    return f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}"


def _line(point: dict) -> dict:
    """A point's row of a table."""
    known = {
        measure: None if isnan(value := mean(point, measure)) else value for measure in COMPARED
    }
    above = point.get("above")
    return {
        "kind": point["name"],
        **known,
        "above the snapshots": above and above["difference"],
        "95 %": above and _interval(above),
    }


def show(results: dict) -> None:
    """The fronts, the comparisons, every point and the published numbers, as text."""
    fronts = sorted(results["front"], key=lambda row: -row["hypervolume"])
    print(
        "\n"
        + table(
            [
                {"kind": row["name"], "hypervolume": row["hypervolume"], "95 %": _interval(row)}
                for row in fronts
            ]
        )
    )
    if paired := results["paired"]:
        print(
            "\n"
            + table(
                [
                    {
                        "kind": f"{row['a']} over {row['b']}",
                        "difference": row["difference"],
                        "95 %": _interval(row),
                    }
                    for row in paired
                ]
            )
        )
    print("\n" + table([_line(point) for point in results["points"]]))
    if rows := beside(results):
        print(
            "\n"
            + table(
                [{"kind": row["name"], **row["values"], "source": row["source"]} for row in rows]
            )
        )
