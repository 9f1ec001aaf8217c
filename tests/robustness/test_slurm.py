"""On a real SLURM of this one machine: what is preempted, killed or near its time limit goes on,
and loses nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree, which

import pytest
from tiny_runs import contents, fit

from dreamblend.callbacks.resume import NAME
from dreamblend.tuning import LoRA

ROOT = Path(__file__).resolve().parents[2]
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "srun") if which(name) is None]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"there is no {', '.join(MISSING)}: make slurm installs SLURM on Debian",
    ),
]
PATIENCE = 200  # seconds; a start takes ten, and a busy machine many times that


class Cluster:
    def __init__(self, conf: Path):
        self.conf = conf

    def __call__(self, *command: object, **settings: object) -> str:
        """One of SLURM's commands, with settings in the environment; what it prints."""
        environment = {
            **os.environ,
            "SLURM_CONF": str(self.conf),
            **{k: str(v) for k, v in settings.items()},
        }
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def submit(self, script: str, options: str, *words: object, **settings: object) -> str:
        """The job's id. The options are sbatch's, the words the program's, who runs here on the
        CPU.
        """
        here = "--parsable --gpus-per-node=0 --cpus-per-task=1 --mem=0 --output=/dev/null"
        cpu = (
            "--trainer.accelerator",
            "cpu",
            "--trainer.logger",
            "false",
            "--trainer.enable_progress_bar",
            "false",
        )
        return self(
            "sbatch",
            *here.split(),
            *options.split(),
            ROOT / "configs/slurm" / script,
            *cpu,
            *words,
            PYTHON=os.sys.executable,
            **settings,
        )

    def state(self, job: str) -> str:
        """Such as RUNNING or COMPLETED; of several tasks, all of theirs."""
        return " ".join(
            sorted(
                {
                    line.split("=")[1].split()[0]
                    for line in self("scontrol", "show", "job", job).splitlines()
                    if "JobState=" in line
                }
            )
        )

    def wait(self, job: str, state: str) -> None:
        until(
            lambda: self.state(job) == state, lambda: f"{job} is {self.state(job)} and not {state}"
        )

    def kill(self, job: str, number: int, process: int = 0) -> None:
        """A signal to one process of a job, and to no other."""
        rows = [
            line.split()
            for line in self(
                "scontrol", "listpids", self("squeue", "-h", "-j", job, "-o", "%A")
            ).splitlines()
        ]
        os.kill(
            next(int(pid) for pid, _, step, task, _ in rows if (step, task) == ("0", str(process))),
            number,
        )


def until(happened: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.1)


def said(log: Path, text: str, times: int = 1) -> None:
    """Wait until a log says something, so many times."""

    def read():
        return log.read_text() if log.exists() else ""

    until(lambda: read().count(text) >= times, lambda: f"{log} lacks {text!r}:\n{read()}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([ROOT / ".ci/slurm.sh", "start", folder], check=True)
    cluster = Cluster(folder / "slurm.conf")
    try:
        yield cluster
    finally:
        cluster("scancel", "--me")
        until(lambda: not cluster("squeue", "-h"), lambda: cluster("squeue"))
        subprocess.run([ROOT / ".ci/slurm.sh", "stop", folder], check=True)


@pytest.fixture
def train(cluster, tiny_base, mug_photos, tmp_path) -> Callable[..., str]:
    """Submit the training of subjects that all have the same photos."""

    def submit(options: str, subjects: list[str], steps: list[int], last: int) -> str:
        (tmp_path / "subjects.txt").write_text(
            "# name and class noun\n" + "".join(f"{name} mug\n" for name in subjects)
        )
        for name in subjects:
            copytree(mug_photos, tmp_path / "photos" / name)
        words = (
            "--snapshots.steps",
            steps,
            "--trainer.max_steps",
            last,
            "--resume.every",
            0,
            "--trainer.callbacks",
            "[]",
        )
        where = dict(
            SUBJECTS=tmp_path / "subjects.txt", PHOTOS=tmp_path / "photos", RUNS=tmp_path / "runs"
        )
        return cluster.submit("train.sbatch", options, *words, **where, BASE=tiny_base)

    return submit


def test_two_tasks_preempted_twice_train_the_weights_of_an_undisturbed_run(
    cluster, train, tmp_path
):
    job = train("--array=0-1%2 --ntasks-per-node=2 --time=30", ["whole", "cut"], [1, 60], 60)
    whole, cut = tmp_path / "runs/whole", tmp_path / "runs/cut"
    log = cut / "logs/train-0.log"
    until((cut / "snapshots/step-000001").exists, lambda: f"{cut} has no snapshot: {contents(cut)}")
    cluster("scontrol", "requeue", f"{job}_1")
    said(log, "run the same command")
    said(log, "going on at step")
    cluster.kill(
        f"{job}_1", signal.SIGUSR2, process=1
    )  # they agree, and the first one has the job requeued
    said(log, "the job was requeued")
    said(log, "going on at step", 2)
    cluster.wait(job, "COMPLETED")
    runs = [contents(run / "snapshots") for run in (whole, cut)]
    assert runs[0].keys() == runs[1].keys()
    weights = [
        {name: data for name, data in files.items() if name.endswith(".safetensors")}
        for files in runs
    ]
    assert weights[0] == weights[1] and len(set(weights[0].values())) == 2
    assert (
        "going on" not in (whole / "logs/train-0.log").read_text()
        and (cut / "logs/train-1.log").exists()
    )


def test_before_its_time_limit_a_job_is_requeued_and_a_cancelled_one_is_not(
    cluster, train, tmp_path
):
    job = train("--array=0 --time=30", ["mug"], [1], 10**9)
    run = tmp_path / "runs/mug"
    until((run / "snapshots/step-000001").exists, lambda: f"{run} has no snapshot: {contents(run)}")
    minutes = (
        int(cluster("squeue", "-h", "-j", job, "-o", "%M").split(":")[-2]) + 2
    )  # ends in one to two minutes, so the signal is due
    cluster("scontrol", "update", f"JobId={job}_0", f"TimeLimit={minutes}")
    said(run / "logs/train-0.log", "the job was requeued")
    cluster("scontrol", "update", f"JobId={job}_0", "TimeLimit=30")
    said(run / "logs/train-0.log", "going on at step")
    cluster("scancel", job)
    said(run / "logs/train-0.log", "run the same command")
    cluster.wait(job, "CANCELLED")
    assert (run / NAME).exists()


def test_a_blend_in_three_shares_of_which_one_is_killed_is_whole_after_its_rerun(
    cluster, tiny_base, mug_photos, tmp_path
):
    run, out = tmp_path / "run", tmp_path / "run-blend"
    fit(tiny_base, mug_photos, run, LoRA(rank=2), steps=[1, 3])
    words = ("--early", 1, "--late", 3, "--data.batch_size", 1, "--model.num_inference_steps", 15)
    settings = dict(RUN=run, SEEDS="0-5", PROMPTS=tmp_path / "prompts.txt")
    settings["PROMPTS"].write_text("a {subject} on the beach\na {subject} in the snow\n")
    share = {
        (prompt, seed) for prompt in ("beach", "snow") for seed in (1, 4)
    }  # of task 1: every third

    def files():
        return {p: p.stat().st_mtime_ns for p in out.glob("images/*/*.png")}

    def of_share():
        return [p for p in files() if int(p.stem.split("-")[0]) in (1, 4)]

    job = cluster.submit("blend.sbatch", "--array=0-2%3 --time=30", *words, **settings)
    until(lambda: len(of_share()) >= 1, lambda: str(contents(out / "logs")))
    cluster.kill(f"{job}_1", signal.SIGKILL)
    cluster.wait(f"{job}_1", "FAILED")
    cluster.wait(f"{job}_0", "COMPLETED")
    cluster.wait(f"{job}_2", "COMPLETED")
    before = files()
    assert (
        len(before) < 36
        and 0 < len(of_share()) < 3 * len(share)
        and not (out / "report.html").exists()
    )

    cluster("scontrol", "requeue", f"{job}_1")
    until(lambda: cluster.state(job) == "COMPLETED", lambda: cluster.state(job))
    drawn = files()
    assert len(drawn) == 36 and before.items() <= drawn.items()

    last = cluster.submit("blend.sbatch", "--array=0 --time=30", *words, **settings)
    cluster.wait(last, "COMPLETED")
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert (
        {out / row["file"] for row in rows} == drawn.keys()
        and files() == drawn
        and (out / "report.html").exists()
    )
