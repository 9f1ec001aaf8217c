"""The DreamBooth benchmark on any base: `python -m benchmarks.dreambench --data dreambooth --base
stable-diffusion-v1-5/stable-diffusion-v1-5`.

--data is a clone of github.com/google/dreambooth: 30 subjects, 25 prompts each, 4 images of each
prompt (Ruiz et al., CVPR 2023, section 4.1). Every method is trained once a subject and measured at
every snapshot; full and LoRA also as blends. Jobs run side by side (--processes), or in an array of
SLURM jobs (configs/slurm/dreambench.sbatch); interrupted, the same command goes on. The page at the
end shows the published numbers beside these. A full snapshot of Stable Diffusion takes 2 GB: with
--methods lora, or a disk for 30 times as many as --steps has.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from benchmarks import plan
from benchmarks.command import carry_out, study_parser
from benchmarks.study import Study
from benchmarks.tables import markdown
from benchmarks.training import IDENTIFIER, Recipe, Setting, Subject, device
from dreamblend.blending.blends import CAG, Merge, Region, Score, Switch
from dreamblend.cli import entry
from dreamblend.errors import InputError
from dreamblend.evaluation.encoders import prompt_encoder, subject_encoder
from dreamblend.evaluation.metrics import between
from dreamblend.evaluation.protocols import PRESETS, Protocol, find
from dreamblend.models import locate_base
from dreamblend.models.bases import SHIPPED
from dreamblend.storage.photos import list_photos, open_photo, to_pixels
from dreamblend.tuning import METHODS

RECIPES = tuple(r for r in plan.read().methods if r.name in METHODS)
STEPS = (25, 50, 100, 200, 400)
BLENDS = tuple(
    Setting(blend)
    for blend in (
        Region(weight=1.0),
        Region(),
        CAG(0.3),
        CAG(1.0),
        Switch(0.2),
        Switch(0.4),
        Merge(0.6),
        Score(0.6),
    )
)
TEXT = "prompts_and_classes.txt"
LIVE = ("cat", "dog")  # the classes of its live subjects, which the text does not mark
PROMPTS = 25
# For Stable Diffusion: the usual rates, and steps up to near DreamBooth's 1,000 (Ruiz et al.,
# section 3.2). Not measured here.
RATES = {name: method.rates["usual"] for name, method in METHODS.items()}
LARGER_STEPS = (50, 100, 200, 400, 800)

_RUIZ = "Ruiz et al., CVPR 2023, arXiv 2208.12242"
LITERATURE = [
    {
        "name": name,
        "values": dict(zip(("subject", "subject_clip", "prompt_fidelity", "prior"), values)),
        "source": source,
    }
    for name, values, source in (
        ("real photos", (0.774, 0.885), f"{_RUIZ}, table 1"),
        ("DreamBooth, Imagen", (0.696, 0.812, 0.306), f"{_RUIZ}, table 1"),
        ("DreamBooth, Stable Diffusion", (0.668, 0.803, 0.305), f"{_RUIZ}, table 1"),
        ("Textual Inversion, Stable Diffusion", (0.569, 0.780, 0.255), f"{_RUIZ}, table 1"),
        ("DreamBooth, Imagen, 15 subjects", (0.712, 0.828, 0.306, 0.664), f"{_RUIZ}, table 3"),
        ("the same with prior preservation", (0.684, 0.815, 0.308, 0.493), f"{_RUIZ}, table 3"),
        (
            "Custom Diffusion, Stable Diffusion",
            (0.643, 0.790, 0.305),
            "Ma et al., SIGGRAPH 2024 (Subject-Diffusion), arXiv 2307.11410, table 1",
        ),
    )
]


# --------------------------------------------------------------------------------------- its folder
def read(data: Path) -> list[Subject]:
    """The subjects with their photos and prompts, from a folder in google/dreambooth's layout.

    Raises InputError where it is not the whole benchmark: 30 subjects, 9 of them live, and 25
    prompts for either kind.
    """
    folder = data / "dataset" if (data / "dataset").is_dir() else data
    path = next((p for p in (folder / TEXT, data / TEXT) if p.is_file()), None)
    if path is None:
        raise InputError(
            f"{data} holds no {TEXT}: name with --data a clone of github.com/google/dreambooth"
        )
    text = path.read_text("utf-8-sig", errors="replace")
    classes = dict(re.findall(r"^[ \t]*([\w-]+)[ \t]*,[ \t]*([\w-][\w -]*?)[ \t]*$", text, re.M))
    classes.pop("subject_name", None)  # the column's heading
    objects, live = (
        _templates(text, heading) for heading in ("Object Prompts", "Live Subject Prompts")
    )
    found = [len(classes), sum(noun in LIVE for noun in classes.values()), len(objects), len(live)]
    if found != [30, 9, PROMPTS, PROMPTS]:
        raise InputError(
            f"{path} gives {found[0]} subjects, {found[1]} of them live, {found[2]} prompts for"
            f" objects and {found[3]} for live subjects, where the benchmark has 30, 9, {PROMPTS}"
            f" and {PROMPTS}: take the file from github.com/google/dreambooth again"
        )

    def fill(template, noun):
        return " ".join(template.replace("{0}", IDENTIFIER).replace("{1}", noun).split())

    return [
        Subject(
            name,
            folder / name,
            noun,
            tuple(fill(t, noun) for t in (live if noun in LIVE else objects)),
        )
        for name, noun in classes.items()
    ]


def _templates(text: str, heading: str) -> list[str]:
    """The prompts of the list under a heading, as Python writes it: 'a {0} {1} in the
    jungle'.format(unique_token, class_token).
    """
    _, _, rest = text.partition(f"\n{heading}")
    quoted = re.findall(r"""(['"])([^'"]*\{0\}[^'"]*)\1\s*\.format""", rest[: rest.find("]")])
    return list(dict.fromkeys(prompt for _, prompt in quoted))


# ----------------------------------------------------------------------------------- its self-check
def real_against_real(subjects: list[Subject], protocol: Protocol, device: str) -> dict[str, float]:
    """Mean cosine between different photos of a subject, over subjects: what no method should
    exceed, and a check of the judges themselves.
    """
    judges = {
        "subject": subject_encoder(protocol.subject, protocol.subject_preprocess, device),
        "subject_clip": prompt_encoder(protocol.prompt, protocol.prompt_preprocess, device),
    }
    values: dict[str, list[float]] = {name: [] for name in judges}
    for subject in tqdm(subjects, desc="real photos"):
        photos = [to_pixels([open_photo(path)])[0] for path in list_photos(subject.photos)]
        for name, judge in judges.items():
            cosines = between(judge.images(photos))
            if not len(cosines):
                raise InputError(
                    f"{subject.photos} holds no two different photos: take it from"
                    " github.com/google/dreambooth again"
                )
            values[name].append(protocol.subject_scale * cosines.mean().item())
    return {name: sum(of) / len(of) for name, of in values.items()}


# -------------------------------------------------------------------------------------- the command
def recipes(
    base: str, steps: tuple[int, ...], methods: list[str], rates: list[str]
) -> tuple[Recipe, ...]:
    """The sandbox's methods with a base's own rates (`METHOD=RATE` overrides), and the second and
    the last step as the pair of the blends.
    """
    usual = {} if base in SHIPPED else RATES
    given = {}
    for text in rates:
        name, _, value = text.partition("=")
        try:
            given[name] = float(value)
        except ValueError:
            given[name] = 0.0
        if name not in RATES or not given[name] > 0:
            raise InputError(
                f"--rates has {text}: write such as full=5e-6, for one of {', '.join(RATES)}"
            )
    pair = steps[1 if len(steps) > 2 else 0], steps[-1]
    return tuple(
        replace(
            r,
            rate=given.get(r.name, usual.get(r.name, r.rate)),
            pair=r.pair and pair,
            blends=r.blends and BLENDS,
            steps=None,
        )
        for r in RECIPES
        if r.name in methods
    )


@entry
def main() -> None:
    asked = study_parser(
        __doc__,
        [r.name for r in RECIPES],
        prompts=PROMPTS,
        sampling=25,
        out=Path("runs/dreambench"),
    )
    asked.add_argument(
        "--data", type=Path, required=True, help="a clone of github.com/google/dreambooth"
    )
    asked.add_argument(
        "--base",
        default="sandbox",
        help="sandbox, a hub id, a diffusers folder, or a .safetensors file",
    )
    asked.add_argument("--subjects", nargs="+", metavar="NAME", help="all 30 where not given")
    asked.add_argument(
        "--steps",
        type=int,
        nargs="+",
        help=f"snapshots: {_words(STEPS)} for the sandbox, {_words(LARGER_STEPS)} for others",
    )
    asked.add_argument(
        "--rates",
        nargs="+",
        default=[],
        metavar="METHOD=RATE",
        help="learning rates in the place of the usual ones",
    )
    asked.add_argument(
        "--scale", type=float, help="of classifier-free guidance; 4 for the sandbox, 7.5 for others"
    )
    asked.add_argument(
        "--protocol",
        default="auto",
        choices=("auto", *PRESETS),
        help="auto: sandbox for its own base, dreambooth for others",
    )
    asked.add_argument(
        "--batch", type=int, default=8, help="images drawn at once, as the memory allows"
    )
    args = asked.parse_args()
    at_home = args.base in SHIPPED
    steps = tuple(sorted(set(args.steps or (STEPS if at_home else LARGER_STEPS))))
    if len(steps) < 2 or steps[0] < 1:
        raise InputError(
            f"--steps is {_words(steps)}: a blend needs two snapshots, of steps from 1 on"
        )
    locate_base(args.base)
    known = {s.name: replace(s, prompts=s.prompts[: args.prompts]) for s in read(args.data)}
    if unknown := [name for name in args.subjects or () if name not in known]:
        raise InputError(
            f"--subjects has {unknown[0]}, which the benchmark has not: name some of"
            f" {', '.join(known)}"
        )
    subjects = tuple(known[name] for name in args.subjects or known)
    protocol = find(args.protocol, args.base)
    more: dict = {}
    if not args.shard:
        real = real_against_real(list(subjects), protocol, device())
        more = {"real": real, "literature": LITERATURE}
        print(
            "\nreal photos against real photos: all 30 subjects by the protocol dreambooth should"
            " give what is published"
        )
        print(
            markdown(
                [
                    {"kind": f"protocol {protocol.name}, {len(subjects)} subjects", **real},
                    {"kind": "published", **LITERATURE[0]["values"]},
                ]
            )
            + "\n"
        )
    study = Study(
        "dreambench",
        args.out,
        args.base,
        subjects,
        recipes(args.base, steps, args.methods, args.rates),
        steps,
        tuple(range(args.seeds)),
        protocol.name,
        args.sampling,
        args.scale or (4.0 if at_home else 7.5),
        args.dtype,
        args.batch,
        more,
    )
    carry_out(study, args, "benchmarks.dreambench")


def _words(steps: tuple[int, ...]) -> str:
    return ", ".join(map(str, steps))


if __name__ == "__main__":
    main()
