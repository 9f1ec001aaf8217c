"""Blends in Python, called as the pipelines of diffusers are: prompts -> images, with the maps of
their words and their collapse. It draws as `predict` does.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dreamblend.blending.arguments import (
    blend_of,
    check_call,
    negative_of,
    noise_of,
    prompts_of,
    reference_of,
    strength_of,
)
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import Blend
from dreamblend.blending.draw import draw
from dreamblend.blending.embeds import Embeds, embeds_of
from dreamblend.blending.inversion import fitted
from dreamblend.blending.models import (
    Models,
    check_base,
    check_quantized,
    drawing_dtype,
    warn_of_other_vae,
)
from dreamblend.blending.options import Options
from dreamblend.blending.output import DreamBlendOutput, Images, output_of
from dreamblend.blending.pair import Pair
from dreamblend.errors import InputError
from dreamblend.models import schedulers
from dreamblend.models.adapters import configs
from dreamblend.models.loading import wrap
from dreamblend.models.pipelines import autoencoder, check_vae
from dreamblend.models.placement import Turns
from dreamblend.sampling import Random
from dreamblend.storage import pair_folder
from dreamblend.storage.runs import filled
from dreamblend.storage.snapshots import DTYPES

# (pipeline, call number, timestep, {"latents": ...}) -> those of them that are to be changed
OnStepEnd = Callable[["DreamBlendPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


class DreamBlendPipeline:
    """Draws with an early and a late snapshot of one run. Made by `from_pretrained` or
    `from_pipe`.

    Args:
        models: the pair in memory.
        pair: the same on disk.
        identifier: the subject's rare token.
        class_noun: the subject's class.
        dtype: in which it draws, whatever the device; as `predict` chooses where None.
        cast: whether it is cast at all.
    """

    def __init__(
        self,
        models: Models,
        pair: Pair,
        identifier: str,
        class_noun: str,
        dtype: torch.dtype | None = None,
        cast: bool = True,
    ):
        self.models, self.pair = models, pair
        self.identifier, self.class_noun = identifier, class_noun
        self._dtype, self._cast, self._placed = dtype, cast, not cast
        self._pipe: Any = None  # that it was made over, if any
        self._known = True  # whether it is sure that the base is that of the snapshots
        self._quantize: str | None = None
        self._prediction: str | None = None
        self._progress: dict[str, Any] = {}
        self._scheduler = models.late.scheduler  # the base's own, which names are for
        self._interrupt = False

    # -- made
    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | None = None,
        *,
        early: str | Path | int | None = None,
        late: str | Path | int | None = None,
        run: str | Path | None = None,
        identifier: str | None = None,
        class_noun: str | None = None,
        torch_dtype: torch.dtype | None = None,
        quantize: str | None = None,
        base_config: str | None = None,
        base_prediction: str | None = None,
        safety_checker: bool = True,
        revision: str | None = None,
        variant: str | None = None,
    ) -> Self:
        """Load a base and two snapshots of it.

        Args:
            base: a hub id, a pipeline folder, a single .safetensors file or `sandbox`; where None
                what the snapshots, or the files of another trainer's run, say. A folder of
                `save_pretrained` has the snapshots, too.
            early, late: the underfit and the overfit snapshot: a path (also of a LoRA file or
                another checkpoint made elsewhere), or a step of `run`.
            run: the folder of the run that steps refer to. Without early and late its pair counts,
                as `select` picked it.
            identifier, class_noun: of the subject; as the snapshots record them where None.
            torch_dtype: in which it draws; where None as `predict` does: fp32, but bf16 on a GPU
                for LoRA, T-LoRA and a learned word, which it leaves exact.
            quantize: int8 or nf4 quantises the frozen weights.
            base_config, base_prediction: of the base, as in training; as the snapshots record them
                where None.
            safety_checker: load the base's own safety checker, where it has one.
            revision, variant: of the base, as in training; likewise.

        Raises InputError where something is missing, damaged or does not belong together.
        """
        saved = pair_folder.read(Path(base).expanduser()) if base is not None else None
        if saved is not None:
            if early is not None or late is not None:
                raise InputError(f"{base} holds both snapshots: leave out early and late")
            base, early, late = (saved[name] for name in pair_folder.PATHS)
            identifier, class_noun = (
                identifier or saved["identifier"],
                class_noun or saved["class_noun"],
            )
            base_config = base_config or saved["base_config"]
            base_prediction = base_prediction or saved["base_prediction"]
            variant = variant or saved.get("variant")
        elif run is not None and early is None and late is None:
            early, late = _picked(Path(run))
        if early is None or late is None:
            raise InputError(
                "a blend takes two snapshots: name early and late, or the run whose picked pair is"
                " meant"
            )
        pair = Pair.find(Path(run) if run is not None else None, str(early), str(late))
        check_quantized(quantize, pair.early.method)
        base, base_config, base_prediction, identifier, class_noun, revision, variant = filled(
            Path(run) if run is not None else None,
            base=str(base) if base is not None else None,
            base_config=base_config,
            base_prediction=base_prediction,
            identifier=identifier,
            class_noun=class_noun,
            revision=revision,
            variant=variant,
        ).values()
        identifier, class_noun = pair.subject(identifier, class_noun)
        models = Models.load(
            pair,
            str(base) if base is not None else pair.recorded("base"),
            identifier,
            base_config,
            base_prediction,
            quantize,
            torch_dtype or torch.bfloat16,
            safety_checker,
            revision=revision,
            variant=variant,
        )
        made = cls(models, pair, identifier, class_noun, torch_dtype)
        made._quantize, made._prediction = quantize, base_prediction
        return made

    @classmethod
    def from_pipe(
        cls,
        pipe: Any,
        *,
        early: str | Path | int,
        late: str | Path | int,
        run: str | Path | None = None,
        identifier: str | None = None,
        class_noun: str | None = None,
    ) -> Self:
        """Add two snapshots to a pipeline of diffusers. Its modules are used where and in the dtype
        they are, and frozen; it draws as before when it is called itself.

        Args as `from_pretrained`. Raises InputError where the pipeline is of no family that is
        known, or not the base of the snapshots.
        """
        pair = Pair.find(Path(run) if run is not None else None, str(early), str(late))
        identifier, class_noun = pair.subject(identifier, class_noun)
        modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
        if any(configs(module) for module in modules):
            raise InputError(
                "the pipeline has LoRA adapters of its own, which would act in both snapshots: call"
                " its unload_lora_weights() first, or fuse_lora()"
            )
        if any(hasattr(module, "_hf_hook") for module in modules):
            raise InputError(
                "the pipeline is offloaded, and its snapshots would not be: make it without, and"
                " call enable_model_cpu_offload() of what from_pipe returns"
            )
        base = wrap(pipe, getattr(pipe, "name_or_path", None) or type(pipe).__name__)
        known = _check_base(base, pair)
        warn_of_other_vae(pair.about, base)
        made = cls(Models.over(base, pair, identifier), pair, identifier, class_noun, cast=False)
        made._pipe, made._known = pipe, known
        return made

    def save_pretrained(self, folder: str | Path) -> None:
        """Save a folder that `from_pretrained` opens: the base and both snapshots as they are on
        disk, and the names of the subject. The base of a pipeline in memory is saved as diffusers
        does. A dtype, a device, a quantisation, another scheduler and another autoencoder are not
        saved.

        Raises InputError where the folder exists, or the base could not be opened with the
        snapshots again.
        """
        if not self._known:
            raise InputError(
                "the pipeline's weights were cast, and opened again they would be another base than"
                " that of the snapshots: load it in fp32 to save it"
            )
        base = self.models.base
        record = {
            "identifier": self.identifier,
            "class_noun": self.class_noun,
            "base_config": base.base_config,
            "base_prediction": self._prediction,
            **({"variant": base.variant} if base.variant else {}),
        }

        def write(there: Path) -> Path:
            if base.source is not None:
                return pair_folder.copy_base(base.source, there, base.variant)
            _without_adapters(self._pipe).save_pretrained(there)
            return there

        folder = Path(folder).expanduser()
        pair_folder.save(folder, record, write, self.pair.early, self.pair.late)

    # -- where and how it computes
    @property
    def device(self) -> torch.device:
        return self.models.late.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser."""
        return self.models.late.denoiser.dtype

    @property
    def scheduler(self) -> Any:
        """Of diffusers; another one may be set, or the name of one, as `--model.scheduler` has
        them.
        """
        return self.models.late.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        if isinstance(scheduler, str):
            schedulers.check(scheduler)
            scheduler = schedulers.named(scheduler, self._scheduler, self.models.base.base)
        self._set("scheduler", scheduler)

    @property
    def vae(self) -> Any:
        """The autoencoder, of diffusers; another one may be set, or a folder, a .safetensors file
        or a hub id.
        """
        return self.models.late.vae

    @vae.setter
    def vae(self, vae: Any) -> None:
        if self.models.late.offloaded:
            raise InputError(
                "the pipeline is offloaded, and another vae would not be: set it before"
                " enable_model_cpu_offload()"
            )
        if isinstance(vae, (str, Path)):
            vae = autoencoder(str(vae), self.vae)
        check_vae(vae, self.vae, "vae").requires_grad_(False).eval()
        self._set("vae", vae)
        if self._cast:  # to where and in what the others are, at the next call
            self._placed = False

    def _set(self, name: str, value: Any) -> None:
        for model in (self.models.early, self.models.late, self.models.base):
            setattr(model, name, value)

    @property
    def interrupt(self) -> bool:
        """Whether `_interrupt` was set while it draws, as in diffusers."""
        return self._interrupt

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move to a device, cast to a dtype, or both. Without a dtype it is cast as
        `from_pretrained` says.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None:
            self._dtype, self._cast = dtype, True
        device = self.device if device is None else torch.device(device)
        self.models.to(device, self._drawn_in(device))
        self._placed = True
        return self

    def enable_model_cpu_offload(
        self, gpu_id: int = 0, device: torch.device | str | None = None
    ) -> None:
        """Let denoisers, text encoders and autoencoder wait on the CPU and take turns on a GPU:
        less memory, more time.
        """
        there = torch.device(device if device is not None else f"cuda:{gpu_id}")
        turns = Turns(there)
        for model in (self.models.early, self.models.late):
            turns.add(model, self._drawn_in(there))
        self._placed = True

    def _drawn_in(self, device: torch.device) -> torch.dtype | None:
        """The dtype to cast to; None where it stays as it is."""
        if not self._cast or self._dtype is not None:
            return self._dtype
        return DTYPES[drawing_dtype(self.pair.early.method, device, self._quantize)]

    # -- progress
    def set_progress_bar_config(self, **config: Any) -> None:
        """What the progress bars are told: arguments of tqdm, such as `disable=True`."""
        self._progress = config

    def progress_bar(self, total: int, desc: str) -> tqdm:
        return tqdm(total=total, **{"desc": desc, **self._progress})

    # -- drawing
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: Random | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | list[Tensor] | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_rescale: float = 0.0,
        blend: Blend | str = "region",
        compare: bool = False,
        grid: int | None = None,
        attention_layers: list[str] | None = None,
        negative_prompt_embeds: Tensor | list[Tensor] | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        clip_skip: int | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        reference: Image.Image | str | Path | None = None,
    ) -> DreamBlendOutput | tuple[Images, list[bool] | None]:
        """Draw prompts.

        The arguments have the names and the meaning of diffusers' pipelines. A generator with
        `manual_seed(s)` draws what `predict` draws with the seed s.

        Args:
            prompt: one or several; `{subject}` stands for identifier and class noun. It may be left
                out where `prompt_embeds` are given.
            negative_prompt: what guidance leads away from, one for all prompts or one for each; an
                empty prompt where None.
            height, width: of the images, in pixels; the base's own where None.
            num_inference_steps: denoising steps.
            guidance_scale: of classifier-free guidance, as the family's own pipeline counts it.
            num_images_per_prompt: images of each prompt, which follow each other.
            generator: one, or one for each image; torch's own where None. Its stream gives the
                noise, and copies of it that of a scheduler that adds noise at its steps.
            latents: the noise itself: (batch, channels, height, width) of unit variance, whatever
                form the family's own pipeline has them in. Their size counts.
            prompt_embeds, pooled_prompt_embeds: the prompts encoded, for both snapshots: (prompts,
                tokens, channels) and, where the family has them, (prompts, channels); a list of
                (tokens, channels) for Z-Image. Only the prompts beside them tell which tokens name
                the subject: without, there are no maps, and region and cag cannot be drawn.
            output_type: pil, np, pt, or latent.
            return_dict: False returns (images, nsfw_content_detected), as diffusers does.
            callback_on_step_end: called as `callback(pipeline, call, timestep, {"latents": ...})`
                after each call of the model while the blend draws; it returns a dictionary, whose
                latents are those to go on from. It ends the drawing with
                `pipeline._interrupt = True`.
            callback_on_step_end_tensor_inputs: latents is all that there is.
            blend: Region, CAG, Switch, Merge, Score, Personalization, Autoguidance, Reward, Masked,
                Similarity, Early or Late of `dreamblend.blending.blends`, or the name of one, with
                its default settings.
            compare: draw what each snapshot draws alone, too.
            guidance_rescale: 0 to 1, against overexposure (`Blender`).
            grid, attention_layers: of the attention that is read; the family's choice where None.
            negative_prompt_embeds, negative_pooled_prompt_embeds: instead of `negative_prompt`,
                encoded, beside `prompt_embeds` and of their shape.
            prompt_attention_mask, prompt_embeds_mask (and negative ones): which tokens of the
                embeddings are no padding, (prompts, tokens), by the name that the family's own
                pipeline has for it.
            clip_skip: last layers of the CLIP text encoders that prompts leave out.
            cross_attention_kwargs, joint_attention_kwargs, attention_kwargs: `{"scale": x}` is the
                strength of the snapshots' LoRA, `{"scale": (x, y)}` that of early and of late.
            reference: an image, or a file of one, whose layout CAG follows instead of what the
                early snapshot draws.
        """
        check_call(
            output_type,
            num_inference_steps,
            num_images_per_prompt,
            callback_on_step_end_tensor_inputs,
        )
        blend, each = blend_of(blend), num_images_per_prompt
        if not self._placed:
            self.to(self.device)
        encoded = Embeds(
            prompt_embeds, pooled_prompt_embeds, prompt_attention_mask, prompt_embeds_mask
        )
        negative = Embeds(
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
            negative_prompt_attention_mask,
            negative_prompt_embeds_mask,
        )
        options = Options(
            negative_prompt="" if negative or negative_prompt is not None else None,
            guidance_rescale=guidance_rescale,
            clip_skip=clip_skip,
            strength=strength_of(
                cross_attention_kwargs=cross_attention_kwargs,
                joint_attention_kwargs=joint_attention_kwargs,
                attention_kwargs=attention_kwargs,
            ),
        )
        options.check(self.models.late, guidance_scale)
        blend.check(self.models.late, guidance_scale)
        models = self.models
        if clip_skip is not None or options.strength is not None:  # of this call alone
            options.apply(models := models.views())
        late = models.late
        subject = f"{self.identifier} {self.class_noun}"
        prompts = prompts_of(prompt, each, subject, blend, prompt_embeds)
        negatives = negative_of(negative_prompt, len(prompts), each, negative_prompt_embeds)
        embeds, negative_embeds = embeds_of(
            late,
            prompts,
            each,
            encoded,
            negative,
            known=prompt is not None,
            guidance_scale=guidance_scale,
        )
        noise = noise_of(late, len(prompts), height, width, generator, latents)
        sides = [late.pixels_a_latent * side for side in noise.shape[2:]]
        guide = reference_of(reference, blend, num_inference_steps)
        self._interrupt = False
        try:
            batch = Batch.of(
                models,
                [(prompt, 0) for prompt in prompts],
                self.identifier,
                self.class_noun,
                num_inference_steps,
                guidance_scale,
                grid,
                layers=attention_layers,
                noise=noise,
                generator=generator,
                negative_prompt=negatives,
                guidance_rescale=guidance_rescale,
                embeds=embeds,
                reference=None if guide is None else fitted(guide, *sides),
                negative_embeds=negative_embeds,
            )
            watched = _Watched(self, batch.calls, blend.name, callback_on_step_end)
            with watched:
                drawings = draw(batch, blend, compare, watched, lambda: self._interrupt)
            outputs = {
                kind: output_of(batch, drawing, kind, output_type)
                for kind, drawing in drawings.items()
            }
        finally:
            self.models.base.bare().activate()  # whose modules may be those of another pipeline
        output = outputs.pop(blend.name)
        for kind, of_snapshot in outputs.items():
            setattr(output, kind, of_snapshot)
        return output if return_dict else (output.images, output.nsfw_content_detected)


class _Watched:
    """Follows a drawing call by call: progress bars, and the user's callback."""

    def __init__(
        self, pipeline: DreamBlendPipeline, calls: int, kind: str, callback: OnStepEnd | None
    ):
        self.pipeline, self.calls, self.kind, self.callback = pipeline, calls, kind, callback
        self.bars: dict[str, tqdm] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self.bars.values():
            bar.close()

    def __call__(self, kind: str, latents: Tensor, t: Tensor, call: int) -> Tensor:
        if kind not in self.bars:
            for bar in self.bars.values():  # a reference ends with the last step that it guides
                bar.total = bar.n
                bar.refresh()
            self.bars[kind] = self.pipeline.progress_bar(self.calls, kind)
        self.bars[kind].update()
        if self.callback is None or kind != self.kind:
            return latents
        changed = self.callback(self.pipeline, call, t, {"latents": latents}) or {}
        return changed.get("latents", latents)


def _picked(run: Path) -> tuple[int, int]:
    """The pair that `select` picked for a run, whatever the blend was."""
    from dreamblend.selection.command import last_picked

    if (pair := last_picked(run)) is None:
        raise InputError(
            f"{run} has no picked pair of the snapshots that it has now: run `select --run {run}`"
            " first, or name early and late"
        )
    return pair


def _without_adapters(pipe: Any) -> Any:
    """The pipeline with copies of those modules that adapters were added to, without these."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    plain = copy.copy(pipe)
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module) and configs(module):
            vars(plain)[name] = cleaned = recurse_remove_peft_layers(copy.deepcopy(module))
            del cleaned.peft_config
            cleaned._hf_peft_config_loaded = False
    return plain


def _check_base(base: Any, pair: Pair) -> bool:
    """As `check_base`, but weights in half precision may be a cast of those that the snapshots were
    tuned from, which nothing shows. Returns whether it is known.
    """
    try:
        check_base(base, pair.about)
        return True
    except InputError:
        if base.denoiser.dtype == torch.float32:
            raise
        warnings.warn(
            f"the pipeline is in {str(base.denoiser.dtype).removeprefix('torch.')}, so that nothing"
            " shows whether it is the base of these snapshots",
            stacklevel=3,
        )
        return False
