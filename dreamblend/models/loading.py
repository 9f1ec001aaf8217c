"""Finds the family of a base, and loads it."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dreamblend.errors import InputError
from dreamblend.models import pipelines, safety
from dreamblend.models.backbone import Backbone
from dreamblend.models.bases import SHIPPED
from dreamblend.models.marks import PREDICTIONS, Marks, predicting
from dreamblend.storage.hub import fetching

# Each a module of this package with a LAYOUT of its pipelines and a `load`
FAMILIES = (
    *("stable_diffusion", "sdxl", "sd3", "flux", "flux2"),
    *("qwen_image", "z_image", "sana", "pixart"),
)


def locate_base(base: str) -> str:
    """What the loaders take for a base as the user names it: one that ships, a hub id, a folder, or
    a .safetensors file.

    Raises InputError for paths that cannot be a base, before anything large is read.
    """
    path = Path(base).expanduser()
    if base in SHIPPED:
        return str(SHIPPED[base].folder)
    if path.is_dir():
        pipelines.check_folder(path, family_of_folder(path).LAYOUT)
        return str(path)
    if path.suffix.lower() in {".ckpt", ".pt", ".bin", ".pth"}:
        raise InputError(
            f"{base} is a pickle, which can run code when it is read: convert it to .safetensors"
            " first"
        )
    if path.is_file():
        if path.suffix.lower() != ".safetensors":
            raise InputError(
                f"{base} is not a .safetensors file: name a hub id, a pipeline folder or a"
                " .safetensors file"
            )
        family_of_file(path)
        return str(path)
    if path.is_absolute() or base.startswith((".", "~")) or base.count("/") != 1:
        raise InputError(
            f"base {base!r} does not exist: name `sandbox`, a hub id (owner/name), a pipeline"
            " folder or a .safetensors file"
        )
    return base


def check_version(base: str, revision: str | None, variant: str | None = None) -> None:
    """Raise InputError for a revision of what is no hub id, or a variant that a folder lacks."""
    if revision is None and variant is None:
        return
    path = Path(locate_base(base))
    if revision is not None and path.exists():
        raise InputError(
            f"model.revision is {revision}, and {base} is no hub id, which alone has revisions:"
            " leave it out"
        )
    if variant is not None and path.is_file():
        raise InputError(
            f"model.variant is {variant}, and {base} is one file, which has no variants: leave it"
            " out"
        )
    if variant is not None and path.is_dir():
        pipelines.lacking_variant(path, family_of_folder(path).LAYOUT, variant, base)


def load_backbone(
    base: str,
    config: str | None = None,
    prediction: str | None = None,
    zero_snr: bool = False,
    safety_checker: bool = False,
    revision: str | None = None,
    variant: str | None = None,
) -> Backbone:
    """Load a base on the CPU, all weights frozen: in fp32, or as they were saved where a family is
    too large for that.

    Args:
        base: as the user names it.
        config: for a single file, the hub id or folder of its configuration where diffusers cannot
            tell it.
        prediction: what the denoiser predicts, epsilon or v_prediction; what the base says of
            itself where None.
        zero_snr: whether its last timestep is made noise alone. Raises InputError where it does
            not predict v.
        safety_checker: load it too, where the base has one; a single file has none.
        revision: of a hub id: a branch, a tag or a commit.
        variant: of the weights in a pipeline folder or a hub id, such as fp16: the files of that
            name are read, and the plain ones of parts without. The plain ones where None.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    check_version(base, revision, variant)
    located = locate_base(base)
    path = Path(located)
    if path.is_file():
        family = family_of_file(path)
    elif path.is_dir():
        family = family_of_folder(path)
    else:
        family, path = _from_hub(located, safety_checker, revision, variant)
    if variant is not None and (
        lacking := pipelines.lacking_variant(path, family.LAYOUT, variant, base)
    ):
        warnings.warn(
            f"{base} has no weights of the variant {variant} for {', '.join(lacking)}: the plain"
            " ones are read there",
            stacklevel=2,
        )
    # cuDNN's attention gives gradients that are NaN for some lengths in bf16 on Hopper, or reads
    # outside its memory: seen with FLUX.1 on an H200 in torch 2.11 (pytorch issue 196678). Flash
    # attention stays.
    torch.backends.cuda.enable_cudnn_sdp(False)
    backbone = family.load(path, config, prediction, variant)
    backbone.base, backbone.base_config, backbone.source = base, config, path
    backbone.variant = variant
    if zero_snr:
        if (predicts := backbone.training_noise().prediction) != "v_prediction":
            raise InputError(
                "model.rescale_betas_zero_snr is for a base that predicts v, as noise alone says"
                f" nothing of itself, and {base} predicts {predicts}: leave it out"
            )
        backbone.scheduler = predicting(backbone.scheduler, "v_prediction", zero_snr=True)
    if safety_checker and path.is_dir():
        backbone.safety = safety.load(path, variant)
    return backbone


def load_checker(
    base: str, revision: str | None = None, variant: str | None = None
) -> safety.SafetyChecker | None:
    """The safety checker of a base alone, on the CPU; None where it has none, as a single file.

    Args as `load_backbone`. Raises InputError where it is named and cannot be loaded.
    """
    located = locate_base(base)
    path = Path(located)
    if path.is_file():
        return None
    if not path.is_dir():
        _, path = _from_hub(located, True, revision, variant)
    return safety.load(path, variant)


def _from_hub(
    name: str, safety_checker: bool, revision: str | None, variant: str | None
) -> tuple[Any, Path]:
    """The family of a hub id and the folder in the cache that it is fetched to."""
    with fetching(name):
        family = family_of_folder(pipelines.index_from_hub(name, revision), name)
        path = pipelines.fetch_from_hub(name, family.LAYOUT, safety_checker, revision, variant)
        pipelines.check_folder(path, family.LAYOUT, variant=variant)
    return family, path


def wrap(pipe: Any, base: str) -> Backbone:
    """The model over a pipeline of diffusers that is in memory already: its modules are used, and
    frozen. Raises InputError where it is of no family that is known.
    """
    import diffusers

    named = type(pipe).__name__
    for family in _families():
        layout = family.LAYOUT
        if named not in layout.names:
            continue
        if named in layout.variants:
            pipe = getattr(diffusers, layout.pipelines[0]).from_pipe(pipe, dtype=pipe.dtype)
        torch.backends.cuda.enable_cudnn_sdp(False)  # as in `load_backbone`
        backbone = _backbone_of(family)(pipe, base)
        if (checker := getattr(pipe, safety.NAME, None)) is not None:
            backbone.safety = safety.SafetyChecker(checker, pipe.feature_extractor)
        return backbone
    raise InputError(f"the pipeline is a {named}: {_known()}")


def load_parts(path: Path, base: Backbone) -> dict[str, nn.Module]:
    """Name -> module of the parts in a single file of the base's kind: the denoiser, and those of
    its autoencoder and the text encoders that can be trained that it has. Their configuration is
    the base's.
    """
    family, located = family_of_file(path), locate_base(base.base)
    layout = family.LAYOUT
    if type(base).__module__ != family.__name__:
        raise InputError(
            f"{path} is of {layout.family}, and {base.base} is not: name its own base with"
            " --model.base"
        )
    predicted = base.training_noise().prediction
    if predicted in PREDICTIONS:  # a flow has no marks
        Marks.read(path).prediction(path, predicted)
    if others := pipelines.beside(path, layout):
        warnings.warn(
            f"{path} holds more than a model ({', '.join(others)}), which is not used", stacklevel=2
        )
    config = base.base_config if Path(located).is_file() else located
    folder, whole = pipelines.config_folder(path, layout, config), base.components()
    held = [
        part
        for part in pipelines.parts_within(path, layout)
        if part == "vae" or part in base.parts()
    ]
    lent = {part: whole.get(part) for part in layout.parts if part not in held}
    pipe = pipelines.load_file(path, layout, folder, scheduler=base.scheduler, **lent)
    return {part: getattr(pipe, part) for part in held}


def family_of_folder(path: Path, name: str | None = None) -> ModuleType:
    """The family of a pipeline folder, by the class that it names."""
    named = pipelines.pipeline_class(path)
    for family in _families():
        if named in family.LAYOUT.names:
            return family
    raise InputError(f"{name or path} holds a {named}: {_known()}")


def family_of_file(path: Path) -> ModuleType:
    """The family of a single file. Raises InputError where it is damaged or of another family, from
    its header alone.
    """
    shapes = pipelines.shapes_of(path)
    if any("lora" in key for key in shapes):
        raise InputError(f"{path} is a LoRA, not a base: name the model that it was made for")
    if scales := pipelines.scales_in(shapes):
        raise InputError(
            f"{path} is quantised, and what its numbers are to be multiplied by ({scales[0]}) would"
            " be lost: name the file in bf16 or fp16"
        )
    kind = pipelines.kind_of(shapes)
    # diffusers takes what it does not know for the first Stable Diffusion
    marked = any(key.startswith("model.diffusion_model.input_blocks.") for key in shapes)
    if kind in ("v1", "v2") and not marked:
        raise InputError(
            f"{path} is no Stable Diffusion 1.x or 2.x checkpoint: it lacks"
            " model.diffusion_model.input_blocks; name another"
        )
    for family in _families():
        if kind in family.LAYOUT.kinds:
            return family
    raise InputError(f"{path} is of the kind {kind}: {_known()}")


def layout_of(model: Backbone) -> pipelines.Layout:
    """How the pipelines of a model's family lie on disk."""
    return importlib.import_module(type(model).__module__).LAYOUT


def _families() -> list[ModuleType]:
    return [importlib.import_module(f"dreamblend.models.{name}") for name in FAMILIES]


def _backbone_of(family: ModuleType) -> Callable[[Any, str], Backbone]:
    """The class that wraps a family's pipelines: the one that its module defines."""
    (kind,) = [
        value
        for value in vars(family).values()
        if isinstance(value, type)
        and issubclass(value, Backbone)
        and value.__module__ == family.__name__
    ]
    return kind


def _known() -> str:
    names = [family.LAYOUT.family for family in _families()]
    return f"the families that can be loaded are {', '.join(names)}"
