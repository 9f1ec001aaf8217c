"""`select`: picks the pair of a run, and keeps it in RUN/pair.json for `predict`."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamblend.blending.blends import Blend, Region
from dreamblend.blending.prompts import read_seeds
from dreamblend.errors import InputError
from dreamblend.evaluation.measures import MEASURES, SHOWN
from dreamblend.processes import rank_zero_only, rank_zero_warn
from dreamblend.selection.noise import Row, standard_errors
from dreamblend.selection.probes import DRAWN, PROBES, SEEDS, drawn_with
from dreamblend.selection.rule import (
    DIVERSITY,
    PROMPT,
    WORTH,
    choose,
    choose_single,
    collapsed,
    ignores_prompts,
)
from dreamblend.storage.files import check_writable, save_text
from dreamblend.storage.runs import SUBJECT, Run, open_run

if TYPE_CHECKING:
    from dreamblend.blending.options import Options


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
    height: int | None = None,
    width: int | None = None,
    attention_layers: list[str] | None = None,
    offload: str = "none",
    base: str | None = None,
    base_config: str | None = None,
    base_prediction: str | None = None,
    identifier: str | None = None,
    class_noun: str | None = None,
    photos: Path | None = None,
    out: Path | None = None,
    scheduler: str | None = None,
    negative_prompt: str | None = None,
    guidance_rescale: float = 0.0,
    vae: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    safety_checker: bool = True,
) -> Path:
    """Measure the snapshots of a run by what they draw for probe prompts, and pick the early and
    the late one, and the best alone; writes RUN/pair.json, RUN/pair.html and RUN/checkpoints.csv.

    Several processes of the same command (of torchrun, or of srun) share the work.

    Args:
        run: folder of a train.py run, or of another trainer's checkpoints: diffusers' scripts,
            SimpleTuner, kohya sd-scripts, musubi-tuner, ai-toolkit, OneTrainer, diffusion-pipe.
        blend: the blend that the pair is for.
        prompts: a text file with one prompt a line, or the prompts; `{subject}` stands for
            identifier and class noun. Not those to be drawn later.
        seeds: such as 0-3 or 0,5,7-9.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance (7.5 is usual for Stable Diffusion).
        judges: the protocol that scores: sandbox, dreambooth, custom-diffusion, dreambench-plus;
            auto is the sandbox's for its own base, else dreambooth. none measures only what needs
            no judge, tells a last snapshot that collapsed, and picks no pair; the images are in
            RUN/checkpoints.html.
        keep: share of the base's prompt fidelity that an early snapshot must still have.
        grid: side of the attention sites that the blend reads; a quarter of the latents'
            where None.
        quantize: int8 or nf4 quantises the frozen weights of the base, for snapshots that are added
            to them.
        height: of the images, in pixels; the base's own where None.
        width: likewise.
        attention_layers: names of those that are read, or of blocks that hold them, as in predict.
        offload: none, or model, where models take turns on the GPU: less memory, more time.
        base: what the run was tuned from; as its files say where None.
        base_config: of the base, as in training.
        base_prediction: of the base, as in training.
        identifier: the subject's rare token; as the run's files say where None.
        class_noun: the subject's class; likewise.
        photos: folder of the subject's photos; likewise.
        out: folder of what is written; that of the run where None. As --run it stands for the run.
        scheduler: the sampler, by the names that predict takes; the base's own where None.
        negative_prompt: what guidance leads away from.
        guidance_rescale: against overexposure by a high guidance scale, a share from 0 to 1.
        vae: another autoencoder, as predict takes it.
        revision: of a base on the hub, as predict takes it.
        variant: of the base's weights, such as fp16, likewise.
        safety_checker: show no image on the page that the base's own safety checker takes for
            unsafe, where it has one.
    """
    from dreamblend.blending.options import Options  # after --help: it imports diffusers
    from dreamblend.evaluation.scores import table  # after --help: they import torchmetrics
    from dreamblend.report.choice import write_choice
    from dreamblend.selection.survey import Survey

    options = Options(scheduler, negative_prompt, guidance_rescale, vae=vae)
    opened = open_run(
        Path(run),
        base=base,
        base_config=base_config,
        base_prediction=base_prediction,
        identifier=identifier,
        class_noun=class_noun,
        photos=photos,
        results=out,
        revision=revision,
        variant=variant,
    )
    say = rank_zero_only(print)
    introduce(opened)
    check_writable(opened.results, "--run" if opened.results == opened.path else "--out")
    survey = Survey(
        opened,
        prompts,
        read_seeds(seeds),
        blend,
        num_inference_steps,
        guidance_scale,
        judges,
        grid,
        quantize,
        height,
        width,
        attention_layers,
        offload,
        options,
        safety_checker,
    )
    untuned, singles = survey.singles()
    diagnosed = survey.diagnosed() if judges == "none" else []
    summaries = [_summary(row) for row in (untuned, *singles)]
    if diagnosed:  # of the images' own measures those of the images count
        summaries = [{**more, **row} for more, row in zip(diagnosed, summaries)]
    record: dict[str, Any] = {
        "base": summaries[0],
        "snapshots": summaries[1:],
        "blends": [],
        "about": survey.about,
    }
    listed = opened.results / "checkpoints.csv"
    save_csv(record, opened, listed)  # now already: a run that learned nothing has no pair

    def measured(row: Row) -> Row:
        return {"kind": row["name"], **{name: row[name] for name in SHOWN}}

    if judges == "none":
        record["collapsed"] = ignores_prompts(diagnosed)
        page = write_choice(opened.results, record, survey.image_folders)
        say("\n" + table([measured(row) for row in (untuned, *singles)]))
        say(
            "\nno pair was picked, and no snapshot is called the best: without judges (--judges"
            f" none) nothing says how well the images show subject and prompt; look at {page}"
        )
        if record["collapsed"]:
            say(record["collapsed"])
        return listed
    best, why = choose_single(untuned, singles)
    choice = choose(untuned, singles, survey.blended, keep)
    record = {
        "early": choice.early,
        "late": choice.late,
        "reasons": choice.reasons,
        "best": {"step": best, "reason": why},
        "collapsed": collapsed(untuned, singles),
        **record,
        "blends": [_summary(row) for row in choice.blends],
        "weights": _weights(opened),
        **opened.told,
        "about": {**survey.about, "keep": keep, "keep_diversity": DIVERSITY, "worth": WORTH},
    }
    pair = opened.results / "pair.json"
    save_text(json.dumps(record, indent=2), pair)
    save_csv(record, opened, listed)
    page = write_choice(opened.results, record, survey.image_folders)
    say("\n" + table([measured(row) for row in (untuned, *singles, *choice.blends)]))
    say(
        f"\nearly {choice.early}: {choice.reasons['early']}\nlate {choice.late}:"
        f" {choice.reasons['late']}\nthe best alone is {best}: {why}"
    )
    if record["collapsed"]:
        say(record["collapsed"])
    say(
        f"the pair is in {pair}, the measurements are in {listed}, the curves and images in"
        f" {page.resolve()}"
    )
    return pair


def save_csv(record: dict[str, Any], run: Run, path: Path) -> None:
    """All that was measured as a table: a row for the base, each snapshot and each blend, with
    means over the images and their standard errors.
    """
    names = [name for name in record["base"] if name in MEASURES]
    errors = [name for name in names if name in record["base"]["error"]]
    kinds = ("base", record["base"]), *(("snapshot", row) for row in record["snapshots"])
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    header = ["kind", "early", "late", run.unit, "file", *names]
    writer.writerow([*header, *(f"{name}_error" for name in errors)])
    for kind, row in (*kinds, *(("blend", row) for row in record["blends"])):
        snapshot = run.snapshots.get(row.get("step", -1))
        writer.writerow(
            [
                kind,
                *(row.get(name) for name in ("early", "late", "step")),
                snapshot.path if snapshot else None,
                *(row.get(name) for name in names),
                *(row["error"].get(name) for name in errors),
            ]
        )
    save_text(text.getvalue(), path)


def introduce(run: Run) -> None:
    """Say what was recognised of another trainer's run, and what of it was left out."""
    if run.other is not None:
        rank_zero_only(print)(f"{run.path} is {run.other}")
        for note in run.other.notes:
            rank_zero_warn(note)


def picked(
    run: Run | Path,
    blend: Blend = Region(),
    guidance_scale: float = 4.0,
    grid: int | None = None,
    height: int | None = None,
    width: int | None = None,
    attention_layers: list[str] | None = None,
    options: Options | None = None,
) -> tuple[int, int] | None:
    """The pair that was picked for a run; None where there is none, where the run has other
    snapshots now, or where the pair was picked for another blend.

    The best pair depends on the blend with its settings, on the guidance scale, which weighs the
    prompt against the subject, on the size, on the layers and the grid that are read, and on
    sampler, negative prompt and guidance rescale. The denoising steps and the form of the frozen
    weights only set how exactly the images are approached; prompts, seeds and judges are the means
    of measuring. So a pair that was picked with others of these is taken.
    """
    try:
        run = run if isinstance(run, Run) else open_run(run)
        record = _record(run)
        wanted = {
            "blend": blend.settings,
            "guidance_scale": guidance_scale,
            "grid": grid,
            # these are recorded only where they are set
            "size": [height, width] if height or width else None,
            "attention_layers": attention_layers,
            "base": run.base if run.other else None,
            **dict.fromkeys(DRAWN),
            **drawn_with(options),
        }
        about = {key: record["about"].get(key) for key in wanted}
        same = about == json.loads(json.dumps(wanted))
        return (int(record["early"]), int(record["late"])) if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def last_picked(run: Run | Path) -> tuple[int, int] | None:
    """The pair that was picked last, whatever blend and settings it is for; None as `picked`."""
    try:
        record = _record(run if isinstance(run, Run) else open_run(run))
        return int(record["early"]), int(record["late"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _record(run: Run) -> dict[str, Any]:
    """The pair.json of a run. Raises ValueError where it is of other snapshots than are there."""
    record = json.loads((run.results / "pair.json").read_text())
    if record["weights"] != _weights(run):
        raise ValueError("the run has other snapshots now")
    return record


def auto_pair(
    run: Run | Path | None,
    early: str,
    late: str,
    blend: Blend,
    guidance_scale: float,
    num_inference_steps: int,
    grid: int | None,
    quantize: str | None = None,
    height: int | None = None,
    width: int | None = None,
    attention_layers: list[str] | None = None,
    offload: str = "none",
    options: Options | None = None,
    revision: str | None = None,
    variant: str | None = None,
    safety_checker: bool = True,
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
    run = run if isinstance(run, Run) else open_run(run)
    drawn = (blend, guidance_scale, grid, height, width, attention_layers, options)
    if (pair := picked(run, *drawn)) is None:
        if run.other and run.photos is None:
            raise InputError(
                f"no pair was picked yet for {run.path} and these settings, and its files do not"
                " name the subject's photos: run `select` first, which takes --photos, or name"
                " --early and --late"
            )
        say(
            f"picking the pair of {run.path} for this blend first, as `select --run {run.path}`"
            " does with its settings"
        )
        given = {
            "height": height,
            "width": width,
            "attention_layers": attention_layers,
            "offload": offload if offload != "none" else None,
            "vae": options.vae if options else None,
            "revision": revision,
            "variant": variant,
            "safety_checker": None if safety_checker else False,
            **drawn_with(options),
            **({name: getattr(run, name) for name in SUBJECT} if run.other else {}),
        }
        select(
            run.path,
            blend,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            grid=grid,
            quantize=quantize,
            **{name: value for name, value in given.items() if value is not None},
        )
        pair = picked(run, *drawn)
        assert pair is not None  # `select` wrote it for these settings
    say(f"early {pair[0]} and late {pair[1]}, as picked in {run.results / 'pair.json'}")
    return str(pair[0]), str(pair[1])


def _summary(row: Row) -> Row:
    """A row as pair.json has it: its means with their standard errors, without its images."""
    return {**{k: v for k, v in row.items() if k != "images"}, "error": standard_errors(row)}


def _weights(run: Run) -> dict[str, str]:
    return {str(step): snapshot.weights for step, snapshot in run.snapshots.items()}
