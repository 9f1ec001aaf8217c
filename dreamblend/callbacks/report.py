"""Diagnoses and scores a blend at its end, and writes the report."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from dreamblend.blending.module import Blender
from dreamblend.errors import InputError
from dreamblend.evaluation.blended import diagnose_blend, photos_of, score_blend
from dreamblend.evaluation.measures import DIAGNOSED
from dreamblend.evaluation.protocols import PRESETS
from dreamblend.evaluation.scores import table
from dreamblend.models import Backbone
from dreamblend.models.bases import own_judges
from dreamblend.report import write_report
from dreamblend.report.sheet import write_sheet
from dreamblend.report.text import called
from dreamblend.storage import snapshots
from dreamblend.storage.blend_folder import read_index, save_json
from dreamblend.storage.photos import list_photos

JUDGES = ("auto", "none", *PRESETS)


class BlendReport(L.Callback):
    """Writes `OUT/collapse.json`, `summary.json`, `run.json`, `sheet.png` and `report.html`, and
    prints the tables.

    Args:
        judges: the protocol that scores the images (`sandbox`, `dreambooth`, `custom-diffusion`,
            `dreambench-plus`), `none`, or `auto`: `sandbox` for the sandbox, `none` for others.
        diagnose: measure collapse over every snapshot of the run, or over the pair without a run.
        probes: how many of the prompts the diagnosis reads.
    """

    def __init__(self, judges: str = "auto", diagnose: bool = True, probes: int = 8):
        if judges not in JUDGES:
            raise InputError(
                f"BlendReport's judges are {judges!r}: set them to one of {', '.join(JUDGES)}"
            )
        self.judges, self.diagnose, self.probes = judges, diagnose, probes

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Runs in the first process alone. No process waits for another any more (BlendWriter has
        the last barrier), so this may take long.
        """
        if not trainer.is_global_zero:
            return
        assert isinstance(module, Blender)  # what predicts
        out = Path(trainer.default_root_dir)
        results = read_index(out)
        photos = photos_of(module.pair.about, module.identifier, module.class_noun)
        if self.diagnose and results:
            self._diagnose(out, module, list(dict.fromkeys(r.prompt for r in results)))
        judges = own_judges(module.base) or "none" if self.judges == "auto" else self.judges
        if photos and judges != "none":
            results, summary = score_blend(
                out, results, photos, module.identifier, judges, module.device
            )
            print("\n" + table(summary))
        save_json(out, "run", self._run(module, photos))
        if results:
            write_sheet(out, results)
        print(f"\nimages are in {out / 'images'}, the report is {write_report(out).resolve()}")

    def _diagnose(self, out: Path, module: Blender, prompts: list[str]) -> None:
        found = {
            n: snapshots.read(p) for n, p in (snapshots.find(module.run) if module.run else [])
        }
        compared = list(found.values()) or [module.pair.early, module.pair.late]
        numbers = {snapshot.name: number for number, snapshot in found.items()}
        models = module.models
        assert models is not None, "predicting loads them"

        def base() -> Backbone:
            models.to("cpu")  # makes room: only the base and one snapshot are needed here
            module.place(models.base)
            return models.base

        rows = diagnose_blend(out, base, compared, prompts[: self.probes], module.settings, numbers)
        if rows:
            shown = [{m: row[m] for m in DIAGNOSED} for row in rows]
            print("\n" + table([{"kind": k, **row} for k, row in zip(called(rows), shown)]))

    @staticmethod
    def _run(module: Blender, photos: Path | list[Path] | None) -> dict:
        """What the report says about the run."""
        found = list_photos(photos) if isinstance(photos, Path) else photos or []
        return {
            "run": str(module.run) if module.run else None,
            "base": module.base,
            "method": module.pair.early.method,
            "identifier": module.identifier,
            "class_noun": module.class_noun,
            "early": module.pair.early.name,
            "late": module.pair.late.name,
            "settings": module.settings,
            "photos": [str(path) for path in found],
        }
