"""A benchmark: every tuning method and blend on the same subjects, prompts and seeds, in jobs that
run side by side and can be interrupted.

OUT/runs/<subject>/<method>/           the training run
OUT/points/<subject>/<method>.json     what was measured of it so far
OUT/results.json                       all of it together, once everything is there
OUT/tables.md                          the answers to what is asked of it, and its tables
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks.questions import answers
from benchmarks.record import Record
from benchmarks.tables import of_results
from benchmarks.training import IDENTIFIER, Recipe, Subject, bench_of, device, load_pair, tune
from dreamblend.blending.blends import Early
from dreamblend.blending.models import Models
from dreamblend.blending.picture import Picture
from dreamblend.evaluation.bench import means
from dreamblend.evaluation.diagnosis import diagnose
from dreamblend.evaluation.measures import DIAGNOSED, IMAGE_COLLAPSE
from dreamblend.evaluation.outcome import outcome
from dreamblend.evaluation.protocols import find
from dreamblend.models import load_backbone
from dreamblend.storage import snapshots
from dreamblend.storage.files import save_png, save_text
from dreamblend.storage.snapshots import DTYPES
from dreamblend.tuning import restore

BASE = Recipe("base", None, 0.0)  # nothing is tuned: step 0 of every method, measured once


@dataclass(frozen=True)
class Study:
    """What is measured: `subjects` x `recipes`, each snapshot alone and each of its
    blends.

    steps: of the snapshots of recipes that have none of their own.
    seeds: images of each prompt.
    sampling, scale: denoising steps, and the scale of classifier-free guidance.
    batch: images that are drawn at once.
    more: what results.json says beside the results.
    questions: that it answers, as `benchmarks.questions` knows them.
    """

    name: str
    out: Path
    base: str
    subjects: tuple[Subject, ...]
    recipes: tuple[Recipe, ...]
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    protocol: str
    sampling: int = 25
    scale: float = 4.0
    dtype: str = "fp32"
    batch: int = 16
    more: dict = field(default_factory=dict)
    questions: tuple[dict, ...] = ()

    # -- what there is to do
    @property
    def jobs(self) -> list[tuple[Subject, Recipe]]:
        """One a subject and method. Those of one method follow each other, so that shards are of
        one length.
        """
        return [(subject, recipe) for recipe in (BASE, *self.recipes) for subject in self.subjects]

    def wanted(self, recipe: Recipe) -> list[str]:
        """The points of a job: its snapshots, then the blends."""
        if recipe is BASE:
            return ["0"]
        return [*map(str, self.steps_of(recipe)), *(setting.label for setting in recipe.blends)]

    def steps_of(self, recipe: Recipe) -> tuple[int, ...]:
        return recipe.steps or self.steps

    @property
    def settings(self) -> dict:
        """What every number depends on; measured points of other settings are not taken for
        these.
        """
        prompts = {s.name: s.prompts for s in self.subjects}
        digest = hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:16]
        return {
            "base": self.base,
            "prompts": digest,
            "seeds": list(self.seeds),
            "protocol": self.protocol,
            "sampling": self.sampling,
            "scale": self.scale,
            "dtype": self.dtype,
        }

    def of(self, recipe: Recipe) -> dict:
        """What the numbers of one method depend on."""
        return {**self.settings, **recipe.settings, "last": self.steps_of(recipe)[-1]}

    def path(self, subject: Subject, recipe: Recipe) -> Path:
        return self.out / "points" / subject.name / f"{recipe.name}.json"

    @property
    def tables(self) -> Path:
        return self.out / "tables.md"

    def example(self, subject: Subject, recipe: Recipe, point: str, number: int) -> Path:
        return self.out / "examples" / subject.name / recipe.name / f"{slug(point)}-{number}.png"

    def images(self) -> Counter[float]:
        """How many are drawn in all, by passes of the denoiser in each of their steps."""
        count: Counter[float] = Counter()
        for subject, recipe in self.jobs:
            each = (len(subject.prompts) + 1) * len(self.seeds)
            count[Early.passes] += each * (len(self.wanted(recipe)) - len(recipe.blends))
            for setting in recipe.blends:
                count[setting.blend.passes] += each
        return count

    def updates(self) -> int:
        """Optimizer steps of all runs."""
        return sum(self.steps_of(r)[-1] for _, r in self.jobs if r is not BASE)

    # -- one job
    def work(self, subject: Subject, recipe: Recipe, blends: bool) -> None:
        """Train, and measure what was not measured yet of the snapshots or of the blends."""
        record = self.record(subject, recipe)
        points = record["points"]
        if not (
            missing := [
                name
                for name in self.wanted(recipe)
                if name not in points and name.isdecimal() != blends
            ]
        ):
            return
        run = self.out / "runs" / subject.name / recipe.name
        if recipe is not BASE:
            priors = self.out / "priors" / subject.class_noun
            tune(self.base, recipe, subject, self.steps_of(recipe), run, priors)
        where = (device(), DTYPES[self.dtype])
        drawn = {"guidance_scale": self.scale, "protocol": self.protocol, "batch": self.batch}
        bench_on = partial(bench_of, subject, self.seeds, self.sampling, **drawn)

        chosen = (subject.prompts[0], subject.prompts[-1])  # for the report's eyes

        def save(picture: Picture) -> None:
            if picture.prompt in chosen and picture.seed == self.seeds[0]:
                path = self.example(subject, recipe, picture.kind, chosen.index(picture.prompt))
                save_png(picture.image, path)
                picture.save_maps(path.with_suffix(".safetensors"))

        collapse: dict[str, dict] = {}  # of snapshots, over the same noisy latents

        def keep(name: str, rows: list[dict], prior: float) -> None:
            points[name] = {**collapse.get(name, {}), **means(rows), "prior": prior}
            record.save()

        if not blends:
            bench, backbone = bench_on(), load_backbone(self.base).to(*where)
            tuned = {
                name: snapshots.read(snapshots.folder(run / "snapshots", int(name)))
                for name in missing
                if recipe is not BASE
            }
            read = diagnose(
                *(backbone, tuned.values(), list(subject.prompts), IDENTIFIER, subject.class_noun),
                *(backbone.default_grid(), self.sampling, self.scale),
            )
            # what is read of the images themselves has the same names, and counts
            collapse |= {
                str(row["step"]): {k: row[k] for k in DIAGNOSED if k not in IMAGE_COLLAPSE}
                for row in read
            }
            for name in tqdm(missing, desc=f"{subject.name} {recipe.name}"):
                found = tuned.get(name)
                model = restore(found, backbone, "single").to(*where) if found else backbone
                alone = Models(model, model, backbone)
                keep(
                    name,
                    bench.blends({name: Early()}, alone, save)[name],
                    bench.prior({name: Early()}, alone)[name],
                )
                backbone.forget("single")
            return
        todo = [setting for setting in recipe.blends if setting.label in missing]
        for pair, grid in dict.fromkeys((s.pair or recipe.pair, s.grid) for s in todo):
            assert pair is not None, "blends are of a pair"
            models = load_pair(run, pair, self.base, where[1])
            bench = bench_on(grid=grid)
            all_of = {
                s.label: s.blend for s in todo if (s.pair or recipe.pair, s.grid) == (pair, grid)
            }
            guided = {
                name: blend for name, blend in all_of.items() if blend.guided_steps(self.sampling)
            }  # one reference serves them all
            rest = [{name: blend} for name, blend in all_of.items() if name not in guided]
            for group in tqdm(
                [g for g in (guided, *rest) if g],
                desc=f"{subject.name} {recipe.name} blends of {pair[0]} and {pair[1]}",
            ):
                priors = bench.prior(group, models)
                for name, rows in bench.blends(group, models, save).items():
                    keep(name, rows, priors[name])

    def record(self, subject: Subject, recipe: Recipe) -> Record:
        """What was measured of a job with these settings."""
        return Record(self.path(subject, recipe), self.of(recipe), points={})

    # -- all of them
    def run(self, shard: slice = slice(None)) -> None:
        """Do the jobs of a shard: the snapshots of all, then the blends."""
        for blends in (False, True):
            for subject, recipe in self.jobs[shard]:
                self.work(subject, recipe, blends)

    def finish(self) -> dict | None:
        """Write OUT/results.json and return it; None while jobs are missing."""
        found: dict[tuple[str, str], dict] = {}
        for s, r in self.jobs:  # a folder may have points of another plan, too
            points = self.record(s, r)["points"]
            found[s.name, r.name] = {n: points[n] for n in self.wanted(r) if n in points}
        if missing := [
            f"{s.name}/{r.name}"
            for s, r in self.jobs
            if any(n not in found[s.name, r.name] for n in self.wanted(r))
        ]:
            print(
                f"{len(missing)} of {len(self.jobs)} jobs are not finished yet, such as"
                f" {missing[0]}: run the same command to go on"
            )
            return None
        both = {
            (s, r): found[s, BASE.name] | points
            for (s, r), points in found.items()
            if r != BASE.name
        }
        kinds = {s.label: s.settings for recipe in self.recipes for s in recipe.blends}
        pairs = {r.name: r.pair for r in self.recipes}
        results = {
            "benchmark": self.name,
            "protocol": find(self.protocol).as_dict(),
            "settings": {**self.settings, "recipes": {r.name: r.settings for r in self.recipes}},
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("torch", "diffusers", "transformers", "peft")
            },
            **outcome(both, kinds, pairs),
            "examples": self._examples(),
            **self.more,
        }
        if self.questions:
            results["questions"] = answers(self.questions, results, self.out)
        save_text(of_results(results) + "\n", self.tables)
        save_text(json.dumps(results, indent=1), self.out / "results.json")
        return results

    def _examples(self) -> list[dict]:
        """The first and the last prompt of each subject with the first seed, by point."""
        found = []
        for subject in self.subjects:
            for number, prompt in enumerate((subject.prompts[0], subject.prompts[-1])):
                paths = {
                    f"{r.name} {n}": self.example(subject, r, n, number)
                    for r in self.recipes
                    for n in self.wanted(r)
                }
                paths |= {
                    f"{r.name} 0": self.example(subject, BASE, "0", number) for r in self.recipes
                }
                files = {
                    name: str(path.relative_to(self.out))
                    for name, path in paths.items()
                    if path.is_file()
                }
                found.append(
                    {
                        "subject": subject.name,
                        "prompt": prompt,
                        "seed": self.seeds[0],
                        "files": files,
                    }
                )
        return found


def slug(point: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", point)
