"""The two snapshots of a blend on disk, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dreamblend.errors import InputError
from dreamblend.processes import rank_zero_warn
from dreamblend.storage import snapshots
from dreamblend.storage.snapshots import Snapshot
from dreamblend.storage.subjects import chosen


@dataclass(frozen=True)
class Pair:
    """An early and a late snapshot on disk."""

    early: Snapshot
    late: Snapshot

    @staticmethod
    def find(run: Path | None, early: str, late: str) -> Pair:
        """Find, verify and compare both. Raises InputError where they cannot be blended."""
        pair = Pair(*(snapshots.read(snapshots.resolve(run, which)) for which in (early, late)))
        a, b = pair.early, pair.late
        if a.path.resolve() == b.path.resolve():
            raise InputError(
                f"early and late are the same snapshot ({a.path}): choose two different steps"
            )
        if a.method != b.method:
            raise InputError(
                f"early is a {a.method} snapshot and late a {b.method} one: a blend takes both from"
                " one run"
            )
        if a.about and b.about:
            if a.about.base_hash != b.about.base_hash:
                bases = f"{a.about.base} and {b.about.base}"
                raise InputError(
                    f"early and late were tuned from different bases ({bases}): a blend takes both"
                    " from one run"
                )
            subjects = [f"{about.identifier} {about.class_noun}" for about in (a.about, b.about)]
            if subjects[0] != subjects[1]:
                raise InputError(
                    f"early knows '{subjects[0]}' and late '{subjects[1]}': a blend takes both from"
                    " one run"
                )
            if a.about.step > b.about.step:
                raise InputError(
                    f"early is step {a.about.step} and late step {b.about.step}: exchange them"
                )
            photos = [about.settings.get("instance_dir") for about in (a.about, b.about)]
            if photos[0] != photos[1]:  # one subject may have had two folders
                rank_zero_warn(
                    f"early was trained on the photos in {photos[0]} and late on those in"
                    f" {photos[1]}: a blend takes both from one run"
                )
        return pair

    @property
    def about(self) -> snapshots.About | None:
        return self.early.about or self.late.about

    def recorded(self, name: str) -> str:
        """The base, identifier or class noun that the snapshots record.

        Raises InputError where they were made elsewhere.
        """
        if self.about is None:
            raise InputError(
                f"these snapshots were made elsewhere and do not say their {name}: give it with"
                f" --model.{name}, or in Python as {name}="
            )
        return getattr(self.about, name)

    def subject(self, identifier: str | None, class_noun: str | None) -> tuple[str, str]:
        """The identifier and the class noun to draw: of the subject of the run that has those
        which are given, as the snapshots record them where None.
        """
        learned = self.about.settings.get("subjects", []) if self.about else []
        named = chosen(learned, identifier, class_noun) if identifier or class_noun else None
        named = named or {}
        return (
            identifier or named.get("identifier") or self.recorded("identifier"),
            class_noun or named.get("class_noun") or self.recorded("class_noun"),
        )
