"""Ends a blend with its diagnosis, its scores and its report."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L

from dreamblend.blending.module import Blender
from dreamblend.errors import InputError
from dreamblend.evaluation.diagnosis import MEASURES, diagnose
from dreamblend.evaluation.protocols import PRESETS, find
from dreamblend.evaluation.scores import score, table
from dreamblend.report import write_report
from dreamblend.report.sheet import write_sheet
from dreamblend.storage import snapshots
from dreamblend.storage.blend_folder import read_index, save_index, save_json
from dreamblend.storage.photos import list_photos
from dreamblend.storage.snapshots import DTYPES

JUDGES = ("auto", "none", *PRESETS)


class BlendReport(L.Callback):
    """Writes `OUT/collapse.json`, `summary.json`, `run.json`, `sheet.png` and `report.html`; prints
    the tables.

    Args:
        judges: the protocol that scores the images (`sandbox`, `dreambooth`, `custom-diffusion`,
            `dreambench-plus`), `none`, or `auto`: the sandbox's for its own base, none for others.
        diagnose: measure collapse over every snapshot of the run (over the pair, without a run).
        probes: how many of the prompts the diagnosis reads.
    """

    def __init__(self, judges: str = "auto", diagnose: bool = True, probes: int = 8):
        if judges not in JUDGES:
            raise InputError(
                f"BlendReport's judges are {judges!r}: set them to one of {', '.join(JUDGES)}"
            )
        self.judges, self.diagnose, self.probes = judges, diagnose, probes

    def on_predict_end(self, trainer: L.Trainer, module: Blender) -> None:
        """By the first process alone, and after the last wait of all for each other
        (BlendWriter's): it may take as long as it wants.
        """
        if not trainer.is_global_zero:
            return
        out = Path(trainer.default_root_dir)
        rows = read_index(out)
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))[: self.probes]
        if self.diagnose and prompts:
            self._diagnose(out, module, prompts)
        photos = self._photos(module)
        judges = (
            ("sandbox" if module.base == "sandbox" else "none")
            if self.judges == "auto"
            else self.judges
        )
        if photos and judges != "none":
            rows, summary = score(out, rows, photos, module.identifier, judges, module.device)
            save_index(out, rows)
            protocol = find(judges).as_dict()
            save_json(out, "summary", {"rows": summary, "judges": judges, "protocol": protocol})
            print("\n" + table(summary))
        run = {
            "run": str(module.run) if module.run else None,
            "base": module.base,
            "method": module.pair.early.method,
            "identifier": module.identifier,
            "class_noun": module.class_noun,
            "early": module.pair.early.name,
            "late": module.pair.late.name,
            "settings": module.settings,
            "photos": [str(p) for p in list_photos(photos)] if photos else [],
        }
        save_json(out, "run", run)
        if rows:
            write_sheet(out, rows)
        print(f"\nimages are in {out / 'images'}, the report is {write_report(out).resolve()}")

    def _diagnose(self, out: Path, module: Blender, prompts: list[str]) -> None:
        path = out / "collapse.json"
        found = (
            [snapshots.read(p) for _, p in snapshots.find(module.run)]
            if module.run
            else [module.pair.early, module.pair.late]
        )
        about = {
            "prompts": prompts,
            "settings": module.settings,
            "snapshots": [[s.name, s.weights] for s in found],
        }
        if path.exists() and json.loads(path.read_text()).get("about") == about:
            return
        module.loaded.to(
            "cpu"
        )  # here the base reads, which the blend may not have moved, and one snapshot at a time
        base = module.loaded.base.to(module.device, DTYPES[module.drawn_in])
        rows = diagnose(
            base,
            found,
            prompts,
            module.identifier,
            module.class_noun,
            module.grid,
            module.steps,
            module.scale,
        )
        save_json(out, "collapse", {"measures": MEASURES, "snapshots": rows, "about": about})
        print("\n" + table([{"kind": r["name"], **{m: r[m] for m in MEASURES}} for r in rows]))

    @staticmethod
    def _photos(module: Blender) -> Path | None:
        """The folder of the training photos, where the snapshots say it and it is still there."""
        folder = module.pair.about and module.pair.about.settings.get("instance_dir")
        return Path(folder) if folder and Path(folder).is_dir() else None
