"""One picture of a blend: a row a kind, a column a prompt."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from dreamblend.storage.blend_folder import Result, in_order
from dreamblend.storage.files import save_png


def write_sheet(out: Path, results: list[Result], columns: int = 8, side: int = 128) -> Path:
    """Write `out/sheet.png` of a blend's images: the first seed of up to `columns` prompts, early
    at the top, late below.
    """
    prompts = list(dict.fromkeys(result.prompt for result in results))[:columns]
    kinds = in_order(result.kind for result in results)
    first = min(result.seed for result in results)
    sheet = Image.new("RGB", (side * len(prompts), side * len(kinds)), "white")
    for result in results:
        if result.prompt in prompts and result.seed == first:
            with Image.open(out / result.file) as image:
                scaled = ImageOps.pad(
                    image.convert("RGB"),
                    (side, side),
                    Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS,
                    color="white",
                )
            sheet.paste(
                scaled, (prompts.index(result.prompt) * side, kinds.index(result.kind) * side)
            )
    path = out / "sheet.png"
    save_png(sheet, path)
    return path
