"""Measures the snapshots of a run, and blends of them, on probe prompts, for the choice of a pair.

The measurements stay in RUN/survey.json with all that they depend on. So an interrupted survey goes
on, a repeated one measures nothing anew, and one for another blend or scale adds to it: what a
snapshot draws alone does not depend on the blend.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from dreamblend.blending.blends import Blend
from dreamblend.blending.models import (
    Models,
    check_quantized,
    drawing_dtype,
    load_base,
    warn_of_other_vae,
)
from dreamblend.blending.options import Options, check_layers, check_size
from dreamblend.blending.pair import Pair
from dreamblend.blending.picture import Picture
from dreamblend.blending.prompts import named, read_prompts
from dreamblend.errors import InputError
from dreamblend.evaluation.bench import Bench, means
from dreamblend.evaluation.blended import photos_of
from dreamblend.evaluation.diagnosis import diagnose
from dreamblend.evaluation.protocols import find
from dreamblend.models import Backbone
from dreamblend.models.loading import check_version
from dreamblend.models.placement import Turns, check_offload, place, quantise
from dreamblend.selection.noise import Row
from dreamblend.selection.probes import drawn_with
from dreamblend.storage.files import locked, save_png, save_text
from dreamblend.storage.runs import Run, open_run
from dreamblend.storage.snapshots import DTYPES
from dreamblend.tuning import restore

LARGEST = 256  # longest side of the images that are kept of each snapshot, in pixels


class Survey:
    """The probe prompts and seeds of a run, and who judges what its snapshots draw for them.

    Args:
        run: a run, or its folder.
        prompts: texts with `{subject}`, or a file of them.
        seeds: of the noise.
        blend: the blend that the pair is for.
        num_inference_steps, guidance_scale: of sampling.
        grid: side of the attention sites that the blend reads; a quarter of the latents'
            where None.
        quantize: int8 or nf4 quantises the frozen weights, as `predict` does.
        judges: a protocol's name; `auto` is the sandbox's for its own base, `dreambooth` for
            others. `none` measures only what needs no judge.
        height, width: of the images, in pixels; the base's own where None.
        attention_layers: those that are read, as in `predict`.
        offload: none, or model, where models take turns on the device.
        options: of drawing: scheduler, negative_prompt, guidance_rescale and vae.
        safety_checker: keep no image that the base's own safety checker takes for unsafe.

    Raises InputError where the run has fewer than two snapshots, where it does not say its base or
    its subject, or where its photos are gone.
    """

    def __init__(
        self,
        run: Run | Path,
        prompts: list[str] | str,
        seeds: list[int],
        blend: Blend,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        judges: str = "auto",
        grid: int | None = None,
        quantize: str | None = None,
        height: int | None = None,
        width: int | None = None,
        attention_layers: list[str] | None = None,
        offload: str = "none",
        options: Options = Options(),
        safety_checker: bool = True,
    ):
        self.run = run if isinstance(run, Run) else open_run(run)
        self.blend, self.quantize, self.options = blend, quantize, options
        self.safety_checker = safety_checker
        check_size(height, width, prefix="--")
        check_layers(attention_layers, prefix="")
        check_offload(offload)
        self.snapshots = self.run.snapshots
        if len(self.snapshots) < 2:
            more = (
                "keep more checkpoints" if self.run.other else "train with more --snapshots.steps"
            )
            raise InputError(f"{self.run.path} has one snapshot, and a pair needs two: {more}")
        check_quantized(quantize, self.run.method)
        self.run.demand("base", "identifier", "class_noun", *["photos"] * (judges != "none"))
        self.base, identifier = self.run.base or "", self.run.identifier or ""
        self.identifier, self.class_noun = identifier, self.run.class_noun or ""
        check_version(self.base, self.run.revision, self.run.variant)
        photos = self._photos() if judges != "none" else None
        protocol = None if judges == "none" else find(judges, self.base)
        self.device = own_device()
        self.dtype = drawing_dtype(self.run.method, self.device, quantize)
        self._turns = Turns(torch.device(self.device)) if offload == "model" else None
        texts = read_prompts(prompts, identifier, self.class_noun)
        self.bench = Bench(
            photos,
            identifier,
            self.class_noun,
            texts,
            seeds,
            num_inference_steps,
            guidance_scale,
            grid,
            protocol,
            self.device,
            size=(height, width),
            layers=attention_layers,
            options=options,
        )
        # a setting is recorded where it is set: what was measured before has no other
        elsewhere = {"base": self.base, "photos": str(photos)} if self.run.other else {}
        with_ = {"vae": options.vae, "revision": self.run.revision, "variant": self.run.variant}
        sized = {"size": [height, width]} if height or width else {}
        probes = {
            "prompts": texts,
            "seeds": seeds,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "grid": grid,
            "protocol": protocol.as_dict() if protocol else None,
            "dtype": self.dtype,
            **({"quantize": quantize} if quantize else {}),
            **({"attention_layers": attention_layers} if attention_layers else {}),
            **sized,
            **({} if safety_checker else {"safety_checker": False}),
            **drawn_with(options),
            **{name: value for name, value in with_.items() if value is not None},
            **elsewhere,
        }
        self.probes, self.about = json.loads(
            json.dumps([probes, {**probes, "blend": blend.settings}])
        )
        self.image_folders: dict[str, Path] = {}  # of `singles`, by a row's name
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
                restore(snapshot, backbone, "surveyed", self.identifier)
                if snapshot
                else backbone.bare()
            )
            self._place(model)
            try:
                return self.bench.single(model, lambda picture: self._keep_image(key, picture))
            finally:
                backbone.forget("surveyed")

        self._share("snapshots", {key: of for key, (of, *_) in wanted.items()}, measure)
        base, *rows = (
            {"name": str(step) if s else "base", "step": step, **self._row(key)}
            for key, (_, step, s) in wanted.items()
        )
        for row, key in zip((base, *rows), wanted):
            self.image_folders[row["name"]] = self._image_folder(key)
        return base, rows

    def diagnosed(self) -> list[Row]:
        """What shows collapse without judges, of the base and of the snapshots by step: the
        measures of each on the same noisy images (`evaluation.diagnosis`).
        """
        weights = ["base", *(snapshot.weights for snapshot in self.snapshots.values())]
        of = {**self.probes, "models": weights, "diagnosed": True}

        def measure(key: str) -> list[dict]:
            base, bench = self._load(), self.bench
            height, width = (side or base.size for side in bench.size)
            grid = bench.grid or base.default_grid(base.latent_size(height, width), bench.layers)
            return diagnose(
                base,
                self.snapshots.values(),
                self.probes["prompts"],
                self.identifier,
                self.class_noun,
                grid,
                bench.num_inference_steps,
                bench.guidance_scale,
                (height, width),
                bench.layers,
            )

        self._share("collapse", {(key := _key(of)): of}, measure)
        steps = (0, *self.snapshots)
        return [
            {**row, "name": str(step) if step else "base", "step": step}
            for step, row in zip(steps, self.points[key]["images"])
        ]

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
                Pair(early, late),
                self.base,
                self.identifier,
                self.run.base_config,
                self.run.base_prediction,
                self.quantize,
                dtype,
                revision=self.run.revision,
                variant=self.run.variant,
                trained_vae=self.options.vae is None,
            )
            self.options.apply(models)
            self._place(models.early, models.late)
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
                with locked(self.run.results / ".survey" / f"{key}.lock", wait) as mine:
                    self.points |= self._read()
                    if mine and key not in self.points:
                        self._keep(key, {"of": keys[key], "images": measure(key)})

    def _photos(self) -> Path | list[Path]:
        """The subject's: of one of the subjects of the run's folder, where it has several."""
        about, folder = self.run.about, self.run.photos
        assert folder is not None  # it is demanded before
        own = about is not None and folder == Path(about.settings["instance_dir"])
        photos = photos_of(about, self.identifier, self.class_noun) if own else folder
        if photos is None or not folder.is_dir():
            raise InputError(
                f"the photos of {self.run.path} are not in {folder} any more, and subject fidelity"
                " is measured by them: put them back, or name their folder with --photos"
            )
        return photos

    def _load(self) -> Backbone:
        run = self.run
        backbone = load_base(
            self.base,
            run.about,
            run.base_config,
            run.base_prediction,
            revision=run.revision,
            variant=run.variant,
            trained_vae=self.options.vae is None,
            safety_checker=self.safety_checker,
        )
        self.options.check(backbone, self.bench.guidance_scale)
        self.blend.check(backbone, self.bench.guidance_scale)
        self.options.apply(Models(backbone, backbone, backbone))
        warn_of_other_vae(run.about, backbone)
        if self.quantize:
            quantise(backbone, self.quantize, DTYPES[self.dtype])
        self._place(backbone)
        return backbone

    def _place(self, *models: Backbone) -> None:
        """Move models to the device, or let them take turns there."""
        for model in models:
            place(model, self.device, DTYPES[self.dtype], self._turns)

    # -- the images of each snapshot alone, small, for a page
    def _image_folder(self, key: str) -> Path:
        return self.run.results / ".survey" / key

    def _keep_image(self, key: str, picture: Picture) -> None:
        if picture.flagged:
            warnings.warn(
                "unsafe by the base's safety checker, and not shown on the page:"
                f" {named([(picture.prompt, picture.seed)])}",
                stacklevel=2,
            )
            return
        number = self.probes["prompts"].index(picture.prompt)
        small = picture.image.copy()
        small.thumbnail((LARGEST, LARGEST))
        save_png(small, self._image_folder(key) / f"{number}-{picture.seed}.png")

    def _keep(self, key: str, point: dict) -> None:
        with locked(self.run.results / ".survey" / "survey.lock"):
            self.points |= self._read() | {key: point}
            points = {name: self.points[name] for name in sorted(self.points)}
            save_text(json.dumps({"points": points}, indent=1), self.run.results / "survey.json")

    def _read(self) -> dict[str, dict]:
        """The measurements on disk, with any settings; damaged ones are left out."""
        try:
            points = json.loads((self.run.results / "survey.json").read_text())["points"]
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
