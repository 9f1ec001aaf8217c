"""What is exported: a snapshot, or the early and the late one merged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dreamblend.blending.models import Models, load_base
from dreamblend.blending.pair import Pair
from dreamblend.errors import InputError
from dreamblend.export import low_rank
from dreamblend.export.low_rank import LowRank
from dreamblend.models import Backbone
from dreamblend.selection.command import last_picked
from dreamblend.storage import snapshots
from dreamblend.storage.foreign import LORA
from dreamblend.storage.runs import filled
from dreamblend.storage.snapshots import About, Snapshot
from dreamblend.tuning import restore

ADAPTERS = ("lora", "t-lora")  # methods whose snapshots are LoRA files
WORDS = ("custom-diffusion", "textual-inversion")  # that learn a word


@dataclass(frozen=True)
class What:
    """What is exported, and what its user says of it.

    Args:
        snapshots: one, or the early and the late one.
        share: of the late one's weights, where there are two; the rest are the early one's.
        base, base_config, base_prediction, identifier, class_noun, revision, variant: as the
            snapshots record them where None.
    """

    snapshots: tuple[Snapshot, ...]
    share: float = 1.0
    base: str | None = None
    base_config: str | None = None
    base_prediction: str | None = None
    identifier: str | None = None
    class_noun: str | None = None
    revision: str | None = None
    variant: str | None = None

    @property
    def method(self) -> str:
        return self.snapshots[0].method

    @property
    def merged(self) -> bool:
        return len(self.snapshots) > 1

    @property
    def about(self) -> About | None:
        """The record of the snapshot, of the late one where there are two."""
        return next((s.about for s in reversed(self.snapshots) if s.about), None)

    @property
    def base_name(self) -> str:
        """Raises InputError where nothing says the base."""
        if name := self.base or (self.about and self.about.base):
            return name
        raise InputError(
            f"{self.snapshots[0].path} was made elsewhere and does not say its base: name it with"
            " --base"
        )

    @property
    def base_title(self) -> str:
        """The base as others may see it, without a path on this machine."""
        path = Path(self.base_name).expanduser()
        return path.resolve().name if path.exists() else self.base_name

    @property
    def described(self) -> str:
        """The snapshots in words."""
        names = [str(s.about.step) if s.about else s.path.name for s in self.snapshots]
        if not self.merged:
            return f"snapshot {names[0]}"
        return f"{1 - self.share:.3g} of snapshot {names[0]} and {self.share:.3g} of {names[1]}"

    @property
    def subject(self) -> str:
        """What prompts call the subject, as far as it is known: `sks mug`."""
        about = self.about
        identifier = self.identifier or (about and about.identifier) or ""
        if self.method in WORDS and identifier:
            # the learned word's name in a vocabulary
            identifier = f"<{identifier.removeprefix('<').removesuffix('>')}>"
        return f"{identifier} {self.class_noun or (about and about.class_noun) or ''}".strip()

    @property
    def said(self) -> dict[str, str | None]:
        """What `predict` is to be told of the snapshots, as `Blender` takes it."""
        about = self.about
        return {
            "base": self.base_name,
            **self._base_options,
            "identifier": self.identifier or (about.identifier if about else None),
            "class_noun": self.class_noun or (about.class_noun if about else None),
        }

    @property
    def title(self) -> str:
        return f"{self.subject}, {self.described}" if self.subject else self.described

    @property
    def _base_options(self) -> dict[str, str | None]:
        settings = self.about.settings if self.about else {}
        own = settings if self.about and self.base in (None, self.about.base) else {}
        return {
            "base_config": self.base_config or settings.get("base_config"),
            "base_prediction": self.base_prediction or settings.get("base_prediction"),
            "revision": self.revision or own.get("revision"),
            "variant": self.variant or own.get("variant"),
        }

    @cached_property
    def backbone(self) -> Backbone:
        """The base. Raises InputError where the snapshots were tuned from another."""
        return load_base(
            self.base_name,
            self.about,
            self.base_config,
            self.base_prediction,
            revision=self.revision,
            variant=self.variant,
        )

    # -- as a LoRA
    def check_low_rank(self, rank: int | None) -> None:
        """Raise InputError where this cannot be a LoRA: known before the base is loaded."""
        if self.method in WORDS:
            raise InputError(
                f"{self.snapshots[0].path} is a {self.method} snapshot, which learned a word that a"
                " LoRA cannot hold: export it with --form pipeline"
            )
        if self.method not in ADAPTERS and rank is None:
            raise InputError(
                f"{self.snapshots[0].path} is a snapshot of all weights: export it with --form"
                " pipeline or single_file, or extract a LoRA of some rank with --rank, such as 64"
            )
        if self.method == "t-lora" and (rank or self.merged):
            raise InputError(
                "T-LoRA masks the directions of its factors by timestep, and other factors would"
                " be masked wrongly: leave out --rank and --merge"
            )

    def low_rank(self, rank: int | None) -> tuple[LowRank, float]:
        """The weights as a LoRA, and the share of the squared norm of the change that it keeps.

        Args:
            rank: to reduce a LoRA to, or to extract from all weights; as it is where None.
        """
        self.check_low_rank(rank)
        base = self.backbone
        if self.method not in ADAPTERS:
            assert rank is not None  # as was checked
            return low_rank.extracted(base.parts(), self._replaced().parts(), rank)
        weights = self._adapters()
        return (weights, 1.0) if rank is None else low_rank.reduced(weights, rank)

    def _adapters(self) -> LowRank:
        parts, name = self.backbone.parts(), self.backbone.base
        read = [low_rank.read(snapshot.path, parts, name) for snapshot in self.snapshots]
        return low_rank.mixed(zip(self._shares, read)) if self.merged else read[0]

    @property
    def _shares(self) -> tuple[float, ...]:
        return (1 - self.share, self.share)

    @property
    def rank_mask(self) -> dict[str, Any]:
        """The settings of T-LoRA's mask, as its file has them."""
        if self.method != "t-lora":
            return {}
        path = self.snapshots[0].path
        with safe_open(path / LORA if path.is_dir() else path, framework="pt") as file:
            settings = json.loads(file.metadata()["lora_adapter_metadata"])
        return {key: value for key, value in settings.items() if key.startswith("t_lora.")}

    # -- as a model
    def check_model(self) -> None:
        """Raise InputError where this cannot be plain weights: known before the base is loaded."""
        if self.method == "t-lora":
            raise InputError(
                "T-LoRA masks its directions by timestep, which weights cannot hold: export it with"
                " --form diffusers"
            )

    def model(self, dtype: torch.dtype | None = None) -> Backbone:
        """The model with these weights and no adapters, in `dtype`: as the base is loaded where
        None.
        """
        self.check_model()
        if dtype == torch.float32:  # before weights are added
            self.backbone.to(dtype=dtype)
        if self.method in ADAPTERS:
            parts = self.backbone.parts()
            model = self.backbone.sharing(**low_rank.added(self._adapters(), parts))
        else:
            model = self._replaced()
        return model if dtype is None else model.to(dtype=dtype)

    def _replaced(self) -> Backbone:
        """The model of snapshots that replace weights, or learned a word."""
        if not self.merged:
            return restore(self.snapshots[0], self.backbone, "late", self.identifier)
        early, late = (
            restore(snapshot, self.backbone, name, self.identifier)
            for snapshot, name in zip(self.snapshots, ("early", "late"))
        )
        return Models(early, late, self.backbone).merged(self.share)


def find(
    run: Path | None,
    snapshot: str | None,
    early: str | None,
    late: str | None,
    merge: float | None,
    **said: Any,
) -> dict[str, What]:
    """What the options name: one thing under the name "", or the two of a pair under theirs.

    Args:
        run: folder of a run, whose steps the others may name.
        snapshot: one alone.
        early, late: a pair; the one that `select` picked where neither is named.
        merge: share of the late one's weights in a merge of the pair.
        said: what the user says of it, as `What` takes it; the files of another trainer's run
            say what is None.
    """
    said = filled(run, **said)
    if snapshot is not None:
        if early or late or merge is not None:
            raise InputError(
                "--snapshot is one snapshot, and --early, --late and --merge are of a pair: name"
                " one or the other"
            )
        return {"": What((snapshots.read(snapshots.resolve(run, snapshot)),), **said)}
    if merge is not None and not 0 <= merge <= 1:
        raise InputError(f"--merge is {merge}: it is the late snapshot's share, from 0 to 1")
    if not early and not late:
        early, late = _picked(run)
    if not (early and late):
        raise InputError(
            f"--early is {early} and --late {late}: name both, or one snapshot with --snapshot"
        )
    pair = Pair.find(run, early, late)
    if merge is not None:
        return {"": What((pair.early, pair.late), merge, **said)}
    return {"early": What((pair.early,), **said), "late": What((pair.late,), **said)}


def _picked(run: Path | None) -> tuple[str, str]:
    """The pair that `select` picked, whatever the blend was."""
    if run is None:
        raise InputError(
            "nothing says what to export: name a snapshot with --snapshot, two with --early and"
            " --late, or the run whose pair is meant with --run"
        )
    if (pair := last_picked(run)) is None:
        raise InputError(
            f"{run} has no picked pair of the snapshots that it has now: run `select --run {run}`"
            " first, or name a snapshot with --snapshot"
        )
    return str(pair[0]), str(pair[1])
