"""Measures the snapshots of a run, and blends of them, on probe prompts: what the choice of a pair is made from.

What was measured stays in RUN/survey.json, so that an interrupted survey goes on and a repeated one measures nothing anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from dreamblend import snapshots
from dreamblend.blends import Blend
from dreamblend.errors import InputError
from dreamblend.evaluation.bench import Bench, means
from dreamblend.evaluation.protocols import find
from dreamblend.files import save_text, turn
from dreamblend.models import Backbone, load_backbone
from dreamblend.pair import Loaded, Pair, check_base
from dreamblend.prompts import read_prompts
from dreamblend.selection import Row
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
        self.device, self.dtype = (own_gpu(), torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        texts = read_prompts(prompts, self.of.identifier, self.of.class_noun)
        self.bench = Bench(photos, self.of.identifier, self.of.class_noun, texts, seeds, steps, scale, protocol=protocol, device=self.device)
        about = {"prompts": texts, "seeds": seeds, "blend": blend.settings, "steps": steps, "scale": scale, "protocol": protocol.as_dict()}
        self.about = json.loads(json.dumps(about))
        self.points = self._read()

    def singles(self) -> tuple[Row, list[Row]]:
        """The base's row, and those of the snapshots by step."""
        wanted = {snapshot.weights if snapshot else "base": snapshot for snapshot in (None, *self.found)}
        loaded = cache(self._load)

        def measure(key: str) -> dict:
            backbone, snapshot = loaded(), wanted[key]
            plain = backbone if backbone.adapters is None else backbone.bind({})
            model = restore(snapshot, backbone, "surveyed").to(self.device, self.dtype) if snapshot else plain
            try:
                return means(self.bench.single(model))
            finally:
                backbone.forget("surveyed")

        self._share("snapshots", list(wanted), measure)
        base, *rows = ({"name": s.name if s else "base", "step": s.about.step if s else 0, **self.points[key]} for key, s in wanted.items())
        return base, rows

    def blended(self, pairs: list[tuple[int, int]]) -> list[Row]:
        """The rows of the blends of pairs, by their early and late steps."""
        of = {snapshot.about.step: snapshot for snapshot in self.found}
        wanted = {f"{of[early].weights}+{of[late].weights}": (early, late) for early, late in pairs}

        def measure(key: str) -> dict:
            pair = Loaded(Pair(*(of[step] for step in wanted[key])), self.of.base)
            pair.to(self.device, self.dtype)
            return means(self.bench.blends({"blend": self.blend}, pair.early, pair.late, pair.merged)["blend"])

        self._share("blends", list(wanted), measure)
        return [{"name": f"{early} + {late}", "early": early, "late": late, **self.points[key]} for key, (early, late) in wanted.items()]

    def _share(self, what: str, keys: list[str], measure: Callable[[str], dict]) -> None:
        """Measure what was not measured yet. Any number of processes share this: each takes what no other is at, then waits for the rest.

        What a process was at that died is taken by another.
        """
        for wait in (False, True):
            for key in tqdm(keys, desc=what, disable=wait):
                if key in self.points:
                    continue
                with turn(self.run / ".survey" / f"{key}.lock", wait) as mine:
                    self.points |= self._read()
                    if mine and key not in self.points:
                        self._keep(key, measure(key))

    def _load(self) -> Backbone:
        backbone = load_backbone(self.of.base, self.of.settings.get("base_config"), self.of.settings.get("base_prediction")).to(self.device, self.dtype)
        check_base(backbone, self.of)
        return backbone

    def _keep(self, key: str, point: dict) -> None:
        with turn(self.run / ".survey" / "survey.lock"):
            self.points |= self._read() | {key: point}
            points = {name: self.points[name] for name in sorted(self.points)}
            save_text(json.dumps({"about": self.about, "points": points}, indent=2), self.run / "survey.json")

    def _read(self) -> dict[str, dict]:
        """What was measured before with the same settings; a damaged file is measured anew."""
        try:
            said = json.loads((self.run / "survey.json").read_text())
            return said["points"] if said["about"] == self.about else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def own_gpu() -> str:
    """The GPU of this process among those of its machine, under torchrun and SLURM."""
    number = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return f"cuda:{number % torch.cuda.device_count()}"
