"""`select`: picks the pair of a run, and keeps it in RUN/pair.json for `predict`."""

from __future__ import annotations

import json
from pathlib import Path

from dreamblend.blending.blends import Blend, Region
from dreamblend.blending.prompts import read_seeds
from dreamblend.errors import InputError
from dreamblend.evaluation.measures import SHOWN
from dreamblend.processes import rank_zero_only
from dreamblend.selection.noise import Row, standard_errors
from dreamblend.selection.probes import PROBES, SEEDS
from dreamblend.selection.rule import DIVERSITY, PROMPT, WORTH, choose
from dreamblend.storage import snapshots
from dreamblend.storage.files import check_writable, save_text


def select(
    run: Path,
    blend: Blend = Region(),
    prompts: list[str] | str = list(PROBES),
    seeds: str = f"{SEEDS[0]}-{SEEDS[-1]}",
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    judges: str = "auto",
    keep: float = PROMPT,
    grid: int | None = None,
    quantize: str | None = None,
) -> Path:
    """Pick the early and the late snapshot of a run by what they draw for probe prompts; writes
    RUN/pair.json and RUN/pair.html.

    Several processes of the same command (of torchrun, or of srun) share the work.

    Args:
        run: folder of a train.py run.
        blend: the blend that the pair is for.
        prompts: a text file with one prompt a line, or the prompts; `{subject}` stands for
            identifier and class noun. Not those to be drawn later.
        seeds: such as 0-3 or 0,5,7-9.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance (7.5 is usual for Stable Diffusion).
        judges: the protocol that scores: sandbox, dreambooth, custom-diffusion, dreambench-plus;
            auto is the sandbox's for its own base, else dreambooth.
        keep: share of the base's prompt fidelity that an early snapshot must still have.
        grid: side of the attention sites that the blend reads; a quarter of the latents'
            where None.
        quantize: int8 or nf4 quantises the frozen weights of the base, for snapshots that are added
            to them.
    """
    from dreamblend.evaluation.scores import table  # after --help: they import torchmetrics
    from dreamblend.report.choice import write_choice
    from dreamblend.selection.survey import Survey

    run = Path(run)
    snapshots.find(run)  # no run, nothing to write into
    check_writable(run, "--run")
    survey = Survey(
        run,
        prompts,
        read_seeds(seeds),
        blend,
        num_inference_steps,
        guidance_scale,
        judges,
        grid,
        quantize,
    )
    base, singles = survey.singles()
    choice = choose(base, singles, survey.blended, keep)
    record = {
        "early": choice.early,
        "late": choice.late,
        "reasons": choice.reasons,
        "base": _summary(base),
        "snapshots": [_summary(row) for row in singles],
        "blends": [_summary(row) for row in choice.blends],
        "weights": _weights(run),
        "about": {**survey.about, "keep": keep, "keep_diversity": DIVERSITY, "worth": WORTH},
    }
    save_text(json.dumps(record, indent=2), run / "pair.json")
    page = write_choice(run, record)

    def measured(row: Row) -> Row:
        return {"kind": row["name"], **{name: row[name] for name in SHOWN}}

    say = rank_zero_only(print)
    say("\n" + table([measured(row) for row in (base, *singles, *choice.blends)]))
    say(
        f"\nearly {choice.early}: {choice.reasons['early']}\nlate {choice.late}:"
        f" {choice.reasons['late']}\nthe pair is in {run / 'pair.json'}, the curves are in"
        f" {page.resolve()}"
    )
    return run / "pair.json"


def picked(
    run: Path, blend: Blend = Region(), guidance_scale: float = 4.0, grid: int | None = None
) -> tuple[int, int] | None:
    """The pair that was picked for a run; None where there is none, where the run has other
    snapshots now, or where the pair was picked for another blend.

    The best pair depends on the blend with its settings, on the guidance scale, which weighs the
    prompt against the subject, and on the grid. The denoising steps and the form of the frozen
    weights only set how exactly the images are approached; prompts, seeds and judges are the means
    of measuring. So a pair that was picked with others of these is taken.
    """
    try:
        record = json.loads((run / "pair.json").read_text())
        wanted = json.loads(
            json.dumps({"blend": blend.settings, "guidance_scale": guidance_scale, "grid": grid})
        )
        about = {key: record["about"][key] for key in wanted}
        same = record["weights"] == _weights(run) and about == wanted
        return (int(record["early"]), int(record["late"])) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def auto_pair(
    run: Path | None,
    early: str,
    late: str,
    blend: Blend,
    guidance_scale: float,
    num_inference_steps: int,
    grid: int | None,
    quantize: str | None = None,
) -> tuple[str, str]:
    """The pair of a run for these settings, by its steps. Picks it first where there is none, or
    where the run has other snapshots since.

    Raises InputError where one of `early` and `late` is named and the other is `auto`, or no run.
    """
    if early != late:
        raise InputError(f"--early is {early} and --late {late}: name both snapshots, or neither")
    if run is None:
        raise InputError(
            "nothing says which snapshots to blend: name their run with --run, or both with --early"
            " and --late"
        )
    say = rank_zero_only(print)
    if (pair := picked(run, blend, guidance_scale, grid)) is None:
        say(
            f"picking the pair of {run} for this blend first, as `select --run {run}` does with its"
            " settings"
        )
        select(
            run,
            blend,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            grid=grid,
            quantize=quantize,
        )
        pair = picked(run, blend, guidance_scale, grid)
        assert pair is not None  # `select` wrote it for these settings
    say(f"early {pair[0]} and late {pair[1]}, as picked in {run / 'pair.json'}")
    return str(pair[0]), str(pair[1])


def _summary(row: Row) -> Row:
    """A row as pair.json has it: its means with their standard errors, without its images."""
    return {**{k: v for k, v in row.items() if k != "images"}, "error": standard_errors(row)}


def _weights(run: Path) -> dict[str, str]:
    return {str(step): snapshots.read(path).weights for step, path in snapshots.find(run)}
