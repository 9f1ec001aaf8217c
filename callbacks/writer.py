"""Writes what a blend draws: one PNG with its provenance an image, heat maps beside it, and one
index of all.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import TimeoutExpired

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from PIL import Image

from dreamblend.blending.module import Blender
from dreamblend.blending.picture import Picture
from dreamblend.errors import InputError, is_lost_process
from dreamblend.processes import first_alone
from dreamblend.storage.files import check_writable, hold, save_png, save_text
from dreamblend.storage.snapshots import sha256

CHUNK = "dreamblend"  # the PNG text chunk that holds the provenance
LAST_WORDS = 5  # seconds


def slug(prompt: str) -> str:
    """A folder name for a prompt: readable, safe, and distinct by its hash."""
    readable = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return f"{readable or 'prompt'}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


class BlendWriter(BasePredictionWriter):
    """Fills `OUT/images` and `OUT/maps` as the images are drawn, and `OUT/results.jsonl` at the
    end, also when it is interrupted.

    A PNG is written last of an image's files and says how it was made; the images are the record,
    and the index is made from them. So a rerun draws what is missing, and nothing that is there is
    touched: where anything differs that changes an image (a setting, or weights that were
    overwritten), it is refused before it draws, as the images that are there may be wanted.
    """

    def __init__(self):
        super().__init__("batch")
        self._held: ExitStack | None = None

    def teardown(self, trainer: L.Trainer, module: Blender, stage: str) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def setup(self, trainer: L.Trainer, module: Blender, stage: str) -> None:
        super().setup(trainer, module, stage)
        trainer.predict_loop.return_predictions = False  # what is on disk need not stay in memory
        first_alone(trainer, lambda: self._begin(trainer, module))

    def _begin(self, trainer: L.Trainer, module: Blender) -> None:
        """Hold the shard of the output folder until the end, and leave the pairs to draw that are
        missing there.

        Raises InputError where another blend is at work there, or where `missing` does.
        """
        data = trainer.datamodule
        with hold(self.out(trainer), data.shard.start, data.shard.step) as held:
            data.pairs = self.missing(
                self.out(trainer), module, data.all_pairs(module.identifier, module.class_noun)
            )
            self._held = held.pop_all()

    def out(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir)

    def path(self, out: Path, prompt: str, seed: int, kind: str) -> Path:
        return out / "images" / slug(prompt) / f"{seed}-{kind}.png"

    def missing(
        self, out: Path, module: Blender, pairs: list[tuple[str, int]]
    ) -> list[tuple[str, int]]:
        """The pairs of which an image is not there yet, or is damaged.

        Raises InputError where `out` cannot be written, or holds images that were made with other
        settings or weights.
        """
        check_writable(out / "images")
        wanted, there = module.settings, set()
        for image in (out / "images").glob("*/*.png"):
            if (said := read_provenance(image)) is None:
                continue
            if differs := differences(said["settings"], wanted):
                raise InputError(
                    f"{out} holds images made with other settings ({'; '.join(differs)}): choose"
                    " another --out"
                )
            there.add(image)
        return [
            (p, s)
            for p, s in pairs
            if not there.issuperset(self.path(out, p, s, kind) for kind in module.kinds)
        ]

    def undrawn(
        self, out: Path, module: Blender, pairs: list[tuple[str, int]]
    ) -> list[tuple[str, int]]:
        """Those of the pairs just drawn that have no image, as it was not finite."""
        return [
            (p, s)
            for p, s in pairs
            if not all(self.path(out, p, s, kind).exists() for kind in module.kinds)
        ]

    def write_on_batch_end(
        self,
        trainer,
        module,
        prediction: list[Picture],
        batch_indices,
        batch,
        batch_idx,
        dataloader_idx,
    ) -> None:
        out = self.out(trainer)
        for picture in prediction:
            path = self.path(out, picture.prompt, picture.seed, picture.kind)
            if read_provenance(path) is not None:
                continue
            picture.save_maps(out / "maps" / path.parent.name / f"{path.stem}.safetensors")
            provenance = {
                "prompt": picture.prompt,
                "seed": picture.seed,
                "kind": picture.kind,
                "early": module.pair.early.name,
                "late": module.pair.late.name,
                "settings": module.settings,
                "collapse": picture.collapse,
                "distance": picture.distance,
                "dtype": picture.dtype,
            }
            save_png(picture.image, path, {CHUNK: json.dumps(provenance)})

    def on_exception(self, trainer: L.Trainer, module: Blender, exception: BaseException) -> None:
        """The processes that this one started end with it, as they would after Ctrl-C: their share
        would wait for it.

        Where it is one of them that was lost, they first have a moment to say of what.
        """
        if isinstance(launcher := trainer.strategy.launcher, _SubprocessScriptLauncher):
            for process in launcher.procs if is_lost_process(exception) else ():
                with suppress(TimeoutExpired):
                    process.wait(LAST_WORDS)
            launcher.kill(signal.SIGKILL)
        try:
            if self._held is not None:  # by the first process, once it was not refused
                save_index(self.out(trainer), read_index(self.out(trainer)))
        finally:
            self.teardown(trainer, module, "predict")

    def on_predict_end(self, trainer: L.Trainer, module: Blender) -> None:
        trainer.strategy.barrier("images")
        if trainer.is_global_zero:
            save_index(self.out(trainer), read_index(self.out(trainer)))


def differences(said: dict, wanted: dict) -> list[str]:
    """The settings that differ, old and new. Names of what has the same weights do not count: a
    path has many spellings.
    """
    same = {
        name
        for name in ("early", "late", "base")
        if said.get(f"{name}_weights") == wanted[f"{name}_weights"]
    }
    return [
        f"{k} {said.get(k, 'unknown')}, now {v}"
        for k, v in wanted.items()
        if k not in same and (k not in said or said[k] != v)
    ]


def read_provenance(image: Path) -> dict | None:
    """What a PNG of ours says of itself; None where it is not ours."""
    try:
        with Image.open(image, formats=["PNG"]) as opened:
            opened.load()
            said = json.loads(opened.text[CHUNK])
            kinds = {"settings": dict, "prompt": str, "seed": int, "kind": str}
            return said if all(isinstance(said[key], kind) for key, kind in kinds.items()) else None
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        SyntaxError,
        RecursionError,
        Image.DecompressionBombError,
    ):  # most are Pillow's
        return None


def read_index(out: Path) -> list[dict]:
    """One row an image, from the images themselves, ordered by prompt, seed and kind.

    What results.jsonl says beyond that of the same images (their scores) is kept.
    """
    before = {
        (row.get("file"), row.get("sha256")): row for row in _read_rows(out / "results.jsonl")
    }
    rows = []
    for image in (out / "images").glob("*/*.png"):
        if (said := read_provenance(image)) is not None:
            row = {**said, "file": str(image.relative_to(out)), "sha256": sha256(image)}
            rows.append(
                {
                    **row,
                    **{
                        k: v
                        for k, v in before.get((row["file"], row["sha256"]), {}).items()
                        if k not in row
                    },
                }
            )
    return sorted(rows, key=lambda row: (row["prompt"], row["seed"], row["kind"]))


def _read_rows(index: Path) -> list[dict]:
    """The lines of an index that can be read."""
    rows = []
    for line in (
        index.read_text(encoding="utf-8", errors="replace").splitlines() if index.is_file() else ()
    ):
        with suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [
        row
        for row in rows
        if isinstance(row, dict)
        and isinstance(row.get("file"), str)
        and isinstance(row.get("sha256"), str)
    ]


def save_index(out: Path, rows: list[dict]) -> None:
    """OUT/results.jsonl, whole or not at all."""
    save_text("".join(json.dumps(row) + "\n" for row in rows), out / "results.jsonl")
