"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention, epsilon or v
prediction.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dreamblend.errors import InputError
from dreamblend.models.backbone import Backbone, Site
from dreamblend.models.marks import PREDICTIONS, Marks, predicting
from dreamblend.models.text import STOPWORDS, Conditioning, Offsets, Span, words_of
from dreamblend.models.trust import check_index, read_config
from dreamblend.storage.hub import fetching

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # of the same parts
PARTS = ("unet", "vae", "text_encoder")
OPTIONS = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


class StableDiffusion(Backbone):
    """Wraps the modules of diffusers' StableDiffusionPipeline."""

    def __init__(self, pipe, base: str):
        super().__init__({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, pipe.vae)
        self.base, self.scheduler, self.tokenizer = base, pipe.scheduler, pipe.tokenizer
        shrinks = 2 ** (len(self.vae.config.block_out_channels) - 1)
        side = self.denoiser.config.sample_size
        if side is None:
            side = self.vae.config.sample_size // shrinks
        if not isinstance(side, int):  # [height, width]
            if len(set(side)) != 1:
                raise InputError(
                    f"the base {base} makes images of {side[1] * shrinks} x {side[0] * shrinks}"
                    " pixels: only square ones can be trained and drawn"
                )
            side = side[0]
        self.latent_shape = (
            self.denoiser.config.in_channels,
            side,
            side,
        )
        self.size = side * shrinks
        self.distilled = self.denoiser.config.time_cond_proj_dim is not None

    # -- text
    @property
    def text_encoder(self) -> nn.Module:
        return self._parts["text_encoder"]

    @property
    def length(self) -> int:
        return min(
            self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings
        )

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        self.activate()
        encoder, rows = self.text_encoder, [self._tokens(p)[0] for p in prompts]
        rows = [
            row if len(row) <= self.length else [*row[: self.length - 1], row[-1]] for row in rows
        ]
        tokens = self.tokenizer.pad(
            {"input_ids": rows}, padding="max_length", max_length=self.length, return_tensors="pt"
        ).to(self.device)
        mask = (
            tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        )
        learned = (
            nullcontext(tokens.input_ids)
            if self.concept is None
            else self.concept.inside(encoder.get_input_embeddings(), tokens.input_ids)
        )
        with learned as ids:
            return self.guided(
                Conditioning(encoder(ids, attention_mask=mask).last_hidden_state), 1.0
            )

    def embedding(self, words: str) -> Tensor:
        table = self.text_encoder.get_input_embeddings()
        ids = self.tokenizer(words, add_special_tokens=False).input_ids
        return table.weight[ids].detach().mean(0)

    def _tokens(self, prompt: str) -> tuple[list[int], Offsets]:
        """Token ids of a prompt of any length, and their places in it. A learned word's ids follow
        the vocabulary.
        """
        if self.concept is None:
            found = self.tokenizer(prompt, return_offsets_mapping=True, truncation=False)
            return found.input_ids, found.offset_mapping
        first = self.text_encoder.get_input_embeddings().num_embeddings
        ids, offsets = [self.tokenizer.bos_token_id], [(0, 0)]
        for start, end, learned in self.concept.split(prompt):
            if learned:
                ids += range(first, first + len(self.concept.vectors))
                offsets += [(start, end)] * len(self.concept.vectors)
                continue
            found = self.tokenizer(
                prompt[start:end],
                add_special_tokens=False,
                return_offsets_mapping=True,
                truncation=False,
            )
            ids += found.input_ids
            offsets += [(start + a, start + b) for a, b in found.offset_mapping]
        return [*ids, self.tokenizer.eos_token_id], [*offsets, (0, 0)]

    def _words(self, prompt: str) -> list[tuple[str, tuple[int, ...]]]:
        """Every word with the positions its tokens would have in a prompt of any length."""
        return words_of(prompt, self._tokens(prompt)[1])

    def spans(self, prompt: str) -> list[Span]:
        return [
            Span(word, tokens)
            for word, tokens in self._words(prompt)
            if word.lower() not in STOPWORDS and tokens[-1] < self.length - 1
        ]

    def dropped_words(self, prompt: str) -> list[str]:
        return [word for word, tokens in self._words(prompt) if tokens[-1] >= self.length - 1]

    # -- images
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        return (
            posterior.mean * self.vae.config.scaling_factor,
            posterior.std * self.vae.config.scaling_factor,
        )

    def decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(
            latents.device.type, enabled=False
        ):  # the autoencoder's own dtype is the one it is safe in
            return self.vae.decode(
                latents.to(self.vae.dtype) / self.vae.config.scaling_factor
            ).sample

    # -- denoising
    def guided(self, conditioning: Conditioning, scale: float) -> Conditioning:
        if not self.distilled:
            return conditioning
        from diffusers import StableDiffusionPipeline

        scales = torch.full(
            (len(conditioning.states),), scale - 1.0
        )  # no guidance is zero (Meng et al., CVPR 2023)
        embedding = StableDiffusionPipeline.get_guidance_scale_embedding(
            None, scales, self.denoiser.config.time_cond_proj_dim
        )
        return Conditioning(
            conditioning.states,
            {**conditioning.extras, "timestep_cond": embedding.to(conditioning.states.device)},
        )

    def denoise(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.activate()
        dtype = self.denoiser.dtype
        extras = {name: value.to(dtype) for name, value in conditioning.extras.items()}
        return self.denoiser(latents.to(dtype), t, conditioning.states.to(dtype), **extras).sample

    def sites(self, grid: int | None = None) -> dict[str, Site]:
        side, levels = self.latent_shape[1], len(self.denoiser.config.block_out_channels)
        found = {}
        for name, _ in self.denoiser.named_modules():
            if not name.endswith(".attn2"):
                continue
            part, number = name.split(".")[0], name.split(".")[1]
            if part == "mid_block":
                level = levels - 1
            else:
                level = int(number) if part == "down_blocks" else levels - 1 - int(number)
            found[name] = -(-side // 2**level)  # the halving convolutions round up
        order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
        found = dict(sorted(found.items(), key=lambda item: order[item[0].split(".")[0]]))
        chosen = {name: g for name, g in found.items() if grid is None or g == grid}
        if not chosen:
            raise InputError(
                f"no attention site of grid {grid} in {self.base}: it has"
                f" {sorted(set(found.values()))}; set `grid` to one of them"
            )
        return {name: Site(g, g) for name, g in chosen.items()}


# ------------------------------------------------------------------------------------------ loading
def check_folder(path: Path, weights: bool = True) -> None:
    """Raise InputError where a pipeline folder lacks something or is of another family: from its
    listing and its files' headers alone.
    """
    _check_family(path)
    for name in ("scheduler/scheduler_config.json", *(f"{part}/config.json" for part in PARTS)):
        if not (path / name).is_file():
            raise InputError(
                f"{path / name} is missing: the base is incomplete; download or save it again"
            )
        read_config(path / name)
    if not any(
        (path / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json")
    ):  # the loader would make one without words
        raise InputError(
            f"{path / 'tokenizer'} has no vocabulary: the base is incomplete; download or save it"
            " again"
        )
    for part in PARTS if weights else ():
        files = sorted((path / part).glob("*.safetensors"))
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
            _shapes(file)


def check_file(path: Path) -> None:
    """Raise InputError where a single file is damaged or of another family, from its header
    alone.
    """
    shapes = _shapes(path)
    if any("lora" in key for key in shapes):
        raise InputError(f"{path} is a LoRA, not a base: name the model that it was made for")
    if not any(key.startswith("model.diffusion_model.input_blocks.") for key in shapes):
        raise InputError(
            f"{path} is no Stable Diffusion 1.x or 2.x checkpoint: it lacks"
            " model.diffusion_model.input_blocks; name another"
        )
    if (kind := _kind(shapes)) not in ("v1", "v2"):
        raise InputError(
            f"{path} is of the kind {kind}: the families that can be loaded are Stable Diffusion"
            " 1.x and 2.x"
        )


def load(base: str, config: str | None = None, prediction: str | None = None) -> StableDiffusion:
    """Load a base in fp32 through diffusers' own loaders.

    Args:
        base: a hub id, a pipeline folder, or a single .safetensors file.
        config: for a single file, the hub id or folder of its configuration where diffusers cannot
            tell it.
        prediction: epsilon or v_prediction, instead of what the base says of itself.
    """
    import diffusers
    import transformers

    if prediction not in (None, *PREDICTIONS):
        raise InputError(
            f"model.base_prediction is {prediction!r}: it is one of {', '.join(PREDICTIONS)}"
        )

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    path = Path(base)
    with fetching(base):
        folder = path if path.exists() else _from_hub(base)
    pipe = (
        _from_file(path, config, prediction) if path.is_file() else _from_folder(folder, prediction)
    )
    taken, made = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if taken != made:
        raise InputError(
            f"the base {base} takes {taken} channels and its latents have {made}: inpainting and"
            " depth models cannot be loaded"
        )
    return StableDiffusion(pipe, base)


def _from_folder(path: Path, prediction: str | None):
    """Every part by itself, as only so the loaders tell which weights they made up."""
    import diffusers
    import transformers

    check_folder(path)
    parts = {}
    try:
        for part, kind in zip(
            PARTS,
            (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, transformers.CLIPTextModel),
        ):
            variant = (
                "fp16"
                if all(".fp16." in file.name for file in (path / part).glob("*.safetensors"))
                else None
            )
            parts[part], loading = kind.from_pretrained(
                path,
                subfolder=part,
                variant=variant,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            if lacking := sorted(loading["missing_keys"]):
                raise ValueError(f"{part} lacks {lacking[0]} and {len(lacking) - 1} more weights")
        scheduler = _scheduler(path)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
        pipe = diffusers.StableDiffusionPipeline(
            **parts, scheduler=scheduler, tokenizer=tokenizer, **OPTIONS
        )
    except (OSError, TypeError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(
            f"cannot load the base {path}: {_reason(error)}; download or save it again"
        ) from error
    if prediction:
        said = pipe.scheduler.config.prediction_type
        if said != prediction:
            warnings.warn(
                f"{path} is taken as a model that predicts {prediction}, as model.base_prediction"
                f" says, and its own scheduler says {said}",
                stacklevel=2,
            )
        pipe.scheduler = predicting(pipe.scheduler, prediction)
    return pipe


def _scheduler(folder: Path):
    """The scheduler of a pipeline folder. Where it needs a package that is not there, one that
    draws nearly the same images.
    """
    import diffusers

    name = check_index(folder / "model_index.json").get("scheduler", [None, None])[1]
    if not isinstance(kind := getattr(diffusers, str(name), None), type):
        raise ValueError(f"this version of diffusers has no scheduler {name}")
    try:
        return kind.from_pretrained(folder, subfolder="scheduler")
    except ImportError as error:  # training asks for the levels of noise alone, which are the same
        warnings.warn(
            f"{_reason(error)}: what {folder} draws is drawn with EulerDiscreteScheduler instead",
            stacklevel=2,
        )
        said = read_config(folder / "scheduler" / "scheduler_config.json")
        return diffusers.EulerDiscreteScheduler.from_config(
            {k: v for k, v in said.items() if k != "_class_name"}, use_beta_sigmas=False
        )


def _from_hub(name: str) -> Path:
    """The folder of a hub id in the cache. Its family is known before its weights are fetched."""
    from diffusers import StableDiffusionPipeline
    from huggingface_hub import snapshot_download

    try:
        index = Path(snapshot_download(name, allow_patterns=["model_index.json"]))
    except (OSError, ValueError) as error:
        raise InputError(
            f"there is no {name} here, and as a hub id it is neither cached nor can it be fetched"
            f" ({_reason(error)}): correct the name, or check the connection and HF_HUB_OFFLINE"
        ) from error
    _check_family(index, name)
    try:
        return Path(
            StableDiffusionPipeline.download(
                name, use_safetensors=True, safety_checker=None, feature_extractor=None
            )
        )
    except (OSError, ValueError) as error:
        raise InputError(f"cannot fetch the base {name} from the hub: {_reason(error)}") from error


def _from_file(path: Path, config: str | None, prediction: str | None):
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    folder = _config_folder(path, config)
    marks = Marks.read(path)
    second = _kind(_shapes(path)) == "v2"
    said = marks.prediction(path, prediction)
    try:
        pipe = StableDiffusionPipeline.from_single_file(
            str(path),
            config=str(folder),
            scheduler=_scheduler(folder),
            dtype=torch.float32,
            **OPTIONS,
        )
        for part in PARTS:
            if lacking := [
                name for name, value in getattr(pipe, part).state_dict().items() if value.is_meta
            ]:
                raise ValueError(f"{part} lacks {lacking[0]} and {len(lacking) - 1} more weights")
    except (
        OSError,
        TypeError,
        ValueError,
        RuntimeError,
        KeyError,
        SafetensorError,
        SingleFileComponentError,
    ) as error:
        reason = (
            "it lacks weights" if isinstance(error, NotImplementedError) else _reason(error)
        )  # of moving a tensor that has no values
        raise InputError(
            f"cannot load {path} with the configuration {config or folder}: {reason}; name its own"
            " with model.base_config"
        ) from error

    usual = pipe.scheduler.config.prediction_type
    if said is None and second and config is None:
        warnings.warn(
            f"{path} does not say which Stable Diffusion 2 it is: it is taken as one of 768 pixels"
            " that predicts v; if it is of 512 pixels, set model.base_prediction to epsilon",
            stacklevel=2,
        )
    if said not in (None, usual) and config and not prediction:
        warnings.warn(
            f"{path} predicts {said} by its own marks ({', '.join(marks.predictions)}) and {usual}"
            f" by its configuration {config}: its marks count; set model.base_prediction if they"
            " are wrong",
            stacklevel=2,
        )
    if marks.zero_snr and (said or usual) == "epsilon" and not prediction:
        raise InputError(
            f"{path} was trained to zero terminal SNR (ztsnr), where epsilon cannot be predicted:"
            " set model.base_prediction to v_prediction"
        )
    pipe.scheduler = predicting(
        pipe.scheduler, said or usual, marks.zero_snr and prediction != "epsilon"
    )
    if config is None and (
        size := marks.size or (512 if second and said == "epsilon" else None)
    ):  # the base models of Stable Diffusion 2
        pipe.unet.register_to_config(
            sample_size=size // 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        )
    return pipe


def _config_folder(path: Path, config: str | None) -> Path:
    """The pipeline folder whose configuration a single file has; what diffusers takes for a file of
    its shapes where None.
    """
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS
    from huggingface_hub import snapshot_download

    folder = Path(config or "").expanduser()
    if not config or not folder.is_dir():
        config = (
            config
            or DIFFUSERS_DEFAULT_PIPELINE_PATHS[_kind(_shapes(path))][
                "pretrained_model_name_or_path"
            ]
        )
        try:
            folder = Path(snapshot_download(config, allow_patterns=["*.json", "*.txt"]))
        except (OSError, ValueError) as error:
            raise InputError(
                f"the configuration {config} of {path} is neither a folder nor cached, nor can it"
                f" be fetched ({_reason(error)}): set model.base_config to a pipeline folder of the"
                " same kind"
            ) from error
    check_folder(folder, weights=False)
    return folder


def _check_family(path: Path, name: str | None = None) -> None:
    index = path / "model_index.json"
    if not index.is_file():
        raise InputError(
            f"{path} is not a diffusers pipeline folder: it has no model_index.json; name one that"
            " has, a hub id or a .safetensors file"
        )
    if "_class_name" not in (said := check_index(index)):
        raise InputError(f"{index} is damaged (it has no _class_name): download or save it again")
    family = said["_class_name"]
    if family not in PIPELINES:
        raise InputError(
            f"{name or path} holds a {family}: the families that can be loaded are Stable Diffusion"
            " 1.x and 2.x"
        )


def _shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file without their values."""
    try:
        with safe_open(path, framework="pt") as file:
            return {
                key: torch.empty(file.get_slice(key).get_shape(), device="meta")
                for key in file.keys()
            }
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is damaged ({_reason(error)}): download or save it again"
        ) from error


def _kind(shapes: dict[str, Tensor]) -> str:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    return infer_diffusers_model_type(shapes)


def _reason(error: Exception) -> str:
    """The first sentence of a library's error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
