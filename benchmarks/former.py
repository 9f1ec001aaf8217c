"""Is `region` better than it was? `python -m benchmarks.former`: against its form of version 0.1.0,
which took 4 passes, on the pairs, prompts and seeds of the plan.

It goes on from `benchmarks.sandbox` in the same --out: the runs are not trained again, and what
today's form draws is read from there.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import plan
from benchmarks.record import Record
from benchmarks.tables import estimated, markdown
from benchmarks.training import Recipe, Setting, bench_of, load_pair, sandbox_subject, tune
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import Region
from dreamblend.blending.blends.blend import Drawing
from dreamblend.blending.recorder import Recorder
from dreamblend.cli import entry
from dreamblend.errors import InputError
from dreamblend.evaluation.bench import means
from dreamblend.evaluation.measures import title
from dreamblend.evaluation.outcome import said
from dreamblend.evaluation.statistics import difference
from dreamblend.storage.files import save_text

MEASURES = ("subject", "prompt_fidelity", "diversity", "parts")
TODAY = Setting(Region()).label


class Former(Region):
    """Each snapshot guided away from its own empty prompt, and both mixed afterwards; it never gave
    way to another word.
    """

    name = "former region"
    passes = 4

    def __init__(self) -> None:
        super().__init__(asked=1.0, margin=1.0)

    def draw(self, batch: Batch, reference: Drawing | None = None) -> Drawing:
        early, late = batch.predictor(batch.early), Recorder(batch, batch.late)

        def predict(z: Tensor, t: Tensor, step: int) -> Tensor:
            of_late = late(z, t, step)
            inside = self.share(late.last, batch).to(of_late.dtype)
            return torch.lerp(early(z, t, step), of_late, inside)

        return Drawing(batch.sample(predict), late.average)


def drawn(name: str, recipe: Recipe, planned: plan.Plan, out: Path) -> dict:
    """Means of the former's images, of one subject and method. What is there is not measured
    again.
    """
    subject = sandbox_subject(name, out / "photos" / name, planned.prompts_of)
    settings = {"plan": planned.about, **recipe.settings}
    record = Record(out / "former" / name / f"{recipe.name}.json", settings, means={})
    if not record["means"]:
        assert recipe.pair is not None, "it is a blend of two"
        run = out / "runs" / name / recipe.name
        tune(planned.base, recipe, subject, planned.steps, run)
        models = load_pair(run, recipe.pair, planned.base)
        seeds = range(planned.seeds)
        bench = bench_of(subject, seeds, planned.sampling, guidance_scale=planned.scale)
        record["means"] = means(bench.blends({Former.name: Former()}, models)[Former.name])
        record.save()
    return record["means"]


@entry
def main() -> None:
    planned, parent = plan.named()
    asked = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, parents=[parent]
    )
    asked.add_argument("--out", type=Path, default=Path("runs/sandbox"))
    out = asked.parse_args().out
    file = out / "results.json"
    if not file.is_file():
        raise InputError(
            f"there is no {file}: run `python -m benchmarks.sandbox --out {out}` first"
        )
    results = json.loads(file.read_text())
    if results["plan"] != planned.about:
        raise InputError(
            f"{file} is of another plan than {planned.digest[:8]}: choose another --out"
        )
    points = {point["name"]: point["means"] for point in results["points"]}
    rows = []
    for recipe in planned.methods:
        if (today := points.get(f"{recipe.name} {TODAY}")) is None:
            continue
        names = tqdm(planned.subjects, desc=f"{recipe.name}, {Former.name}")
        before = {name: drawn(name, recipe, planned, out) for name in names}
        of = {
            measure: difference(
                *([by[n][measure] for n in planned.subjects] for by in (today, before))
            )
            for measure in MEASURES
        }
        rows.append({"kind": recipe.name, **{title(m): estimated(said(d)) for m, d in of.items()}})
    text = f"Today's region less its former form, 95 % over subjects.\n\n{markdown(rows)}\n"
    save_text(text, out / "former" / "tables.md")
    print(f"\n{text}\nresults are in {out / 'former'}")


if __name__ == "__main__":
    main()
