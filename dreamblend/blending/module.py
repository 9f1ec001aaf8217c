"""The predicting LightningModule: prompts and seeds -> early, blended and late images with their
maps and collapse measures.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import Blend, Region
from dreamblend.blending.data import PromptData
from dreamblend.blending.draw import draw, kinds
from dreamblend.blending.inversion import fitted
from dreamblend.blending.models import Models, check_quantized, drawing_dtype, warn_of_other_vae
from dreamblend.blending.options import Options, check_layers, check_size
from dreamblend.blending.pair import Pair
from dreamblend.blending.picture import Picture, pictures
from dreamblend.blending.prompts import named, without_identifier
from dreamblend.errors import InputError
from dreamblend.models import Backbone
from dreamblend.models.compiled import compile_blocks
from dreamblend.models.loading import check_version
from dreamblend.models.placement import Turns, check_offload, place
from dreamblend.storage.photos import open_photo
from dreamblend.storage.snapshots import DTYPES, sha256
from dreamblend.trainer import datamodule

if TYPE_CHECKING:
    from diffusers import ConfigMixin

GROUP = 4  # pairs drawn at once on a CPU, whatever the batch; larger groups gain nothing there


class Blender(L.LightningModule):
    """Draws each (prompt, seed) with the early snapshot, the late one, and the blend of both.

    Args:
        early: the underfit snapshot: a step of the run, or a path (also of a checkpoint made
            elsewhere).
        late: the overfit snapshot, likewise.
        run: folder of the run that steps refer to.
        base: what the snapshots were tuned from; as the snapshots record it where None.
        base_config, base_prediction: of the base, as in training; as the snapshots record them
            where None.
        identifier: the subject's rare token; as the snapshots record it where None. Where they know
            several subjects, it or `class_noun` chooses one; the run's own where both are None.
        class_noun: the subject's class; as the snapshots record it where None.
        blend: how to blend: Region, CAG, Switch, Merge, Score, Early or Late; or a published
            sampler: Personalization, Autoguidance, Reward, Masked or Similarity.
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance; at 1 and below the prompt's own prediction, as
            in diffusers.
        dtype: fp32, bf16 or fp16; where None fp32, but bf16 on a GPU for LoRA, T-LoRA and a learned
            word, which it leaves exact. bf16 for quantised weights.
        quantize: int8 or nf4 quantises the frozen weights of the denoiser and of large text
            encoders, for snapshots that are added to them.
        offload: none, or model, where denoisers, text encoders and autoencoder wait on the CPU and
            take turns on the GPU: less memory, more time.
        compile: compile the denoiser's blocks, which takes minutes once and makes every later step
            faster. Those whose attention is read stay as they are.
        grid: rows of the attention sites that are read; a quarter of the latents'
            (`Backbone.default_grid`) where None.
        attention_layers: names of those that are read, or of blocks that hold them; `*` stands for
            any text. Where None, all of a UNet's grid, and some in the middle of a transformer.
        height: of the images, in pixels; the base's own where None.
        width: likewise.
        compare: draw what each snapshot draws alone, too.
        scheduler: the sampler: euler, euler-a, dpm++-2m-karras, unipc, heun, ddim, ... A name that
            is not known lists them. The base's own where None.
        negative_prompt: what guidance leads away from, for models that are not distilled.
        guidance_rescale: against overexposure by a high guidance scale, a share from 0 to 1 (Lin et
            al., 2024). Each snapshot's guided prediction gets the deviation of its own prompt's,
            before a blend mixes them.
        safety_checker: leave out what the base's own safety checker takes for unsafe, where it has
            one.
        strength: scale of the adapters of LoRA snapshots: one for both, or [early, late].
        clip_skip: last layers of the CLIP text encoders that prompts leave out, for Stable
            Diffusion and SDXL, as diffusers counts them.
        vae: another autoencoder: a folder, a .safetensors file or a hub id; where None, the one
            that the snapshots were trained with.
        vae_tiling: decode in tiles: less memory for large images, and seams at worst.
        reference: a photo or any image whose layout CAG follows, instead of what the early snapshot
            draws: its middle, at the size of the images.
        revision: of a base on the hub: a branch, a tag or a commit; as the snapshots record it
            where None.
        prompt_weighting: compel reads prompts, negative ones too, in its syntax: (word)1.3, word++;
            and of any length. For Stable Diffusion and SDXL. Plain text where None.
        variant: of the base's weights, such as fp16, in a folder or on the hub; likewise.
    """

    def __init__(
        self,
        early: str,
        late: str,
        run: Path | None = None,
        base: str | None = None,
        base_config: str | None = None,
        base_prediction: str | None = None,
        identifier: str | None = None,
        class_noun: str | None = None,
        blend: Blend = Region(),
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        dtype: str | None = None,
        quantize: str | None = None,
        offload: str = "none",
        compile: bool = False,
        grid: int | None = None,
        attention_layers: list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        compare: bool = True,
        scheduler: str | None = None,
        negative_prompt: str | None = None,
        guidance_rescale: float = 0.0,
        safety_checker: bool = True,
        strength: float | tuple[float, float] | None = None,
        clip_skip: int | None = None,
        vae: str | None = None,
        vae_tiling: bool = False,
        reference: Path | None = None,
        revision: str | None = None,
        prompt_weighting: str | None = None,
        variant: str | None = None,
    ):
        super().__init__()
        check_size(height, width)
        self.options = Options(
            scheduler=scheduler,
            negative_prompt=negative_prompt,
            guidance_rescale=guidance_rescale,
            strength=tuple(strength) if isinstance(strength, list) else strength,
            clip_skip=clip_skip,
            vae=vae,
            vae_tiling=vae_tiling,
            prompt_weighting=prompt_weighting,
        )
        check_layers(attention_layers)
        if num_inference_steps < 1:
            raise InputError(
                f"model.num_inference_steps is {num_inference_steps}: it must be at least 1"
            )
        if reference is not None and not blend.guided_steps(num_inference_steps):
            raise InputError(
                f"--reference {reference} guides CAG alone, and {blend.name} is drawn: add"
                " --model.blend CAG, or leave it out"
            )
        self.reference = None if reference is None else open_photo(Path(reference))
        self._reference_hash = None if reference is None else sha256(Path(reference))
        self.run = run
        self.blend = blend
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.compare = compare
        self.safety_checker = safety_checker
        self.flagged: list[tuple[str, int]] = []  # pairs with an image that was left out as unsafe
        self.pair = Pair.find(run, str(early), str(late))
        self.base_config, self.base_prediction = base_config, base_prediction
        self.base = base or self.pair.recorded("base")
        check_version(self.base, revision, variant)
        self.revision, self.variant = revision, variant
        self.identifier, self.class_noun = self.pair.subject(identifier, class_noun)
        if dtype not in (None, *DTYPES):
            raise InputError(f"model.dtype is {dtype!r}: it is one of {', '.join(DTYPES)}")
        check_quantized(quantize, self.pair.early.method)
        check_offload(offload)
        self._grid, self.dtype_name, self.quantize = grid, dtype, quantize
        self.offload, self.compile_blocks = offload, compile
        self._height, self._width, self.attention_layers = height, width, attention_layers
        self.models: Models | None = None
        self._turns: Turns | None = None

    def load(self) -> Models:
        """The pair in memory; the first call reads it, onto the CPU."""
        if self.models is None:
            self.models = self._read(self.drawn_in)
            base = self.models.base
            self.options.check(self.models.late, self.guidance_scale)
            self.blend.check(self.models.late, self.guidance_scale)
            warn_of_other_vae(self.pair.about, self.models.late)
            self.size = self._height or base.size, self._width or base.size
            latent_size = base.latent_size(*self.size)
            self.models.late.schedule(self.num_inference_steps, latent_size)  # too few are refused
            self.grid = self._grid or base.default_grid(latent_size, self.attention_layers)
            sites = base.sites(self.grid, latent_size, self.attention_layers)
            if self.compile_blocks:
                for denoiser in {m.denoiser for m in (self.models.early, self.models.late)}:
                    compile_blocks(denoiser, sites)
        return self.models

    def _read(self, dtype: str) -> Models:
        models = Models.load(
            self.pair,
            self.base,
            self.identifier,
            self.base_config,
            self.base_prediction,
            self.quantize,
            DTYPES[dtype],
            safety_checker=self.safety_checker,
            revision=self.revision,
            variant=self.variant,
            trained_vae=self.options.vae is None,
        )
        self.options.apply(models)
        return models

    def on_predict_start(self) -> None:
        models = self.load()
        self.place(models.early, models.late)

    def place(self, *models: Backbone, dtype: str | None = None) -> None:
        """Move models to the device, or let them take turns there, in `dtype`: the blend's where
        None.
        """
        if self.offload == "model" and self._turns is None:
            self._turns = Turns(self.device)
        for model in models:
            place(model, self.device, DTYPES[dtype or self.drawn_in], self._turns)

    @property
    def drawn_in(self) -> str:
        method = self.pair.early.method
        return self.dtype_name or drawing_dtype(method, self.device, self.quantize)

    @property
    def settings(self) -> dict[str, Any]:
        """What an image depends on beside its prompt and seed, in plain types. `early`, `late` and
        `base` are only names: their weights count.
        """
        models = self.load()
        height, width = self.size
        settings = {
            "early": self.pair.early.name,
            "late": self.pair.late.name,
            "base": self.base,
            "early_weights": self.pair.early.weights,
            "late_weights": self.pair.late.weights,
            "base_weights": models.base_weights,
            "scheduler": identity(models.late.scheduler),
            "size": height if height == width else [height, width],
            "identifier": self.identifier,
            "class_noun": self.class_noun,
            **self.blend.settings,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "grid": self.grid,
            "dtype": self.drawn_in,
            **({"attention_layers": self.attention_layers} if self.attention_layers else {}),
            **({"quantize": self.quantize} if self.quantize else {}),
            **({"compile": True} if self.compile_blocks else {}),
            **({"reference": self._reference_hash} if self._reference_hash else {}),
            **({"revision": self.revision} if self.revision else {}),
            **({"variant": self.variant} if self.variant else {}),
            **self.options.settings,
            **({} if self.safety_checker else {"safety_checker": False}),
            **({"vae": models.late.fingerprint([models.late.vae])} if self._other_vae else {}),
        }
        return json.loads(json.dumps(settings))  # as they come back from a file

    @property
    def _other_vae(self) -> bool:
        """Whether the autoencoder may be another than the base's own."""
        about = self.pair.about
        return self.options.vae is not None or bool(about and about.settings.get("vae"))

    @property
    def kinds(self) -> list[str]:
        return kinds(self.blend, self.compare)

    # -- the second story
    @torch.no_grad()
    def predict_step(self, batch: list[tuple[str, int]], _: int = 0) -> list[Picture]:
        """(prompt, seed) pairs to pictures: early, blend, late for each.

        The pairs are drawn in groups of one size, the last group filled up, as kernels for another
        size may round differently. So an image does not depend on the other images, the number of
        processes, or (on a CPU) the batch size.
        """
        if torch.is_inference_mode_enabled():
            raise InputError("guidance needs gradients: set trainer.inference_mode to false")
        size = (
            GROUP if self.device.type == "cpu" else datamodule(self.trainer, PromptData).batch_size
        )
        return [
            picture
            for alike in self._alike(batch)
            for i in range(0, len(alike), size)
            for picture in self.draw(alike[i : i + size], size)
        ]

    def _alike(self, batch: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
        """The pairs by how many columns of text their prompts and class prompts have: beside a
        longer one a prompt would be padded with columns that it does not have alone.
        """
        late, groups = self.load().late, defaultdict(list)
        for prompt, seed in batch:
            of_class = without_identifier(prompt, self.identifier)
            groups[late.columns(prompt), late.columns(of_class)].append((prompt, seed))
        return list(groups.values())

    def draw(self, batch: list[tuple[str, int]], size: int) -> list[Picture]:
        """The pictures of up to `size` pairs, drawn as a batch of `size` that repeats the last one.

        A pair with a picture that is not finite (NaN, or out of the range of half precision) is
        drawn again in fp32. If that is not finite either, the pair is left out with a warning, and
        so is a picture that the base's safety checker flags.
        """
        made = self._draw(batch, size, self.load())
        if (again := self._lacking(batch, made)) and self.drawn_in != "fp32":
            warnings.warn(
                f"not finite in {self.drawn_in}, drawn again in fp32: {named(again)}", stacklevel=2
            )
            made = [p for p in made if (p.prompt, p.seed) not in again] + self._draw_precisely(
                again, size
            )
        if lacking := self._lacking(batch, made):
            warnings.warn(
                f"NaN or infinite in fp32 too, and left out: {named(lacking)}", stacklevel=2
            )
        if flagged := list(dict.fromkeys((p.prompt, p.seed) for p in made if p.flagged)):
            warnings.warn(
                f"unsafe by the base's safety checker, and left out: {named(flagged)}", stacklevel=2
            )
            self.flagged += flagged
        return [p for p in made if not p.flagged]

    def _lacking(self, batch: list[tuple[str, int]], made: list[Picture]) -> list[tuple[str, int]]:
        """The pairs that lack a picture."""
        there = {(p.prompt, p.seed, p.kind) for p in made}
        return [pair for pair in batch if any((*pair, kind) not in there for kind in self.kinds)]

    def _draw_precisely(self, batch: list[tuple[str, int]], size: int) -> list[Picture]:
        """The pictures, drawn in fp32. The snapshots are read again, as the cast ones have lost
        precision; the device holds one of the two at a time.
        """
        models = self.load()
        models.to("cpu")
        try:
            precise = self._read("fp32")
            self.place(precise.early, precise.late, dtype="fp32")
            return self._draw(batch, size, precise)
        finally:
            self.place(models.early, models.late)

    def _guide(self) -> Tensor | None:
        """The reference's pixels, at the size of the images."""
        if self.reference is None:
            return None
        return fitted(self.reference, *self.size)

    def _draw(self, pairs: list[tuple[str, int]], size: int, models: Models) -> list[Picture]:
        batch = Batch.of(
            models,
            pairs + pairs[-1:] * (size - len(pairs)),
            self.identifier,
            self.class_noun,
            self.num_inference_steps,
            self.guidance_scale,
            self.grid,
            self.size,
            self.attention_layers,
            negative_prompt=self.options.negative_prompt,
            guidance_rescale=self.options.guidance_rescale,
            reference=self._guide(),
        )
        return [
            picture
            for kind, drawing in draw(batch, self.blend, self.compare).items()
            for picture in pictures(pairs, batch, kind, drawing)
        ]


def identity(scheduler: ConfigMixin) -> str:
    """A diffusers scheduler's class, and a hash of its configuration. Options that are off are left
    out, so that a new option of the library changes nothing.
    """
    options = {
        k: v
        for k, v in scheduler.config.items()
        if not k.startswith("_") and v not in (None, False)
    }
    text = json.dumps(options, sort_keys=True, default=str)
    return f"{type(scheduler).__name__} {hashlib.sha256(text.encode()).hexdigest()[:8]}"
