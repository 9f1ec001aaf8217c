"""One picture of a blend: a row a kind, a column a prompt."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dreamblend.storage.blend_folder import in_order
from dreamblend.storage.files import save_png


def write_sheet(out: Path, rows: list[dict], columns: int = 8, side: int = 128) -> Path:
    """Write `out/sheet.png` from lines of results.jsonl: the first seed of up to `columns` prompts,
    early at the top, late below.
    """
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:columns]
    kinds = in_order(row["kind"] for row in rows)
    first = min(row["seed"] for row in rows)
    sheet = Image.new("RGB", (side * len(prompts), side * len(kinds)), "white")
    for row in rows:
        if row["prompt"] in prompts and row["seed"] == first:
            with Image.open(out / row["file"]) as image:
                scaled = image.convert("RGB").resize(
                    (side, side),
                    Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS,
                )
            sheet.paste(
                scaled, (prompts.index(row["prompt"]) * side, kinds.index(row["kind"]) * side)
            )
    path = out / "sheet.png"
    save_png(sheet, path)
    return path
