"""How a diffusers pipeline lies on disk, whatever its family: a folder, the hub's cache, or one
file.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from dreamblend.errors import InputError
from dreamblend.models.trust import check_index, read_config

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "tekken.json")
_VARIANT = re.compile(r"\.(fp16|bf16)[.-]")  # in the name of a file, or of its index


@dataclass(frozen=True)
class Layout:
    """What the pipelines of a family hold.

    Args:
        family: as people call it.
        pipelines: classes of diffusers that are loaded.
        variants: others with the same parts, which are loaded as the first.
        parts: folders of weights, the denoiser first.
        tokenizers: folders of vocabularies.
        optional: parts that a pipeline may do without.
        kinds: what diffusers calls its single files.
        within: how the names of a part's weights begin in a single file that has it, which
            diffusers can read; the denoiser is in every one.
        as_saved: whether weights stay in the dtype of their files, as they are too large for fp32.
        options: what the pipelines are told when they are loaded.
    """

    family: str
    pipelines: tuple[str, ...]
    parts: tuple[str, ...]
    tokenizers: tuple[str, ...] = ("tokenizer",)
    variants: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    within: dict[str, str] = field(default_factory=dict)
    as_saved: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The pipeline classes of the family's folders."""
        return self.pipelines + self.variants


def pipeline_class(path: Path) -> str:
    """The pipeline class that a folder names. Raises InputError where it names none."""
    index = path / "model_index.json"
    if not index.is_file():
        raise InputError(
            f"{path} is not a diffusers pipeline folder: it has no model_index.json; name one that"
            " has, a hub id or a .safetensors file"
        )
    if "_class_name" not in (config := check_index(index)):
        raise InputError(f"{index} is damaged (it has no _class_name): download or save it again")
    return config["_class_name"]


def there(path: Path, layout: Layout) -> list[str]:
    """The parts of a layout that a pipeline folder has."""
    index = check_index(path / "model_index.json")
    lacking = [part for part in layout.optional if index.get(part, [None])[0] is None]
    return [part for part in layout.parts if part not in lacking]


def check_folder(
    path: Path, layout: Layout, weights: bool = True, variant: str | None = None
) -> None:
    """Raise InputError where a pipeline folder lacks something: from its listing and its files'
    headers alone. The weights are those of the `variant`, where it is named and there.
    """
    if (named := pipeline_class(path)) not in layout.names:
        raise InputError(f"{path} holds a {named}, which is not of {layout.family}")
    parts = there(path, layout)
    for name in ("scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts)):
        if not (path / name).is_file():
            raise InputError(
                f"{path / name} is missing: the base is incomplete; download or save it again"
            )
        read_config(path / name)
    for name in layout.tokenizers:  # the loader would make one without words
        if not any((path / name / file).is_file() for file in VOCABULARIES):
            raise InputError(
                f"{path / name} has no vocabulary: the base is incomplete; download or save it"
                " again"
            )
    for part in parts if weights else ():
        files, found = weight_files(path / part, variant)
        if not files and any((path / part).glob("*.bin")):
            raise InputError(
                f"{path / part} has only pickled weights, which can run code when they are read:"
                " download or save it as .safetensors"
            )
        if not files:
            raise InputError(
                f"{path / part} has no .safetensors weights: the base is incomplete; download or"
                " save it again"
            )
        for file in files:
            shapes_of(file)
        for index in (path / part).glob(f"*.index.{found}.json" if found else "*.index.json"):
            _check_shards(index)


def weight_files(folder: Path, wanted: str | None = None) -> tuple[list[Path], str | None]:
    """The files with the weights of a part, and the name of their variant: the one that is wanted,
    where the part has it; else None where the plain ones are there.
    """
    files = sorted(folder.glob("*.safetensors"))
    if wanted and (of_it := [file for file in files if _is_of(file, wanted)]):
        return of_it, wanted
    variants = [match[1] if (match := _VARIANT.search(file.name)) else None for file in files]
    variant = None if None in variants or not files else variants[0]
    return [file for file, of in zip(files, variants) if of == variant], variant


def lacking_variant(path: Path, layout: Layout, variant: str, base: str) -> list[str]:
    """The parts of a pipeline folder, of a base as its user names it, without weights of a variant.

    Raises InputError where no part has them.
    """
    parts = there(path, layout)
    lacking = [part for part in parts if weight_files(path / part, variant)[1] != variant]
    if lacking == parts:
        raise InputError(
            f"model.variant is {variant}, and {base} has no weights of that name, such as"
            f" {parts[0]}/diffusion_pytorch_model.{variant}.safetensors: leave it out"
        )
    return lacking


def _is_of(file: Path, variant: str) -> bool:
    """Whether a file of weights is of a variant, by its name, whole or as a shard."""
    return re.search(rf"\.{re.escape(variant)}[.-]", file.name) is not None


def _check_shards(index: Path) -> None:
    """Raise InputError where a shard that an index lists is not there."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        lacking = sorted(name for name in names if not (index.parent / name).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is damaged ({error}): download or save it again") from error
    if lacking:
        raise InputError(
            f"{index.parent / lacking[0]} is missing: the base is incomplete; download or save it"
            " again"
        )


def load_folder(path: Path, layout: Layout, variant: str | None = None, **given: Any) -> Any:
    """The pipeline in a folder. Every part is loaded by itself, as only so the loaders tell which
    weights they made up.

    Its weights are in fp32, or as they were saved where the layout says so; the autoencoder is in
    fp32. `given` are parts that are made already, and options of the pipeline. Of parts that have
    files of the `variant`, these are read.
    """
    import diffusers

    index, given = check_index(path / "model_index.json"), {**layout.options, **given}
    named = pipeline_class(path)
    pipeline = getattr(diffusers, named if named in layout.pipelines else layout.pipelines[0])
    parts: dict[str, Any] = {name: None for name in layout.optional}
    try:
        for part in [name for name in there(path, layout) if name not in given]:
            parts[part] = _load_part(path, part, index[part], layout, variant)
        for name in (*layout.tokenizers, "scheduler"):
            if name not in given:
                parts[name] = _class(index[name]).from_pretrained(path, subfolder=name)
        # what the pipeline class calls optional, and this project has no use for
        unused = {name: None for name in pipeline._optional_components if name not in parts}
        known = inspect.signature(pipeline.__init__).parameters
        options = {
            name: value
            for name, value in index.items()
            if name in known and not isinstance(value, list) and value is not None
        }
        return pipeline(**{**unused, **options, **parts, **given})
    except (OSError, TypeError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(
            f"cannot load the base {path}: {reason(error)}; download or save it again"
        ) from error
    except ImportError as error:
        raise InputError(f"cannot load the base {path}: {reason(error)}") from error


def _load_part(
    path: Path, part: str, named: list[str], layout: Layout, wanted: str | None = None
) -> Any:
    files, variant = weight_files(path / part, wanted)
    dtype = dtype_of(files[0]) if layout.as_saved and part != "vae" else torch.float32
    module, loading = _class(named).from_pretrained(
        path,
        subfolder=part,
        variant=variant,
        use_safetensors=True,
        dtype=dtype,
        output_loading_info=True,
    )
    if lacking := sorted(loading["missing_keys"]):
        raise ValueError(f"{part} lacks {lacking[0]} and {len(lacking) - 1} more weights")
    return module


def _class(named: list[str]) -> Any:
    """A class of diffusers or transformers, as model_index.json names it."""
    import diffusers
    import transformers

    library = diffusers if named[0] == "diffusers" else transformers
    kind = getattr(library, named[1], None)
    if not isinstance(kind, type):
        raise ValueError(f"this version of {named[0]} has no {named[1]}")
    return kind


def scheduler_of(folder: Path) -> Any:
    """The scheduler of a pipeline folder. Where it needs a package that is not there, one that
    draws nearly the same images.
    """
    import diffusers

    name = check_index(folder / "model_index.json").get("scheduler", [None, None])[1]
    try:
        return _class(["diffusers", str(name)]).from_pretrained(folder, subfolder="scheduler")
    except ImportError as error:  # training asks for the levels of noise alone, which are the same
        warnings.warn(
            f"{reason(error)}: what {folder} draws is drawn with EulerDiscreteScheduler instead",
            stacklevel=2,
        )
        config = read_config(folder / "scheduler" / "scheduler_config.json")
        return diffusers.EulerDiscreteScheduler.from_config(
            {k: v for k, v in config.items() if k != "_class_name"}, use_beta_sigmas=False
        )
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"cannot load the base {folder}: {reason(error)}; download or save it again"
        ) from error


def load_file(path: Path, layout: Layout, config: Path, **given: Any) -> Any:
    """The pipeline in one file, with the configuration of a pipeline folder, which also lends the
    parts that the file lacks.

    Dtypes and `given` are as for a folder; parts that are given are read from neither.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    index, within = check_index(config / "model_index.json"), parts_within(path, layout)
    denoiser, *others = there(config, layout)
    given = {**layout.options, **given}
    try:
        lent = {
            part: _lend(path, part, config, index[part], layout)
            for part in others
            if part not in within and part not in given
        }
        how: dict[str, Any] = {
            "config": str(config),
            "dtype": dtype_of(path) if layout.as_saved else torch.float32,
        }
        if len(within) > 1:
            pipeline = getattr(diffusers, layout.pipelines[0])
            pipe = pipeline.from_single_file(str(path), **how, **lent, **given)
        else:
            kind = _class(index[denoiser])
            tensors = _inner(load_safetensors(path))
            if denoiser == "unet":  # whose converter looks for it, as others' do not
                tensors = {f"{_DENOISER}{name}": value for name, value in tensors.items()}
            module = kind.from_single_file(tensors, subfolder=denoiser, **how)
            pipe = load_folder(config, layout, **{denoiser: module}, **lent, **given)
        for part in layout.parts:
            module = getattr(pipe, part)
            if module is not None and (
                lacking := [n for n, value in module.state_dict().items() if value.is_meta]
            ):
                raise ValueError(f"{part} lacks {lacking[0]} and {len(lacking) - 1} more weights")
        if "vae" not in given:
            pipe.vae.to(torch.float32)
        return pipe
    except InputError:
        raise
    except (
        OSError,
        TypeError,
        ValueError,
        RuntimeError,
        KeyError,
        AttributeError,
        SafetensorError,
        SingleFileComponentError,
    ) as error:
        why = reason(error)
        if isinstance(error, KeyError):
            why = f"it lacks {error.args[0]}"
        elif isinstance(error, NotImplementedError):  # of moving a tensor that has no values
            why = "it lacks weights"
        raise InputError(
            f"cannot load {path} with the configuration {config}: {why}; name its own with"
            " model.base_config"
        ) from error


def parts_within(path: Path, layout: Layout) -> list[str]:
    """The parts that a single file has, the denoiser first."""
    names = shapes_of(path)
    return [layout.parts[0]] + [
        part
        for part, start in layout.within.items()
        if any(name.startswith(start) for name in names)
    ]


def beside(path: Path, layout: Layout) -> list[str]:
    """How the names of those tensors in a single file begin that are of no part."""
    names = shapes_of(path).keys()
    if not any(name.startswith(_DENOISER) for name in names):
        return []  # it is the denoiser alone
    known = ("model.", *layout.within.values())
    others = [name for name in names if "." in name and not name.startswith(known)]
    return sorted({name.split(".")[0] for name in others})


def _lend(path: Path, part: str, config: Path, named: list[str], layout: Layout) -> Any:
    """A part that a single file lacks, from the folder of its configuration."""
    if weight_files(config / part)[0]:
        return _load_part(config, part, named, layout)
    if part in layout.optional:
        return None
    raise InputError(
        f"{path} holds no {part} ({named[1]}), and neither does {config}: set model.base_config to"
        " a whole pipeline folder of the same kind, which lends it"
    )


def config_folder(path: Path, layout: Layout, config: str | None) -> Path:
    """The pipeline folder whose configuration a single file has; what diffusers takes for a file of
    its shapes where None. From the hub it comes with the weights that the file lacks.
    """
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS
    from huggingface_hub import snapshot_download

    folder = Path(config or "").expanduser()
    if not config or not folder.is_dir():
        usual = DIFFUSERS_DEFAULT_PIPELINE_PATHS.get(kind_of(shapes_of(path)), {})
        config = config or usual.get("pretrained_model_name_or_path")
        if config is None:
            raise InputError(
                f"{path} is of {layout.family} and does not say of which: set model.base_config to"
                " the hub id or the folder of its pipeline"
            )
        within = parts_within(path, layout)
        lacking = [f"{part}/*.safetensors" for part in layout.parts if part not in within]
        wanted = ["*.json", "*.txt", "*.model", *lacking]
        try:
            folder = Path(snapshot_download(config, allow_patterns=wanted))
        except (OSError, ValueError) as error:
            raise InputError(
                f"the configuration {config} of {path} is neither a folder nor cached, nor can it"
                f" be fetched ({reason(error)}): set model.base_config to a pipeline folder of the"
                " same kind"
            ) from error
    check_folder(folder, layout, weights=False)
    return folder


def index_from_hub(name: str, revision: str | None = None) -> Path:
    """The folder in the cache with the model_index.json of a hub id, from which its family is known
    before its weights are fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["model_index.json"]))
    except (OSError, ValueError) as error:
        which = f"{name} of revision {revision}" if revision else name
        raise InputError(
            f"there is no {which} here, and as a hub id it is neither cached nor can it be fetched"
            f" ({reason(error)}): correct the name, or check the connection and HF_HUB_OFFLINE"
        ) from error


def fetch_from_hub(
    name: str,
    layout: Layout,
    safety_checker: bool = False,
    revision: str | None = None,
    variant: str | None = None,
) -> Path:
    """The whole pipeline folder of a hub id in the cache, with its safety checker if asked for, and
    with the files of a variant instead of the plain ones where it has them.
    """
    import diffusers

    pipeline = getattr(diffusers, layout.pipelines[0])
    used = (*layout.parts, *(("safety_checker", "feature_extractor") if safety_checker else ()))
    unused = {part: None for part in pipeline._optional_components if part not in used}
    try:
        wanted = {"revision": revision, "variant": variant, "use_safetensors": True}
        return Path(pipeline.download(name, **wanted, **unused))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot fetch the base {name} from the hub: {reason(error)}") from error


def autoencoder(name: str, own: Any) -> Any:
    """An autoencoder of the class of a base's own one, in fp32, frozen.

    Args:
        name: a folder with its config.json, a pipeline folder, a .safetensors file or a hub id.
        own: that of the base, whose latents it must have.
    """
    path = Path(name).expanduser()
    try:
        if path.is_file():
            if path.suffix != ".safetensors":
                raise InputError(
                    f"model.vae {name} is no .safetensors file, and others can run code when they"
                    " are read: convert it first"
                )
            vae = type(own).from_single_file(str(path), dtype=torch.float32)
        else:
            whole = (path / "vae" / "config.json").is_file()
            vae = type(own).from_pretrained(
                str(path) if path.is_dir() else name,
                use_safetensors=True,
                dtype=torch.float32,
                **({"subfolder": "vae"} if whole else {}),
            )
    except InputError:
        raise
    except (OSError, TypeError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(
            f"cannot load model.vae {name}: {reason(error)}; name a folder, a .safetensors file or"
            f" a hub id of an {type(own).__name__}"
        ) from error
    return check_vae(vae, own, f"model.vae {name}").requires_grad_(False).eval()


def check_vae(vae: Any, own: Any, name: str) -> Any:
    """The autoencoder. Raises InputError where its latents are not those of a base's own one."""
    channels = [model.config.get("latent_channels") for model in (vae, own)]
    if channels[0] != channels[1]:
        raise InputError(
            f"{name} has latents of {channels[0]} channels, and the base's have {channels[1]}: name"
            " one that was made for this family"
        )
    return vae


def shapes_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file without their values."""
    try:
        with safe_open(path, framework="pt") as file:
            return {
                key: torch.empty(file.get_slice(key).get_shape(), device="meta")
                for key in file.keys()
            }
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is damaged ({reason(error)}): download or save it again"
        ) from error


def dtype_of(path: Path) -> torch.dtype:
    """The dtype of a file's first floating point tensor; fp32 where it is none to compute in."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            if (dtype := names.get(str(file.get_slice(key).get_dtype()))) is not None:
                return dtype
    return torch.float32


_DENOISER = "model.diffusion_model."  # how its weights' names begin beside those of other parts
# of quantised weights: ComfyUI's fp8, bitsandbytes', SVDQuant's
_SCALES = re.compile(
    r"(^|\.)(scaled_fp8|scale_(weight|input)|(weight|input)_scale|comfy_quant|absmax|w?scales)$"
)
# what diffusers knows by the width of the models that were published, or not at all
_MARKS = {
    "joint_blocks.0.x_block.attn.qkv.weight": "sd3",
    "transformer_blocks.0.img_mod.1.weight": "qwen-image",
    "label_emb.0.0.weight": "xl_base",
}


def kind_of(shapes: dict[str, Tensor]) -> str:
    """What diffusers takes a single file of these tensors for."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    inner = _inner(shapes)
    try:
        kind = infer_diffusers_model_type(shapes)
        if kind == "v1":  # as diffusers takes what it does not know
            marks = [mark for name, mark in _MARKS.items() if name in inner]
            kind = marks[0] if marks else infer_diffusers_model_type(inner)
    except (ValueError, IndexError):  # of shapes that no model has
        return "v1"
    if kind == "sana" and "attention_y_norm.weight" not in inner:
        return "pixart"  # whose blocks have the same names
    return kind


def scales_in(names: Iterable[str]) -> list[str]:
    """The tensors of quantised weights that diffusers would leave out of a single file."""
    return [name for name in names if _SCALES.search(name)]


def _inner(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's tensors by their own names, without what these begin with beside others."""
    inner = {k.removeprefix(_DENOISER): v for k, v in tensors.items() if k.startswith(_DENOISER)}
    return inner or tensors


def reason(error: Exception) -> str:
    """The first sentence of a library's error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
