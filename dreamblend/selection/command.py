"""`select`: picks the pair of a run, and keeps it in RUN/pair.json."""

from __future__ import annotations

import json
from pathlib import Path

from dreamblend.blending.blends import Blend, Region
from dreamblend.blending.prompts import read_seeds
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
    """
    from dreamblend.evaluation.scores import table  # after --help: they import torchmetrics
    from dreamblend.report.choice import write_choice
    from dreamblend.selection.survey import Survey

    run = Path(run)
    snapshots.find(run)  # no run, nothing to write into
    check_writable(run, "--run")
    survey = Survey(
        run, prompts, read_seeds(seeds), blend, num_inference_steps, guidance_scale, judges, grid
    )
    base, singles = survey.singles()
    choice = choose(base, singles, survey.blended, keep)
    said = {
        "early": choice.early,
        "late": choice.late,
        "reasons": choice.reasons,
        "base": _told(base),
        "snapshots": [_told(row) for row in singles],
        "blends": [_told(row) for row in choice.blends],
        "weights": _weights(run),
        "about": {**survey.about, "keep": keep, "keep_diversity": DIVERSITY, "worth": WORTH},
    }
    save_text(json.dumps(said, indent=2), run / "pair.json")
    page = write_choice(run, said)

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
    """The pair that was picked for a run; None where none was, where its snapshots are other ones
    now, or where it was for another blend.

    Which pair is best depends on the blend with its settings, on the scale, which drives the prompt
    against the subject, and on the grid. The denoising steps only say how exactly the same images
    are approached, prompts, seeds and judges are the means of measuring: a pair that was picked by
    others of these is taken, as whoever picked it chose them.
    """
    try:
        said = json.loads((run / "pair.json").read_text())
        wanted = json.loads(
            json.dumps({"blend": blend.settings, "guidance_scale": guidance_scale, "grid": grid})
        )
        same = said["weights"] == _weights(run) and {k: said["about"][k] for k in wanted} == wanted
        return (int(said["early"]), int(said["late"])) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _told(row: Row) -> Row:
    """A row as pair.json has it: its means with their standard errors, and not the single
    images.
    """
    return {**{k: v for k, v in row.items() if k != "images"}, "error": standard_errors(row)}


def _weights(run: Path) -> dict[str, str]:
    return {str(step): snapshots.read(path).weights for step, path in snapshots.find(run)}
