"""`export`: writes a snapshot, a merge of two, or a pair, for other tools."""

from __future__ import annotations

from pathlib import Path

from dreamblend.errors import InputError
from dreamblend.export.diffusers_lora import Diffusers
from dreamblend.export.form import Form
from dreamblend.export.hub import Hub
from dreamblend.export.kohya_lora import Kohya
from dreamblend.export.pipeline import Pipeline
from dreamblend.export.single_file import SingleFile
from dreamblend.export.what import find
from dreamblend.storage.files import whole
from dreamblend.storage.snapshots import DTYPES

FORMS: dict[str, type[Form]] = {
    "diffusers": Diffusers,
    "kohya": Kohya,
    "pipeline": Pipeline,
    "single_file": SingleFile,
    "hub": Hub,
}


def export(
    out: Path,
    form: str = "diffusers",
    run: Path | None = None,
    snapshot: str | None = None,
    early: str | None = None,
    late: str | None = None,
    merge: float | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    base: str | None = None,
    base_config: str | None = None,
    base_prediction: str | None = None,
    identifier: str | None = None,
    class_noun: str | None = None,
    license: str | None = None,
    images: Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Path:
    """Write a snapshot, a merge of two, or a pair in a form that other tools read.

    Args:
        out: the file or folder to write, which must not be there yet; a pair takes a folder.
        form: diffusers (a LoRA for `load_lora_weights`), kohya (a LoRA file for ComfyUI, A1111 and
            Forge), pipeline (a folder for `from_pretrained`), single_file (a checkpoint) or hub (a
            folder to upload, with a model card).
        run: folder of a run, whose steps the next three may name.
        snapshot: one snapshot: a step of the run, or a path (also of a checkpoint made elsewhere).
        early: the early snapshot of a pair, likewise. The pair that `select` picked where nothing
            is named.
        late: the late one.
        merge: the late snapshot's share, from 0 to 1, in one that lies between the two.
        rank: of the LoRA: reduces one, or extracts it from a snapshot of all weights.
        dtype: fp32, bf16 or fp16; as the weights are where None.
        base: what the snapshots were tuned from; as they record it where None.
        base_config: of the base, as in training; as the snapshots record it where None.
        base_prediction: of the base, likewise.
        identifier: the subject's rare token; as the snapshots record it where None.
        class_noun: the subject's class; as the snapshots record it where None.
        license: of what is exported, by its identifier on the hub, such as openrail++.
        revision: of a base on the hub, as in training; as the snapshots record it where None.
        variant: of the base's weights, such as fp16, likewise.
        images: folder of a blend, some of whose images a model card shows.
    """
    if form not in FORMS:
        raise InputError(f"--form is {form!r}: it is one of {', '.join(FORMS)}")
    if dtype not in (None, *DTYPES):
        raise InputError(f"--dtype is {dtype!r}: it is one of {', '.join(DTYPES)}")
    if rank is not None and rank < 1:
        raise InputError(f"--rank is {rank}: it must be at least 1")
    if images is not None and form != "hub":
        raise InputError(f"--images are for a model card, and --form {form} has none: use hub")
    out, writer = Path(out), FORMS[form](dtype, rank, license, images)
    whats = find(
        run,
        snapshot,
        early,
        late,
        merge,
        base=base,
        base_config=base_config,
        base_prediction=base_prediction,
        identifier=identifier,
        class_noun=class_noun,
        revision=revision,
        variant=variant,
    )
    pair = "" not in whats
    if writer.is_file and not pair and out.suffix != ".safetensors":
        raise InputError(f"--out {out} is to be a file: name it with .safetensors at its end")
    for what in whats.values():
        writer.check(what)
    with whole(out) as part:
        writer.write_all(whats, part)
    print(f"{out.resolve()}: {', '.join(what.described for what in whats.values())} ({form})")
    return out
