"""Output folders of a blend to report on, and the page as a browser sees it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

HOSTILE = """a sks mug <script>alert("1")</script> & 'so' on"""
PROMPTS = ["a sks mug on the beach", HOSTILE]
KINDS = ["late", "score", "cag", "early"]  # on purpose not in the order of the columns
WORDS = ["mug", "beach", "<b>"]


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text inside them."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []  # (tag that opened last, text)
        self.html = path.read_text("utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.tags[-1][0], data.strip()))

    def inside(self, tag: str) -> list[str]:
        return [text for opened, text in self.texts if opened == tag]

    def images(self) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def draw_folder(out: Path, size: int = 16, seeds: int = 2, prompts: list[str] = PROMPTS) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for i, prompt in enumerate(prompts):
        for seed in range(seeds):
            for kind in KINDS:
                image = out / f"images/p{i}/{seed}-{kind}.png"
                maps = out / f"maps/p{i}/{seed}-{kind}.safetensors"
                for path in (image, maps):
                    path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)).save(image)
                save_file(
                    {"maps": rng.random((3, 4, 4), np.float32)},
                    maps,
                    metadata={"words": json.dumps(WORDS)},
                )
                lines.append(
                    {
                        "prompt": prompt,
                        "seed": seed,
                        "kind": kind,
                        "file": str(image.relative_to(out)),
                        "sha256": "ab" * 32,
                        "early": "50",
                        "late": "400",
                        "settings": {"strength": 0.5},
                        "collapse": {"overlap": 0.25},
                        "distance": None,
                    }
                )
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out
