"""Which two snapshots of a run to blend: measured rows in, a choice and its reasons out. No models,
no files.

A row holds the measures of a model's images of the probe prompts: name, subject, prompt_fidelity,
diversity; and the step of a snapshot, or the early and the late step of a blend. Its `images`, if
any, are the same measures of each image, with its prompt and seed; the noise is estimated from
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dreamblend.errors import InputError
from dreamblend.evaluation.measures import MEASURES
from dreamblend.selection.noise import Row, noise_of, standard_errors
from dreamblend.selection.utility import Utility

PROMPT = 0.95  # share of the base's prompt fidelity that an early snapshot still has
# and of the base's diversity, which also falls because a known subject looks like itself: only a
# large loss counts
DIVERSITY = 0.5
# share of the best blend's utility with which an earlier snapshot's blend counts as equally good,
# where the noise is smaller or not known
WORTH = 0.98
# share of the base's prompt fidelity or diversity below which a snapshot has collapsed
LOST = 0.5
# share of the base's prompt sensitivity below which it has where no judge says so: of 16 snapshots
# of two of the sandbox's subjects, those below have lost .4 to .7 of their prompt fidelity. It is a
# late sign: drawn with more steps, one with .58 had lost .8
IGNORED = 0.33


class Choice(NamedTuple):
    """A pair by its steps, why each of them, and the blends that were measured for it."""

    early: int
    late: int
    reasons: dict[str, str]
    blends: list[Row]


def choose(
    base: Row,
    singles: list[Row],
    measure: Callable[[list[tuple[int, int]]], list[Row]],
    prompt: float = PROMPT,
) -> Choice:
    """Choose the pair of a run. The latest snapshot that may be early is blended with each later
    one, which gives the late one; the late one is blended with each earlier one, which gives the
    early one.

    Args:
        base: the untuned base's row.
        singles: the snapshots' rows, by step.
        measure: gives the rows of the blends of pairs, each an early and a late step.
        prompt: share of the base's prompt fidelity that an early snapshot must still have.
    """
    last, why_early = choose_early(base, singles, prompt)
    steps = [row["step"] for row in singles]
    later = measure([(last["step"], step) for step in steps if step > last["step"]])
    best, why_late = choose_late(base, singles, later)
    earlier = measure([(step, best["late"]) for step in steps if step < last["step"]])
    pair, why_earlier = choose_earlier(base, singles, [*earlier, best])
    if earlier:
        why_early = f"{why_earlier}, of those up to step {last['step']}, where {why_early}"
    reasons = {"early": why_early, "late": why_late}
    return Choice(pair["early"], pair["late"], reasons, [*later, *earlier])


def choose_early(
    base: Row, singles: list[Row], prompt: float = PROMPT, diversity: float = DIVERSITY
) -> tuple[Row, str]:
    """The latest snapshot that may be the early one, and why: up to it prompt fidelity and
    diversity are still the base's, within a tolerance.

    The last snapshot is never the early one.

    Args:
        base: the untuned base's row.
        singles: the snapshots' rows, by step.
        prompt, diversity: shares of the base's that must be left.
    """
    if len(singles) < 2:
        raise InputError(
            "a pair needs two snapshots, and this run has one: train with more --snapshots.steps"
        )
    floor = {
        "prompt_fidelity": prompt * base["prompt_fidelity"],
        "diversity": diversity * (base["diversity"] or 0),
    }
    latest: Row | None = None
    lost = ""
    for row in singles[:-1]:
        known = [name for name in floor if row[name] is not None]
        if below := [name for name in known if row[name] < floor[name]]:
            lost = below[0]
            break
        latest = row
    if latest is None:
        why = (
            f"no snapshot keeps the base's {MEASURES[lost].title} ({base[lost]:.3f}): the earliest"
            f" has {singles[0][lost]:.3f}; keep earlier ones by --snapshots.steps"
        )
        return singles[0], why + _unsure_of_loss(singles[0], base, lost, floor[lost])
    why = (
        f"prompt fidelity {latest['prompt_fidelity']:.3f} is still the base's"
        f" {base['prompt_fidelity']:.3f}"
    )
    after = singles[singles.index(latest) + 1]
    if latest is singles[-2]:
        return (
            latest,
            f"{why}, as up to the last but one snapshot: a longer run may know the subject better",
        )
    why = (
        f"{why}; at step {after['step']} {MEASURES[lost].title} is {after[lost]:.3f}, below"
        f" {floor[lost]:.3f}"
    )
    return latest, why + _unsure_of_loss(after, base, lost, floor[lost])


# ------------------------------------------------------------------------------- one snapshot alone
def choose_single(base: Row, singles: list[Row]) -> tuple[int, str]:
    """The snapshot that is best alone, in subject and prompt together, by its step; and why, with
    its standard errors, and which others cannot be told from it.
    """
    utility = Utility(base, singles)
    row = max(singles, key=utility)
    others = [other for other in singles if other is not row]
    errors = standard_errors(row)

    def said(name: str) -> str:
        error = errors[name]
        return f"{row[name]:.3f}" + (f" ± {error:.3f}" if error is not None else "")

    why = (
        f"alone it has subject fidelity {said('subject')} and prompt fidelity"
        f" {said('prompt_fidelity')}, the best of both among {len(singles)}"
    )
    return row["step"], why + _unsure_of_choice(row, others, utility, "step")


def collapsed(base: Row, singles: list[Row]) -> str | None:
    """One sentence where the last snapshot has collapsed beyond the noise; None where it has not,
    or where that cannot be told.

    It has where half of the base's prompt fidelity or diversity is lost, or where an earlier
    snapshot shows as much of the subject and more of the prompt.
    """
    last, *earlier = reversed(singles)

    def surely(statistic: Callable[[list[Row]], float], rows: list[Row]) -> bool:
        noise = noise_of(statistic, rows)
        return noise is not None and statistic(rows) > noise

    for name in ("prompt_fidelity", "diversity"):
        if last[name] is None or base[name] is None:
            continue

        def loss(rows: list[Row], name: str = name) -> float:
            return LOST * rows[1][name] - rows[0][name]

        if surely(loss, [last, base]):
            return (
                f"the last one, {last['name']}, has collapsed: its {MEASURES[name].title} is"
                f" {last[name]:.3f}, and the base's {base[name]:.3f}"
            )
    for row in earlier:
        more = surely(
            lambda rows: rows[0]["prompt_fidelity"] - rows[1]["prompt_fidelity"], [row, last]
        )
        if more and row["subject"] >= last["subject"]:
            return (
                f"the last one, {last['name']}, is trained too far: {row['name']} has subject"
                f" fidelity {row['subject']:.3f} and prompt fidelity {row['prompt_fidelity']:.3f},"
                f" and it {last['subject']:.3f} and {last['prompt_fidelity']:.3f}"
            )
    return None


def ignores_prompts(diagnosed: list[Row]) -> str | None:
    """Likewise without judges, of the base's row and those of the snapshots in order, as
    `evaluation.diagnosis` measures them on the same noisy images: the last snapshot has collapsed
    where its prediction hardly depends on the prompt.
    """
    last = diagnosed[-1]
    share = last["prompt_sensitivity"]
    if share is None or share >= IGNORED:
        return None
    return (
        f"the last one, {last['name']}, has collapsed: its {MEASURES['prompt_sensitivity'].title}"
        f" is {share:.3f} of the base's"
    )


# --------------------------------------------------------------------------------- what is not sure
def _unsure_of_loss(row: Row, base: Row, measure: str, floor: float) -> str:
    """What a reason adds where the images do not prove that a measure is below its floor."""
    share = floor / base[measure] if base[measure] else 0.0
    noise = noise_of(lambda rows: rows[0][measure] - share * rows[1][measure], [row, base])
    return (
        f" (cannot tell for sure: the noise is {noise:.3f})"
        if noise is not None and floor - row[measure] <= noise
        else ""
    )


def _unsure_of_choice(row: Row, others: list[Row], utility: Utility, role: str) -> str:
    """What a reason adds where the images do not show which of two blends is better."""
    if not all(r.get("images") for r in (row, utility.base, *others)):
        return ""
    unknown, alike = False, []
    for other in others:
        noise = utility.noise(row, other)
        unknown = unknown or noise is None
        if noise is not None and abs(utility(row) - utility(other)) <= noise:
            alike.append(str(other[role]))
    if unknown:
        return "; cannot tell how sure that is of one image each: give more --seeds"
    return (
        f"; cannot tell it from {role} {', '.join(alike)}, whose difference is within the noise"
        if alike
        else ""
    )


# ----------------------------------------------------------------------- the late one, and the pair


def choose_late(base: Row, singles: list[Row], blended: list[Row]) -> tuple[Row, str]:
    """The best blend, in subject and prompt together, of one early snapshot with each later one;
    and why.

    A snapshot that was trained too far draws its subject no better in a blend, or loses the prompt.
    Only the blend's images show where that begins, so it is measured there and not guessed from the
    images of the snapshot alone.
    """
    utility = Utility(base, singles)
    row = max(blended, key=utility)
    why = (
        f"its blend with step {row['early']} has subject fidelity {row['subject']:.3f} and prompt"
        f" fidelity {row['prompt_fidelity']:.3f}, the best of both"
    )
    why = (
        f"{why} among {len(blended)}"
        if len(blended) > 1
        else f"{why}: there is no other later snapshot"
    )
    why += _unsure_of_choice(row, [other for other in blended if other is not row], utility, "late")
    for room, claim, than in zip(
        (utility.subject, utility.prompt),
        ("knows the subject: the best", "forgot the prompt: the worst"),
        ("more", "less"),
    ):
        if room.is_noise:
            why += (
                f"; cannot tell whether any snapshot {claim} has {room.spread:.3f} {than} than the"
                f" base, and the noise is {room.noise:.3f}"
            )
    return row, why


def choose_earlier(
    base: Row, singles: list[Row], blended: list[Row], worth: float = WORTH
) -> tuple[Row, str]:
    """The blend of the earliest snapshot that cannot be told from the best, of the blends with one
    late snapshot; and why.

    A blend loses the prompts that its early snapshot begins to forget. Probes are few and show that
    late. So a later snapshot has to be better by more than the noise.

    Args:
        blended: by the early snapshot's step.
        worth: share of the best one's utility that is as good, whatever the noise.
    """
    utility = Utility(base, singles)
    values = [utility(row) for row in blended]
    best = max(range(len(values)), key=values.__getitem__)

    def noise(number: int) -> float:
        return utility.noise(blended[best], blended[number]) or 0.0

    number = next(
        i
        for i, value in enumerate(values)
        if value >= worth * values[best] or values[best] - value <= noise(i)
    )
    row = blended[number]
    why = f"the earliest whose blend with step {row['late']} is worth " + (
        f"{worth:.0%} of the best ({values[number]:.3f} of {values[best]:.3f})"
        if values[number] >= worth * values[best]
        else f"as much as the best within the noise ({values[number]:.3f} and"
        f" {values[best]:.3f}, noise {noise(number):.3f})"
    )
    return row, why + _unsure_of_choice(
        row, [other for other in blended if other is not row], utility, "early"
    )
