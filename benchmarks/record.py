"""What was measured so far, in a file: a benchmark that was interrupted goes on from it."""

from __future__ import annotations

import json
from pathlib import Path

from dreamblend.errors import InputError
from dreamblend.storage.files import save_text


class Record(dict):
    """The entries of one JSON file, beside the settings that its numbers depend on: those that are
    there, else the empty ones.

    Raises InputError where the file is damaged, or was measured with other settings.
    """

    def __init__(self, path: Path, settings: dict, **empty: object):
        super().__init__(settings=json.loads(json.dumps(settings)), **empty)
        self.path = path
        if not path.is_file():
            return
        try:
            there = json.loads(path.read_text())
            damaged = not self.keys() <= there.keys()
        except (ValueError, AttributeError):
            damaged = True
        if damaged:
            raise InputError(f"{path} is damaged: remove it, and its points are measured again")
        if there["settings"] != self["settings"]:
            raise InputError(
                f"{path} was measured with other settings: choose another --out, or remove it"
            )
        self.update(there)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        save_text(json.dumps(self, indent=1), self.path)
