"""Which two snapshots of a run to blend: measured rows in, a choice and its reasons out. No models, no files.

A row says what a model's images on the probe prompts were like: name, subject, prompt_fidelity, diversity; and of which step it
is, or of which early and late ones where it is a blend's.
"""

from __future__ import annotations

from dreamblend.errors import InputError

Row = dict[str, float | str | int | None]
PROMPT = .95  # share of the base's prompt fidelity that an early snapshot still has
DIVERSITY = .5  # and of the base's diversity, which falls also because a known subject looks like itself: only its ruin counts
WORTH = .98  # share of the best blend's utility with which an earlier snapshot's blend is as good: what it has less is noise, what it forgot less is not


def choose_early(base: Row, singles: list[Row], prompt: float = PROMPT, diversity: float = DIVERSITY) -> tuple[Row, str]:
    """The latest snapshot that may be the early one: up to it prompt fidelity and diversity are still the base's, within a tolerance; and why.

    The last snapshot is never it.

    Args:
        base: the untuned base's row.
        singles: the snapshots' rows, by step.
        prompt, diversity: shares of the base's that must be left.
    """
    if len(singles) < 2:
        raise InputError("a pair needs two snapshots, and this run has one: train with more --snapshots.steps")
    floor = {"prompt_fidelity": prompt * base["prompt_fidelity"], "diversity": diversity * (base["diversity"] or 0)}
    found = None
    for row in singles[:-1]:
        if lost := next((name for name, least in floor.items() if row[name] is not None and row[name] < least), None):
            break
        found = row
    named = {"prompt_fidelity": "prompt fidelity", "diversity": "diversity"}
    if found is None:
        why = f"no snapshot keeps the base's {named[lost]} ({base[lost]:.3f}): the earliest has {singles[0][lost]:.3f}; keep earlier ones by --snapshots.steps"
        return singles[0], why
    why = f"prompt fidelity {found['prompt_fidelity']:.3f} is still the base's {base['prompt_fidelity']:.3f}"
    after = singles[singles.index(found) + 1]
    if found is singles[-2]:
        return found, f"{why}, as up to the last but one snapshot: a longer run may know the subject better"
    return found, f"{why}; at step {after['step']} {named[lost]} is {after[lost]:.3f}, below {floor[lost]:.3f}"


def utility(row: Row, base: Row, singles: list[Row]) -> float:
    """Harmonic mean of what is there of the subject and of the prompt, each on the run's own scale; 0 where either is lost.

    Subject fidelity counts from the base's (0) to the best snapshot's (1), prompt fidelity from the worst snapshot's (0) to the
    base's (1): so it means the same for a probability and for a cosine of CLIP, which hardly leaves .25 to .32.
    """
    best, worst = max(s["subject"] for s in singles), min(s["prompt_fidelity"] for s in singles)
    if best <= base["subject"]:
        raise InputError("no snapshot shows more of the subject than the base: train longer, or with a higher --model.rate")
    subject = max(0., (row["subject"] - base["subject"]) / (best - base["subject"]))
    room = base["prompt_fidelity"] - worst
    prompt = max(0., (row["prompt_fidelity"] - worst) / room) if room > 0 else 1.  # nothing was forgotten
    return 2 * subject * prompt / (subject + prompt) if subject and prompt else 0.


def choose_late(base: Row, singles: list[Row], blended: list[Row]) -> tuple[Row, str]:
    """The blend that has most of both subject and prompt, of one early snapshot with each later one; and why.

    A snapshot trained too far draws its subject in a blend no better, or takes the prompt with it; where that begins shows in
    the blend's images alone, so it is measured there and not guessed from the snapshot's own.
    """
    worth = [utility(row, base, singles) for row in blended]
    row = blended[max(range(len(blended)), key=worth.__getitem__)]
    why = f"its blend with step {row['early']} has subject fidelity {row['subject']:.3f} and prompt fidelity {row['prompt_fidelity']:.3f}, the best of both"
    return row, f"{why} among {len(blended)}" if len(blended) > 1 else f"{why}: there is no other later snapshot"


def choose_earlier(base: Row, singles: list[Row], blended: list[Row], worth: float = WORTH) -> tuple[Row, str]:
    """The blend of the earliest snapshot that is worth nearly as much as the best, of those with one late snapshot; and why.

    Prompts that an early snapshot begins to forget, it forgets in the blend: easy probe prompts show that later than hard ones do.

    Args:
        blended: by the early snapshot's step.
        worth: share of the best one's utility.
    """
    values = [utility(row, base, singles) for row in blended]
    number = next(i for i, value in enumerate(values) if value >= worth * max(values))
    row = blended[number]
    return row, f"the earliest whose blend with step {row['late']} is worth {worth:.0%} of the best ({values[number]:.3f} of {max(values):.3f})"
