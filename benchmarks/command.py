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
from pathlib import Path

import torch

from benchmarks.study import Study
from dreamblend.blending.prompts import read_shard
from dreamblend.errors import InputError
from dreamblend.report import write_comparison


def parser(
    description: str, out: Path, sampling: int = 6, parents: Sequence[ArgumentParser] = ()
) -> ArgumentParser:
    """A parser with what is asked of every benchmark, and what `parents` ask."""
    asked = ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=parents,
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
    description: str,
    methods: list[str],
    prompts: int,
    sampling: int,
    out: Path,
    seeds: int = 4,
    parents: Sequence[ArgumentParser] = (),
) -> ArgumentParser:
    """A parser with the options of every study of many methods."""
    asked = parser(description, out, sampling, parents)
    asked.add_argument(
        "--methods",
        nargs="+",
        default=methods,
        choices=methods,
        metavar="NAME",
        help=", ".join(methods),
    )
    asked.add_argument("--prompts", type=int, default=prompts, help=f"how many of the {prompts}")
    asked.add_argument("--seeds", type=int, default=seeds, help="images of each prompt")
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


def carry_out(
    study: Study, args: Namespace, module: str, speed: dict[str, float] | None = None
) -> None:
    """Do the shard that was asked for; or all of the study in processes, and then show what came
    out.

    Args:
        module: the benchmark's, which each process runs with the same options.
        speed: of one core, for the estimate of the hours: `passes` and `training` a second.
    """
    if args.shard:
        study.run(read_shard(args.shard, "--shard"))
        return
    images = study.images()
    print(
        f"{len(study.jobs)} jobs, {images.total():,} images at most, in {args.processes} processes;"
        f" results come into {study.out}"
    )
    if speed:
        print(estimate(study, args.processes, **speed))
    spread(args.processes, [module, *sys.argv[1:]])
    if study.finish():
        print(
            f"\n{study.tables.read_text()}\nresults are in {study.out / 'results.json'} and"
            f" {study.tables}, the report is {write_comparison(study.out).resolve()}"
        )


def estimate(study: Study, processes: int, passes: float, training: float) -> str:
    """How long a study takes from its beginning, in words: `passes` of the denoiser and `training`
    steps a second of one core.
    """
    wanted = study.sampling * sum(each * count for each, count in study.images().items())
    hours = (wanted / passes + study.updates() / training) / 3600
    return (
        f"{wanted:,.0f} passes of the denoiser and {study.updates():,} optimizer steps: about"
        f" {hours / processes:.1f} hours from the beginning, as the plan has the speed of"
        f" {processes} processes with a core each"
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
