"""Subject fidelity, prompt fidelity and diversity of the images of a blend, by the sandbox's judges."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean

from PIL import Image
from torch import Tensor

from dreamblend.data import list_photos, load_photo, to_pixels
from dreamblend.sandbox.judges import load_judges
from dreamblend.sandbox.world import SIZE


def without_identifier(prompt: str, identifier: str) -> str:
    """What prompt fidelity is judged on: the identifier means nothing to a judge."""
    return " ".join(w for w in prompt.split() if w != identifier)


class SandboxScores:
    """Scores images of one subject. Pixels are (batch, 3, 64, 64) in [-1, 1].

    Args:
        photos: folder of the subject's photos.
        identifier: the subject's rare token, which no judge knows.
    """

    def __init__(self, photos: Path, identifier: str):
        self.prompt_judge, self.subject_judge = load_judges()
        self.own = self.subject_judge(to_pixels([load_photo(p, SIZE) for p in list_photos(photos)]))
        self.identifier = identifier

    def subject(self, pixels: Tensor) -> list[float]:
        """Mean cosine to the photos, of each image."""
        return (self.subject_judge(pixels) @ self.own.T).mean(1).tolist()

    def prompt(self, pixels: Tensor, prompt: str) -> list[float | None]:
        """Mean probability of what the prompt claims beside the class noun, of each image; None where it claims nothing that is known."""
        try:
            return self.prompt_judge.prompt_fidelity(pixels, without_identifier(prompt, self.identifier)).tolist()
        except ValueError:
            return [None] * len(pixels)

    def diversity(self, pixels: Tensor) -> float | None:
        """Mean pairwise distance of the images of one prompt: as LPIPS, over the judge's unit features, level by level."""
        n = len(pixels)
        distance = sum((f.unsqueeze(0) - f.unsqueeze(1)).square().sum(2).mean((2, 3)) for f in self.prompt_judge.perceptual_features(pixels))
        return (distance.sum() / (n * (n - 1))).item() if n > 1 else None


def score(out: Path, rows: list[dict], photos: Path, identifier: str) -> tuple[list[dict], list[dict]]:
    """Score the images of `rows` (lines of results.jsonl in `out`).

    Returns the rows with their scores, and a summary: one row a kind.
    """
    judge = SandboxScores(photos, identifier)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row["kind"], row["prompt"]].append(i)
    scored, diversity = [dict(row) for row in rows], defaultdict(list)
    for (kind, prompt), members in groups.items():
        pixels = to_pixels([Image.open(out / rows[i]["file"]).convert("RGB").resize((SIZE, SIZE)) for i in members])
        for i, s, p in zip(members, judge.subject(pixels), judge.prompt(pixels, prompt)):
            scored[i]["scores"] = {"subject": s, "prompt": p}
        diversity[kind].append(judge.diversity(pixels))
    return scored, summarise(scored, diversity)


def summarise(rows: list[dict], diversity: dict[str, list[float | None]]) -> list[dict]:
    """Means over the images of each kind."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    order = sorted(kinds, key=lambda k: {"early": 0, "late": 2}.get(k, 1))
    average = lambda values: mean(known) if (known := [v for v in values if v is not None]) else None
    return [
        {
            "kind": kind,
            "subject": average(r["scores"]["subject"] for r in rows if r["kind"] == kind),
            "prompt": average(r["scores"]["prompt"] for r in rows if r["kind"] == kind),
            "diversity": average(diversity.get(kind, [])),
            "overlap": average(r["collapse"]["overlap"] for r in rows if r["kind"] == kind),
            "context_mass": average(r["collapse"]["context_mass"] for r in rows if r["kind"] == kind),
            "n": sum(r["kind"] == kind for r in rows),
        }
        for kind in order
    ]


def table(summary: list[dict]) -> str:
    """The summary as text."""
    names = [k for k in summary[0] if k != "kind"]
    cell = lambda v: "-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v)
    lines = [["", *names], *([row["kind"], *(cell(row[n]) for n in names)] for row in summary)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names) + 1)]
    return "\n".join("  ".join(v.rjust(w) if i else v.ljust(w) for i, (v, w) in enumerate(zip(line, widths))) for line in lines)
