"""Measures the snapshots of a run, and blends of them, on probe prompts, for the choice of a pair.

The measurements stay in RUN/survey.json with all that they depend on. So an interrupted survey goes
on, a repeated one measures nothing anew, and one for another blend or scale adds to it: what a
snapshot draws alone does not depend on the blend.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from dreamblend.blending.blends import Blend
from dreamblend.blending.pair import Models, Pair, check_base, check_quantized, drawing_dtype
from dreamblend.blending.prompts import read_prompts
from dreamblend.errors import InputError
from dreamblend.evaluation.bench import Bench, means
from dreamblend.evaluation.protocols import find
from dreamblend.models import Backbone, load_backbone
from dreamblend.models.placement import quantise
from dreamblend.selection.noise import Row
from dreamblend.storage import snapshots
from dreamblend.storage.files import locked, save_text
from dreamblend.storage.snapshots import DTYPES
from dreamblend.tuning import restore


class Survey:
    """The probe prompts and seeds of a run, and who judges what its snapshots draw for them.

    Args:
        run: folder of a train.py run.
        prompts: texts with `{subject}`, or a file of them.
        seeds: of the noise.
        blend: the blend that the pair is for.
        num_inference_steps, guidance_scale: of sampling.
        grid: side of the attention sites that the blend reads; a quarter of the latents'
            where None.
        quantize: int8 or nf4 quantises the frozen weights, as `predict` does.
        judges: a protocol's name; `auto` is the sandbox's for its own base, `dreambooth` for
            others.

    Raises InputError where the run has fewer than two snapshots, or its photos are gone.
    """

    def __init__(
        self,
        run: Path,
        prompts: list[str] | str,
        seeds: list[int],
        blend: Blend,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        judges: str = "auto",
        grid: int | None = None,
        quantize: str | None = None,
    ):
        self.run, self.blend, self.quantize = run, blend, quantize
        self.snapshots = {step: snapshots.read(path) for step, path in snapshots.find(run)}
        if len(self.snapshots) < 2:
            raise InputError(
                f"{run} has one snapshot, and a pair needs two: train with more --snapshots.steps"
            )
        of = next(iter(self.snapshots.values())).about
        assert of is not None  # a run's snapshots have a record, or `read` refuses them
        self.of = of
        check_quantized(quantize, of.method)
        photos = Path(self.of.settings["instance_dir"])
        if not photos.is_dir():
            raise InputError(
                f"the photos of {run} are not in {photos} any more, and subject fidelity is"
                " measured by them: put them back"
            )
        protocol = find(judges, self.of.base)
        self.device = own_device()
        self.dtype = drawing_dtype(self.of.method, self.device, quantize)
        texts = read_prompts(prompts, self.of.identifier, self.of.class_noun)
        self.bench = Bench(
            photos,
            self.of.identifier,
            self.of.class_noun,
            texts,
            seeds,
            num_inference_steps,
            guidance_scale,
            grid,
            protocol,
            self.device,
        )
        probes = {
            "prompts": texts,
            "seeds": seeds,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "grid": grid,
            "protocol": protocol.as_dict(),
            "dtype": self.dtype,
            **({"quantize": quantize} if quantize else {}),
        }
        self.probes, self.about = json.loads(
            json.dumps([probes, {**probes, "blend": blend.settings}])
        )
        self.points = self._read()

    def singles(self) -> tuple[Row, list[Row]]:
        """The base's row, and those of the snapshots by step."""
        wanted = {
            _key(of := {**self.probes, "models": [s.weights if s else "base"]}): (of, step, s)
            for step, s in ((0, None), *self.snapshots.items())
        }
        loaded = cache(self._load)

        def measure(key: str) -> list[dict]:
            backbone, snapshot = loaded(), wanted[key][2]
            model = (
                restore(snapshot, backbone, "surveyed").to(self.device, DTYPES[self.dtype])
                if snapshot
                else backbone.bare()
            )
            try:
                return self.bench.single(model)
            finally:
                backbone.forget("surveyed")

        self._share("snapshots", {key: of for key, (of, *_) in wanted.items()}, measure)
        base, *rows = (
            {"name": s.name if s else "base", "step": step, **self._row(key)}
            for key, (_, step, s) in wanted.items()
        )
        return base, rows

    def blended(self, pairs: list[tuple[int, int]]) -> list[Row]:
        """The rows of the blends of pairs, by their early and late steps."""
        wanted = {}
        for pair in pairs:
            of = {**self.about, "models": [self.snapshots[step].weights for step in pair]}
            wanted[_key(of)] = of, pair

        def measure(key: str) -> list[dict]:
            early, late = (self.snapshots[step] for step in wanted[key][1])
            dtype = DTYPES[self.dtype]
            models = Models.load(
                Pair(early, late), self.of.base, quantize=self.quantize, dtype=dtype
            )
            models.to(self.device, dtype)
            return self.bench.blends({"blend": self.blend}, models)["blend"]

        self._share("blends", {key: of for key, (of, _) in wanted.items()}, measure)
        return [
            {"name": f"{early} + {late}", "early": early, "late": late, **self._row(key)}
            for key, (_, (early, late)) in wanted.items()
        ]

    def _row(self, key: str) -> Row:
        images = self.points[key]["images"]
        return {**means(images), "images": images}

    def _share(
        self, what: str, keys: dict[str, dict], measure: Callable[[str], list[dict]]
    ) -> None:
        """Measure what was not measured yet. Any number of processes share this: each takes what no
        other works on, then waits for the rest.

        Where a process dies, another takes over what it worked on.
        """
        for wait in (False, True):
            for key in tqdm(keys, desc=what, disable=wait):
                if key in self.points:
                    continue
                with locked(self.run / ".survey" / f"{key}.lock", wait) as mine:
                    self.points |= self._read()
                    if mine and key not in self.points:
                        self._keep(key, {"of": keys[key], "images": measure(key)})

    def _load(self) -> Backbone:
        backbone = load_backbone(
            self.of.base,
            self.of.settings.get("base_config"),
            self.of.settings.get("base_prediction"),
            revision=self.of.settings.get("revision"),
        )
        check_base(backbone, self.of)  # before the cast, which changes its fingerprint
        if self.quantize:
            quantise(backbone, self.quantize, DTYPES[self.dtype])
        return backbone.to(self.device, DTYPES[self.dtype])

    def _keep(self, key: str, point: dict) -> None:
        with locked(self.run / ".survey" / "survey.lock"):
            self.points |= self._read() | {key: point}
            points = {name: self.points[name] for name in sorted(self.points)}
            save_text(json.dumps({"points": points}, indent=1), self.run / "survey.json")

    def _read(self) -> dict[str, dict]:
        """The measurements on disk, with any settings; damaged ones are left out."""
        try:
            points = json.loads((self.run / "survey.json").read_text())["points"]
            return {
                key: point
                for key, point in points.items()
                if point.keys() == {"of", "images"} and _key(point["of"]) == key
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def _key(of: dict) -> str:
    """The name of a measurement, from all that it depends on."""
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]


def own_device() -> str:
    """The device of work without a trainer: under torchrun and SLURM this process's GPU of the
    machine, the first one otherwise; the CPU where there is none.
    """
    if not torch.cuda.is_available():
        return "cpu"
    number = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return f"cuda:{number % torch.cuda.device_count()}"
