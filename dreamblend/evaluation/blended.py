"""The measurements of a finished blend, kept in its output folder: scores of the images, and the
diagnosis of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dreamblend.evaluation.diagnosis import diagnose
from dreamblend.evaluation.measures import DIAGNOSED
from dreamblend.evaluation.protocols import find
from dreamblend.evaluation.scores import score
from dreamblend.models import Backbone
from dreamblend.storage.blend_folder import Result, read_json, save_index, save_json
from dreamblend.storage.photos import list_photos
from dreamblend.storage.snapshots import About, Snapshot
from dreamblend.storage.subjects import chosen


def photos_of(
    about: About | None, identifier: str | None = None, class_noun: str | None = None
) -> Path | list[Path] | None:
    """The training photos of a subject, where they still exist: the folder that the snapshots name,
    or the photos of one of its subjects (the run's own where none is named).
    """
    folder = (
        Path(about.settings["instance_dir"])
        if about and about.settings.get("instance_dir")
        else None
    )
    if about is None or folder is None or not folder.is_dir():
        return None
    if not (subjects := about.settings.get("subjects")):
        return folder
    subject = chosen(subjects, identifier or about.identifier, class_noun or about.class_noun)
    folders = [folder / name for name in subject["folders"]] if subject else []
    return [photo for part in folders if part.is_dir() for photo in list_photos(part)] or None


def score_blend(
    out: Path,
    results: list[Result],
    photos: Path | list[Path],
    identifier: str,
    judges: str,
    device: str | torch.device,
) -> tuple[list[Result], list[dict]]:
    """Score the images of `out` by the protocol `judges`; writes results.jsonl and summary.json.

    Returns the results with their scores, and the rows of the summary, one a kind.
    """
    protocol = find(judges)
    results, summary = score(out, results, photos, identifier, protocol, device)
    save_index(out, results)
    record = {"rows": summary, "judges": judges, "protocol": protocol.as_dict()}
    save_json(out, "summary", record)
    return results, summary


def diagnose_blend(
    out: Path,
    base: Callable[[], Backbone],
    snapshots: list[Snapshot],
    prompts: list[str],
    settings: dict[str, Any],
    numbers: dict[str, int] | None = None,
) -> list[dict]:
    """Measure the collapse of the base and of the snapshots on prompts of a blend; writes
    collapse.json.

    Args:
        base: loads the base, on the device that it will run on; called only where it is needed.
        prompts: with the identifier.
        settings: those of the blend's images.
        numbers: the step or epoch of checkpoints that do not say it themselves, by their names.

    Returns one row a model, as `diagnose` does; none where the same was measured before.
    """
    about = {
        "prompts": prompts,
        "settings": settings,
        "snapshots": [[snapshot.name, snapshot.weights] for snapshot in snapshots],
    }
    if read_json(out, "collapse", problems=[]).get("about") == about:
        return []
    names = "identifier", "class_noun", "grid", "num_inference_steps", "guidance_scale"
    side = settings["size"]
    size = (side, side) if isinstance(side, int) else tuple(side)
    given = *(settings[name] for name in names), size, settings.get("attention_layers")
    rows = diagnose(base(), snapshots, prompts, *given)
    for row in rows:
        row["step"] = (numbers or {}).get(row["name"], row["step"])
    save_json(out, "collapse", {"measures": DIAGNOSED, "snapshots": rows, "about": about})
    return rows
