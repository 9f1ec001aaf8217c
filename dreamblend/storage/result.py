"""What is known of one image of a blend: a line of its results.jsonl."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dreamblend import renamed


@dataclass(frozen=True, kw_only=True)
class Result:
    """One image: a line of results.jsonl, and the text chunk of its PNG. The fields are in the
    order of the file.
    """

    prompt: str
    seed: int
    kind: str
    early: str | None = None
    late: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    collapse: dict[str, Any] = field(default_factory=dict)
    distance: float | None = None
    dtype: str | None = None
    file: str  # relative to the output folder
    sha256: str = ""
    scores: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)  # fields that another version writes

    @classmethod
    def of(cls, line: dict[str, Any]) -> Result:
        """Raises KeyError, TypeError, ValueError or OverflowError where the line does not describe
        an image of the folder.
        """
        if Path(str(line["file"])).is_absolute() or ".." in Path(str(line["file"])).parts:
            raise ValueError(f"{line['file']} is not in the folder")

        def text(key: str) -> str | None:
            return None if line.get(key) is None else str(line[key])

        def table(key: str) -> dict[str, Any]:
            return line[key] if isinstance(line.get(key), dict) else {}

        known = {one.name for one in fields(cls)} - {"more"}
        return cls(
            prompt=str(line["prompt"]),
            seed=int(line["seed"]),
            kind=str(line["kind"]),
            early=text("early"),
            late=text("late"),
            settings=renamed.settings(table("settings")),
            collapse=table("collapse"),
            distance=line.get("distance"),
            dtype=text("dtype"),
            file=str(line["file"]),
            sha256=text("sha256") or "",
            scores=table("scores"),
            more={key: value for key, value in line.items() if key not in known},
        )

    def line(self) -> dict[str, Any]:
        """The line of results.jsonl: all that is known."""
        known = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "more"}
        absent = [name for name in ("dtype", "scores") if not known[name]]
        return {k: v for k, v in known.items() if k not in absent} | self.more

    def provenance(self) -> dict[str, Any]:
        """The content of its PNG's text chunk: how it was made."""
        return {k: v for k, v in self.line().items() if k not in ("file", "sha256", "scores")}
