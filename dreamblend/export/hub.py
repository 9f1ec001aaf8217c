"""A folder that can be uploaded to a hub: a LoRA or a pipeline, and a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from dreamblend.errors import InputError
from dreamblend.export.diffusers_lora import Diffusers
from dreamblend.export.form import Form
from dreamblend.export.pipeline import Pipeline
from dreamblend.export.what import ADAPTERS, What
from dreamblend.models.loading import layout_of
from dreamblend.storage.blend_folder import SINGLE, Folder, read_folder

SHOWN = 4  # prompts whose images are on a card
UNKNOWN = "unknown"  # the hub's identifier of a licence that nobody stated
_SAFETY = """\
* It was trained on few photos of one subject: it may repeat them, and what is around the subject in
  them, where the prompt asks for something else. A snapshot of few training steps follows prompts
  better and knows the subject less.
* It has the limits and biases of its base, and no safety checker of its own: check images before
  they are shown.
* Photos of a person, a place or a brand need the consent of those whose they are. It is not to be
  used to deceive, or to show people in what they did not do.
"""


class Hub(Form):
    """A folder for a hub."""

    def check(self, what: What) -> None:
        self._inner(what).check(what)
        if self.images is not None and not read_folder(self.images).results:
            raise InputError(
                f"--images {self.images} holds no image of a blend: name the --out of `predict`"
            )

    def write(self, what: What, path: Path) -> None:
        self._inner(what).write(what, path)

    def write_all(self, whats: dict[str, What], path: Path) -> None:
        super().write_all(whats, path)
        what = whats.get("") or whats["late"]
        lora = isinstance(self._inner(what), Diffusers)
        images = self._images(path, pair="" not in whats)
        self._card(whats, lora, images).save(path / "README.md")

    def _inner(self, what: What) -> Form:
        lora = what.method in ADAPTERS or self.rank is not None
        return (Diffusers if lora else Pipeline)(self.dtype, self.rank, self.license)

    def _card(self, whats: dict[str, What], lora: bool, images: list[dict[str, Any]]) -> Any:
        from huggingface_hub import ModelCard, ModelCardData

        what = whats.get("") or whats["late"]
        family = layout_of(what.backbone).family
        data = ModelCardData(
            base_model=what.base_title,
            base_model_relation="adapter" if lora else "finetune",
            license=self.license or UNKNOWN,
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=[
                *("text-to-image", "diffusers", "dreambooth", "dreamblend"),
                *(("lora", "template:sd-lora") if lora else ()),
            ],
            instance_prompt=_prompt(what),
            widget=[{"text": image["prompt"], "output": {"url": image["file"]}} for image in images]
            or None,
        )
        sections = {
            f"{what.subject or 'A subject'} for {what.base_title}": _introduction(whats, family),
            "Use": _use(whats, lora),
            "Training": _training(what),
            "Samples": _samples(images),
            "Limits and safety": _SAFETY,
            "Licence": f"{self.license}."
            if self.license
            else (
                "Not stated by its author; that of the base holds for what is made from it. State"
                " one in `license` above before this is published."
            ),
        }
        (title, text), *others = [(name, text) for name, text in sections.items() if text]
        body = f"# {title}\n\n{text.strip()}\n" + "".join(
            f"\n## {name}\n\n{text.strip()}\n" for name, text in others
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")

    def _images(self, path: Path, pair: bool) -> list[dict[str, Any]]:
        """Copies of some of a blend's images, without what their files say of this machine."""
        if self.images is None:
            return []
        folder = read_folder(self.images)
        kind = _kind(folder, pair)
        (path / "images").mkdir()
        shown: list[dict[str, Any]] = []
        for prompt, rows in folder.prompts().items():
            row = next((row for row in rows.values() if kind in row), None)
            if row is None or len(shown) == SHOWN:
                continue
            file = f"images/{len(shown)}.png"
            with Image.open(self.images / row[kind].file) as image:
                image.convert("RGB").save(path / file)
            shown.append({"prompt": prompt, "seed": row[kind].seed, "kind": kind, "file": file})
        return shown


def _kind(folder: Folder, pair: bool) -> str:
    """What drew the images that are shown: a blend for a pair, else the late snapshot alone."""
    blends = [kind for kind in folder.kinds if kind not in SINGLE]
    wanted = [*blends, "late"] if pair else ["late", *blends]
    return next(kind for kind in (*wanted, *folder.kinds) if kind in folder.kinds)


def _prompt(what: What) -> str | None:
    recorded = what.about.settings.get("prompt") if what.about else None
    return recorded or (what.subject or None)


def _introduction(whats: dict[str, What], family: str) -> str:
    what = whats.get("") or whats["late"]
    text = f"{what.base_title} ({family}), fine-tuned ({what.method}) on photos of one subject"
    if "" not in whats:
        early, late = (one.described for one in whats.values())
        return (
            f"{text}, as two snapshots of one run: `early` ({early}) follows prompts, `late`"
            f" ({late}) knows the subject. dreamblend draws with both."
        )
    return f"{text}: {what.described}."


def _use(whats: dict[str, What], lora: bool) -> str:
    what = whats.get("") or whats["late"]
    place, prompt = ("." if "" in whats else "./late"), _prompt(what) or "a photo"
    load = (
        f'pipe = DiffusionPipeline.from_pretrained("{what.base_title}")\n'
        f'pipe.load_lora_weights("{place}")'
        if lora
        else f'pipe = DiffusionPipeline.from_pretrained("{place}")'
    )
    text = (
        "In the folder of this card:\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'{load}\nimage = pipe("{prompt} on the beach").images[0]\n```\n'
    )
    if "" not in whats:
        options = f"--config predict.yaml --early early --late late --prompts '[\"{prompt}\"]'"
        text += f"\nBoth, with dreamblend:\n\n```bash\ndreamblend predict {options}\n```\n"
    return text


def _training(what: What) -> str:
    about = what.about
    if about is None:
        return "The settings are not known: the weights were made by another tool."
    settings = {"method": about.method, "steps": about.step, "seed": about.seed}
    for name, value in about.settings.items():
        inner = value if isinstance(value, dict) else {name: value}
        settings |= inner
    rows = [
        f"| {name} | {value} |"
        for name, value in settings.items()
        # those of the machine, and those that are off
        if not name.endswith("_dir") and value not in (None, False, [], "None", 0.0)
    ]
    return "\n".join(["| setting | value |", "| --- | --- |", *rows])


def _samples(images: list[dict[str, Any]]) -> str:
    return "\n\n".join(
        f"![{image['prompt']}]({image['file']})\n\n*{image['prompt']}* (seed {image['seed']},"
        f" drawn by {image['kind']})"
        for image in images
    )
