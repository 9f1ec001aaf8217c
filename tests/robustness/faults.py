"""What happens when things go wrong? `python -m tests.robustness.faults`: kills, full disks,
flipped bits, lost processes.

Real runs of train.py and blend.py on the sandbox, each a process of its own, forked from one that
has imported the libraries:

* killed (-9) at random moments, most of them at and between the writes of files; then the same
  command again. Snapshots are whole or absent, no image is broken, nothing that was there changes,
  and the end is bit for bit that of a run that nothing happened to.
* on a disk that takes no more after so many bytes, at sizes spread over all that is written; then
with space again. One sentence, and the same end.
* one bit flipped in a snapshot, anywhere in its files: refused, and the file named.
* two processes that train together, one of them killed: the other one ends and says why.

Ends with a table of what was tried, and with status 2 where anything was not as it should be, which
is told with what it takes to see it again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline  # noqa: F401  so that no forked process imports it
from PIL import Image
from tqdm import tqdm

import blend
import train
from dreamblend.callbacks.resume import NAME
from dreamblend.cli import entry
from dreamblend.errors import InputError
from dreamblend.evaluation.scores import table
from dreamblend.sandbox import world
from dreamblend.storage import snapshots
from tests.robustness.forked import PATIENCE, Run, Wrong, begin, demand, torchrun
from tests.tiny_runs import blend_words, fit_words

ROOT = Path(__file__).resolve().parents[2]
STEPS, LAST = [1, 2, 4, 6], 6
BOUND = 60  # seconds in which the others must end when one of them is lost


@dataclass
class Work:
    """A command, the folder it fills, and what its end looks like."""

    name: str
    main: Callable[[], None]
    words: Callable[[Path], list[object]]  # of the output folder
    kept: Callable[[Path], dict[str, bytes]]  # what must be the same in the end
    sound: Callable[[Path], None]  # raises Wrong where what lies there at any moment is broken

    def begin(self, out: Path, log: Path, **options) -> Run:
        return begin(self.main, self.words(out), out, log, **options)

    def whole(self, out: Path, log: Path) -> tuple[dict[str, bytes], int, float]:
        """What an undisturbed run leaves, how many writes and how many seconds it takes."""
        start, run = time.monotonic(), self.begin(out, log)
        demand(run.end() == 0, f"{self.name} fails undisturbed: {run.said[-500:]}")
        return self.kept(out), run.writes.value, time.monotonic() - start


def contents(folder: Path, *patterns: str) -> dict[str, bytes]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(found)}


def times(folder: Path, names: dict) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in names if (folder / name).exists()}


def train_work(base: str, photos: Path) -> Work:
    def words(out: Path) -> list[object]:
        return fit_words(
            base,
            photos,
            out,
            "--snapshots.steps",
            json.dumps(STEPS),
            "--trainer.max_steps",
            LAST,
            "--resume.every",
            1,
            "--model.tuning.targets",
            '["to_v"]',
            "--trainer.callbacks",
            "[]",
            config=ROOT / "configs/train_lora.yaml",
        )

    def sound(out: Path) -> None:
        for _, path in snapshots.listing(out / "snapshots"):
            snapshots.read(path)  # raises InputError
        if (out / NAME).exists():
            torch.load(out / NAME, weights_only=True)

    return Work(
        "training", train.main, words, lambda out: contents(out, "snapshots/step-*/**/*"), sound
    )


def blend_work(run: Path) -> Work:
    def words(out: Path) -> list[object]:
        return blend_words(
            run,
            out,
            "--model.num_inference_steps",
            1,
            "--data.batch_size",
            4,
            "--trainer.callbacks",
            "callbacks.BlendWriter",
            "--trainer.callbacks+",
            "callbacks.BlendReport",
            "--trainer.callbacks.diagnose",
            "false",
            "--trainer.callbacks.judges",
            "none",
            late=LAST,
        )

    def sound(out: Path) -> None:
        for path in out.glob("images/*/[!.]*"):
            with Image.open(path) as image:
                image.verify()
        for line in (
            (out / "results.jsonl").read_text().splitlines()
            if (out / "results.jsonl").exists()
            else ()
        ):
            json.loads(line)

    return Work(
        "blending",
        blend.main,
        words,
        lambda out: contents(out, "images/*/[!.]*", "maps/*/[!.]*", "[!.]*"),
        sound,
    )


# --------------------------------------------------------------------------------------- the faults
def again(work: Work, out: Path, log: Path, whole: dict[str, bytes]) -> None:
    """The same command once more: nothing that is there changes, and the end is that of a run that
    nothing happened to.
    """
    try:
        work.sound(out)
    except (InputError, OSError, ValueError, SyntaxError, RuntimeError) as error:
        raise Wrong(f"it left something broken: {error}") from error
    before = {
        name: data
        for name, data in work.kept(out).items()
        if name.endswith((".png", ".safetensors")) or "snapshots/" in name
    }
    stamps = times(out, before)
    demand(
        all(whole.get(name) == data for name, data in before.items()),
        "what it left is not what an undisturbed run writes",
    )
    run = work.begin(out, log)
    demand(run.end() == 0, f"it does not go on: {run.said[-500:]}")
    demand(times(out, before) == stamps, "the second run wrote again what was there")
    after = work.kept(out)
    names = sorted(n for n in whole.keys() | after.keys() if whole.get(n) != after.get(n))
    demand(after == whole, f"it ends otherwise in {names[:5]}")


def killed(
    work: Work,
    whole: tuple[dict[str, bytes], int, float],
    chance: random.Random,
    out: Path,
    log: Path,
) -> str:
    """One kill: mostly at a write of a file or up to 20 ms after it, as the larger ones take, else
    at any moment.
    """
    kept, writes, seconds = whole
    saving = chance.random() < 0.8
    if saving:
        run = work.begin(out, log, at=chance.randint(1, writes))
        after = chance.choice((0.0, 0.0005, 0.002, 0.02 * chance.random()))
        while not run.reached.wait(0.05) and run.process.is_alive():
            pass
    else:
        run, after = work.begin(out, log), chance.random() * seconds
    time.sleep(after)
    run.kill()
    again(work, out, log, kept)
    return "at a write" if saving else "at any moment"


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[], None] | None]:
    """`folder` on a disk of so many bytes. Gives what makes it larger; None where this user may
    mount nothing: it is on the usual disk.
    """
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def filled(work: Work, whole: dict[str, bytes], share: float, place: Path, log: Path) -> str:
    """A disk that takes no more after a share of all that is written; where nothing can be mounted,
    files that take a share of the largest.
    """
    pages = [-(-len(data) // 4096) * 4096 for data in whole.values()]
    with disk(place, int(share * sum(pages)) + 4096) as grow:
        out = place / "out"
        status = work.begin(out, log, most=int(share * max(pages)) if grow is None else None).end()
        said = log.read_text(errors="replace")
        if status:
            last = [line for line in said.splitlines() if line.strip()][-1]
            demand(
                status == 2
                and "Traceback" not in said
                and last.startswith("error: ")
                and str(out) in last,
                f"status {status}: {said[-1500:]}",
            )
        if grow is not None:
            grow()
        again(work, out, log, whole)
    return "refused" if status else "enough"


def flipped(path: Path, chance: random.Random) -> str:
    """One bit of one file, each as likely as the others; and as it was again."""
    file = chance.choice(sorted(p for p in path.rglob("*") if p.is_file()))
    whole = file.read_bytes()
    bit = chance.randrange(8 * len(whole))
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    try:
        snapshots.read(path)
    except InputError as error:
        demand(str(file) in str(error), f"bit {bit} of {file}: {error}")
        return file.name
    finally:
        file.write_bytes(whole)
    raise Wrong(f"bit {bit} of {file} is flipped, and nothing is said")


def lost(work: Work, rank: int, out: Path, log: Path) -> str:
    """Two processes train together, and one is killed after the first snapshot."""
    words = [
        *work.words(out),
        "--trainer.devices",
        2,
        "--trainer.strategy",
        "ddp",
        "--trainer.max_steps",
        10_000,
        "--snapshots.steps",
        "[1, 10000]",
    ]
    logs = [log.with_suffix(f".{i}") for i in (0, 1)]
    runs = [
        begin(work.main, words, out, logs[i], environment=environment)
        for i, environment in enumerate(torchrun(2))
    ]
    try:
        start = time.monotonic()
        while not (out / "snapshots/step-000001").exists():
            alive = time.monotonic() < start + PATIENCE and all(
                run.process.is_alive() for run in runs
            )
            demand(alive, f"two processes do not train: {runs[0].said[-500:]}")
            time.sleep(0.05)
        runs[rank].kill()
        start, other = time.monotonic(), runs[1 - rank]
        demand(other.end(BOUND) not in (0, None), "the other one ends as if all were well")
        demand(
            "error: another process of this run was lost" in other.said
            and "Traceback" not in other.said,
            f"the other says: {other.said[-500:]}",
        )
    finally:
        for run in runs:
            run.kill()
    took = math.ceil(time.monotonic() - start)
    work.sound(out)
    return f"within {took} s"


# ---------------------------------------------------------------------------------------- the suite
def suite(
    out: Path,
    base: str = "sandbox",
    seed: int = 0,
    kills: int = 50,
    disks: int = 10,
    flips: int = 200,
    losses: int = 4,
    only: list[str] | None = None,
) -> tuple[list[dict], list[str]]:
    """Try all faults; the table's rows, and a sentence for each trial that went wrong."""
    out.mkdir(parents=True, exist_ok=True)
    photos = out / "photos"
    photos.mkdir()
    for i, photo in enumerate(world.photos("teal_mug")):
        photo.save(photos / f"{i}.png")
    training, rows, wrong = train_work(base, photos), [], []
    trained = training.whole(out / "run", out / "run.log")
    blending = blend_work(out / "run")
    blended = blending.whole(out / "blend", out / "blend.log")

    def trials(name: str, count: int, one: Callable[[int, Path, Path], str]) -> None:
        if not count or (only and not any(name.startswith(part) for part in only)):
            return
        start, seen = time.monotonic(), {}
        for i in tqdm(range(count), desc=name):
            place = out / name.replace(" ", "-") / str(i)
            log = out / name.replace(" ", "-") / f"{i}.log"
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                what = one(i, place, log)
                seen[what] = seen.get(what, 0) + 1
                shutil.rmtree(place, ignore_errors=True)
            except Wrong as error:
                wrong.append(f"{name}, trial {i} of seed {seed}: {error} ({log})")
                tqdm.write(wrong[-1], file=sys.stderr)
        seconds = time.monotonic() - start
        of_these = ", ".join(f"{n} {what}" for what, n in sorted(seen.items()))
        row = {
            "kind": name,
            "trials": count,
            "as it should be": sum(seen.values()),
            "seed": seed,
            "seconds": round(seconds),
            "of these": of_these,
        }
        rows.append(row)

    def chance(*of):
        return random.Random("/".join(map(str, (seed, *of))))

    trials(
        "kill -9 in training",
        kills,
        lambda i, place, log: killed(training, trained, chance("train", i), place, log),
    )
    trials(
        "kill -9 in blending",
        kills,
        lambda i, place, log: killed(blending, blended, chance("blend", i), place, log),
    )
    for work, whole in ((training, trained), (blending, blended)):
        trials(
            f"full disk in {work.name}",
            disks,
            lambda i, place, log, work=work, whole=whole: filled(
                work, whole[0], (i + 0.5) / disks, place, log
            ),
        )
    trials(
        "flipped bit",
        flips,
        lambda i, place, log: flipped(out / f"run/snapshots/step-{LAST:06d}", chance("flip", i)),
    )
    trials("lost process", losses, lambda i, place, log: lost(training, i % 2, place, log))
    return rows, wrong


@entry
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=50, help="of training, and as many of blending"
    )
    parser.add_argument(
        "--disks",
        type=int,
        default=10,
        help="sizes of a disk that is too small, for each of the two",
    )
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--losses", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="the faults whose names begin so: 'kill -9 in training', 'full disk', ...",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=(
            "where the runs are kept; a folder of the system's that is removed at the end, where"
            " not given"
        ),
    )
    args = parser.parse_args()
    if args.out and args.out.exists() and any(args.out.iterdir()):
        raise InputError(f"--out {args.out} is not empty: name a new folder")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        trials = {
            name: getattr(args, name)
            for name in ("seed", "kills", "disks", "flips", "losses", "only")
        }
        rows, wrong = suite(args.out or Path(folder), **trials)
    print("\n" + table(rows))
    if wrong:
        raise InputError("; ".join(wrong))


if __name__ == "__main__":
    main()
