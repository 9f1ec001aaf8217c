"""Measures the snapshots of a run, and blends of them, on probe prompts: what the choice of a pair is made from.

What was measured stays in RUN/survey.json, so that an interrupted survey goes on and a repeated one measures nothing anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tqdm import tqdm

from dreamblend import snapshots
from dreamblend.blends import Blend
from dreamblend.errors import InputError
from dreamblend.evaluation.bench import Bench, means
from dreamblend.evaluation.protocols import find
from dreamblend.files import save_text
from dreamblend.models import load_backbone
from dreamblend.pair import Loaded, Pair, check_base
from dreamblend.prompts import read_prompts
from dreamblend.selection import Row
from dreamblend.snapshots import Snapshot
from dreamblend.tuning import restore

# Contexts that any base knows and that benchmarks do not ask for; none of configs/prompts.txt in these words.
PROBES = ("a picture of a {subject} in front of a brick wall", "a picture of a {subject} on the moon", "a picture of a {subject} in the city at night",
          "a picture of a {subject} under the sea", "a picture of a {subject} in a meadow", "a picture of a {subject} in the desert")
SEEDS = range(1000, 1002)  # apart from those that people begin with


class Survey:
    """The probe prompts and seeds of a run, and who judges what its snapshots draw for them.

    Args:
        run: folder of a train.py run.
        prompts: texts with `{subject}`, or a file of them.
        seeds: of the noise.
        blend: the blend that the pair is for.
        steps, scale: of sampling.
        judges: a protocol's name; `auto` is the sandbox's for its own base, `dreambooth` for others.

    Raises InputError where the run has fewer than two snapshots, or its photos are gone.
    """

    def __init__(self, run: Path, prompts: list[str] | str, seeds: list[int], blend: Blend, steps: int = 25, scale: float = 4., judges: str = "auto"):
        self.run, self.blend = run, blend
        self.found = [snapshots.read(path) for _, path in snapshots.find(run)]
        if len(self.found) < 2:
            raise InputError(f"{run} has one snapshot, and a pair needs two: train with more --snapshots.steps")
        self.of = self.found[0].about
        photos = Path(self.of.settings["instance_dir"])
        if not photos.is_dir():
            raise InputError(f"the photos of {run} are not in {photos} any more, and subject fidelity is measured by them: put them back")
        protocol = find(judges, self.of.base)
        self.device, self.dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        texts = read_prompts(prompts, self.of.identifier, self.of.class_noun)
        self.bench = Bench(photos, self.of.identifier, self.of.class_noun, texts, seeds, steps, scale, protocol=protocol, device=self.device)
        about = {"prompts": texts, "seeds": seeds, "blend": blend.settings, "steps": steps, "scale": scale, "protocol": protocol.as_dict()}
        self.about = json.loads(json.dumps(about))
        self.points = self._read()

    def singles(self) -> tuple[Row, list[Row]]:
        """The base's row, and those of the snapshots by step."""
        wanted = [None, *self.found]
        backbone = None
        rows = []
        for snapshot in tqdm(wanted, desc="snapshots"):
            key = snapshot.weights if snapshot else "base"
            if key not in self.points:
                if backbone is None:
                    backbone = load_backbone(self.of.base, self.of.settings.get("base_config")).to(self.device, self.dtype)
                    check_base(backbone, self.of)
                plain = backbone if backbone.adapters is None else backbone.bind({})
                model = restore(snapshot, backbone, "surveyed").to(self.device, self.dtype) if snapshot else plain
                self._keep(key, means(self.bench.single(model)))
                backbone.forget("surveyed")
            rows.append(self._row(snapshot, key))
        return rows[0], rows[1:]

    def blended(self, early: Snapshot) -> list[Row]:
        """The rows of the blends of `early` with each later snapshot, by the late one's name and step."""
        rows = []
        for late in tqdm(self.found[self.found.index(early) + 1 :], desc="blends"):
            key = f"{early.weights}+{late.weights}"
            if key not in self.points:
                pair = Loaded(Pair(early, late), self.of.base)
                pair.to(self.device, self.dtype)
                self._keep(key, means(self.bench.blends({"blend": self.blend}, pair.early, pair.late, pair.merged)["blend"]))
            rows.append(self._row(late, key))
        return rows

    def _row(self, snapshot: Snapshot | None, key: str) -> Row:
        return {"name": snapshot.name if snapshot else "base", "step": snapshot.about.step if snapshot else 0, **self.points[key]}

    def _keep(self, key: str, point: dict) -> None:
        self.points[key] = point
        save_text(json.dumps({"about": self.about, "points": self.points}, indent=2), self.run / "survey.json")

    def _read(self) -> dict[str, dict]:
        """What was measured before with the same settings; a damaged file is measured anew."""
        try:
            said = json.loads((self.run / "survey.json").read_text())
            return said["points"] if said["about"] == self.about else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
