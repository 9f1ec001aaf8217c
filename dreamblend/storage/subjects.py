"""Which subjects a folder of photos has, and a run has learned.

A folder of photos has one subject. A folder of kohya's folders (`10_sks dog`) has one in each,
whose name says how often its photos are drawn, the identifier and the class noun.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamblend.errors import InputError
from dreamblend.storage.photos import has_photos

_NAME = re.compile(r"(\d+)_(\S+) +(\S.*)")
USUAL = "sks"  # the identifier where none is given


@dataclass(frozen=True)
class SubjectFolder:
    """A folder with photos of one subject.

    Args:
        path: where it is.
        identifier, class_noun: of the subject.
        repeats: how often each of its photos is drawn where one of another folder is drawn once.
    """

    path: Path
    identifier: str
    class_noun: str
    repeats: int = 1


def subject_folders(root: Path) -> list[SubjectFolder]:
    """The folders of kohya's names in a folder, by name; none where photos lie in it.

    Raises InputError for a folder of photos whose name does not say its subject, and where photos
    lie beside such folders.
    """
    root = Path(root)
    inside = sorted(root.iterdir()) if root.is_dir() else []
    folders = [p for p in inside if not p.name.startswith(".") and has_photos(p)]
    if has_photos(root):
        if named := [p.name for p in folders if _NAME.fullmatch(p.name)]:
            raise InputError(
                f"{root} holds photos beside the folder {named[0]!r}, which has a subject of its"
                " own: put them into a folder such as '1_sks dog' too, or move that folder away"
            )
        return []
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> SubjectFolder:
    match = _NAME.fullmatch(folder.name)
    if match is None or int(match[1]) < 1:
        raise InputError(
            f"the name of the photo folder {folder} does not say how often its photos are drawn,"
            " the identifier and the class noun: call it as '10_sks dog', or give a folder that"
            " holds the photos itself"
        )
    return SubjectFolder(folder, match[2], match[3].strip(), int(match[1]))


# ------------------------------------------------------------------------------------ of a snapshot
def record(folders: list[SubjectFolder]) -> list[dict[str, Any]]:
    """The subjects as a snapshot records them: each with the names of its folders."""
    subjects: dict[tuple[str, str], list[str]] = {}
    for folder in folders:
        subjects.setdefault((folder.identifier, folder.class_noun), []).append(folder.path.name)
    return [
        {"identifier": identifier, "class_noun": class_noun, "folders": names}
        for (identifier, class_noun), names in subjects.items()
    ]


def chosen(
    subjects: list[dict[str, Any]], identifier: str | None, class_noun: str | None
) -> dict[str, Any] | None:
    """The first subject that has this identifier and this class noun, each any where None."""
    wanted = {"identifier": identifier, "class_noun": class_noun}
    given = {name: word for name, word in wanted.items() if word}
    return next((s for s in subjects if {**s, **given} == s), None)
