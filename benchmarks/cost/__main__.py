"""What does it cost? `python -m benchmarks.cost`: every blend beside the plain pipeline of
diffusers, training beside its bare loop and diffusers' own, what a run waits for its snapshots, and
how long the commands take to start. On two idle cores --bases sandbox takes ten minutes, and
--bases sd15 --rounds 3, of Stable Diffusion's size, fifty.

All that is compared runs in turn in one process, and ratios are of the same round. Where there is a
GPU it runs there, in the precision that is usual there. Interrupted, the same command goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import torch

from benchmarks import counted
from benchmarks.command import parser
from benchmarks.cost import drawing, saving, starting, training
from benchmarks.cost.bases import BASES, ON_GPU, Base
from benchmarks.cost.clock import machine
from benchmarks.pieces import full_pair, lora_pair
from benchmarks.record import Record
from benchmarks.training import Subject, device, sandbox_subject
from dreamblend.blending.models import drawing_dtype
from dreamblend.cli import entry
from dreamblend.models import load_backbone
from dreamblend.storage.files import save_text
from dreamblend.storage.snapshots import DTYPES

SECTIONS = ("drawing", "training", "snapshot", "startup", "counted")
SUBJECT = "teal_mug"
OUT = Path("runs/cost")
PAIRS = {"lora": lora_pair, "full": full_pair}
STARTS = 3  # of each command
COUNTED_STEPS = 28  # of an image
COUNTED = ("Stable Diffusion XL", "FLUX.1-dev", "Qwen-Image", "Z-Image")
# that full weights of Stable Diffusion take to train: 20 with gradients, moments and average, and
# 14 for the loop that trains a denoiser of its own in the channels-last layout
FULL_GB = 34


class Costs:
    """What was measured so far, and what is to be measured with these settings."""

    def __init__(
        self, out: Path, sampling: int, rounds: int, bases: list[str], peer: Path | None = None
    ):
        self.out, self.sampling, self.rounds = out, sampling, rounds
        self.device = device()
        self.of = BASES if self.device == "cpu" else ON_GPU
        self.bases, self.peer = bases, peer
        settings = {"machine": machine(), "torch": torch.__version__}
        settings |= {"sampling": sampling, "rounds": rounds}
        self.record = Record(out / "cost.json", settings, found={})
        self.subject: Subject = sandbox_subject(SUBJECT, out / "photos")

    def once(self, name: str, measure: Callable[[], object]) -> None:
        """Measure what is not there yet."""
        if name not in self.record["found"]:
            print(f"measuring {name}", flush=True)
            self.record["found"][name] = measure()
            self.record.save()

    # -- the sections
    def drawing(self) -> None:
        for base, kind in product(self.bases, PAIRS):
            self.once(f"drawing/{base}/{kind}", partial(self.drawn, self.of[base], kind))

    def drawn(self, base: Base, kind: str) -> list[dict]:
        model = load_backbone(base.where(self.out))
        models = PAIRS[kind](model)
        models.to(self.device, DTYPES[drawing_dtype(kind, self.device)])
        size = base.size or model.size
        steps = self.sampling if base.sampling is None else base.sampling
        noun, square = self.subject.class_noun, (size, size)
        return drawing.compare(models, noun, base.images, steps, square, self.rounds)

    def training(self) -> None:
        for base, method in self.trained():
            given = (self.of[base], method, self.subject)
            self.once(
                f"training/{base}/{method}",
                partial(training.compare, *given, self.rounds, self.out),
            )
            if self.peer is not None:
                steps = (10, 10 + 10 * self.of[base].steps)
                self.once(
                    f"peer/{base}/{method}",
                    partial(training.peer, *given, self.peer, steps, self.out),
                )

    def snapshot(self) -> None:
        for base, method in self.trained():
            self.once(
                f"snapshot/{base}/{method}",
                partial(saving.measure, self.of[base], method, self.subject, self.out),
            )

    def trained(self) -> Iterator[tuple[str, str]]:
        """The bases and methods that fit the memory."""
        for base, method in product(self.bases, training.METHODS):
            if (base, method) == ("sd15", "full") and memory() < FULL_GB * 1e9:
                print(f"full weights of {self.of[base].name} are left out: they take {FULL_GB} GB")
            else:
                yield base, method

    def startup(self) -> None:
        self.once("startup", partial(starting.measure, self.subject, STARTS, self.out / "startup"))
        self.once("imports", lambda: {m: starting.imports(m) for m in starting.COMMANDS.values()})

    def counted(self) -> None:
        self.once(
            "counted",
            lambda: [asdict(r) for r in counted.rows_of(COUNTED, COUNTED_STEPS, counted.OUT)],
        )

    # -- the page
    def page(self) -> str:
        """All that is there, in Markdown."""
        found = self.record["found"]
        lines = [f"{machine()}, torch {torch.__version__}."]
        for name in found:
            section, *what = name.split("/")
            if section in ("drawing", "training"):
                base = self.of[what[0]]
                lines += ["", f"## {section}: {base.name}, {what[1]}", ""]
            if section == "drawing":
                size = f"{base.size} px" if base.size else "its own size"
                steps = base.sampling or self.sampling
                lines += [f"{base.images} at once, {size}, {steps} steps.", ""]
                lines.append(drawing.table(found[name]))
            elif section == "training":
                script = found.get(f"peer/{what[0]}/{what[1]}")
                lines.append(training.table(found[name], script))
        saved = [
            {"name": f"{self.of[base].name}, {method}", **row}
            for name, row in found.items()
            if name.startswith("snapshot/")
            for base, method in [name.split("/")[1:]]
        ]
        if saved:
            lines += ["", "## snapshots", "", saving.table(saved)]
        if "imports" in found:
            lines += ["", "## start", "", starting.table(found["startup"], found["imports"])]
        if rows := found.get("counted"):
            lines += ["", "## counted at full size", "", counted.ratios(map(counted.read, rows))]
        return "\n".join(lines) + "\n"


def memory() -> int:
    """Bytes that are free, on the card or in the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@entry
def main() -> None:
    asked = parser(__doc__, OUT, sampling=10)
    asked.add_argument(
        "--sections",
        nargs="+",
        default=SECTIONS,
        choices=SECTIONS,
        metavar="NAME",
        help=", ".join(SECTIONS),
    )
    asked.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    asked.add_argument("--rounds", type=int, default=5, help="measurements of each")
    asked.add_argument(
        "--peer",
        type=Path,
        help="diffusers' examples/dreambooth: run its scripts too, which need torchvision",
    )
    args = asked.parse_args()
    costs = Costs(args.out, args.sampling, args.rounds, args.bases, args.peer)
    for section in args.sections:
        getattr(costs, section)()
    save_text(costs.page(), args.out / "cost.md")
    print(f"\n{costs.page()}\nthe tables are in {args.out / 'cost.md'}")


if __name__ == "__main__":
    main()
