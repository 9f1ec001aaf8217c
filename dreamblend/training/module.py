"""The training LightningModule: photos -> latents -> noisy latents -> denoiser -> loss."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import cast

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.lr_scheduler import LambdaLR

from dreamblend.errors import InputError
from dreamblend.models import Backbone, Conditioning, load_backbone, locate_base
from dreamblend.models.bases import SHIPPED
from dreamblend.models.loading import check_version, load_checker
from dreamblend.models.pipelines import autoencoder
from dreamblend.models.placement import Turns, check_offload, check_quantize, place, quantise
from dreamblend.models.safety import SafetyChecker
from dreamblend.storage.snapshots import DTYPES, About
from dreamblend.storage.subjects import record
from dreamblend.trainer import callbacks, datamodule
from dreamblend.training import objective
from dreamblend.training.data import SubjectData, digest
from dreamblend.training.encoded import EncodedPrompts
from dreamblend.training.finite import ON_NAN, FiniteSteps
from dreamblend.training.framing import RANDOM
from dreamblend.training.identity import PARTS, check_same, identity
from dreamblend.training.losses import Loss
from dreamblend.training.optimizers import AdamW, Optimizer
from dreamblend.training.schedules import Schedule, refresh
from dreamblend.training.seeding import generator
from dreamblend.training.timesteps import Timesteps
from dreamblend.tuning import Full, Method
from dreamblend.tuning.sharding import shard

# prior -> photo -> bucket -> mean and deviation (flips, channels, height, width)
Latents = dict[bool, list[dict[int, tuple[Tensor, Tensor]]]]
FAR = 10  # a rate of more than this many times the usual one brings a warning
_STATES = {"state_dict", "current_model_state"}  # Lightning's WeightAveraging has the second


def _named(base: str) -> str:
    """The name of a base in snapshots. A local base has its absolute path, so that it is found from
    any folder.
    """
    path = Path(base).expanduser()
    return str(path.resolve()) if base not in SHIPPED and path.exists() else base


class Tuner(L.LightningModule):
    """Fine-tunes a base on a few photos of a subject.

    Args:
        base: `sandbox`, a hub id (owner/name), a diffusers pipeline folder, or a single
            .safetensors file.
        base_config: for a single file, the hub id or folder of its configuration, if diffusers
            cannot derive it.
        base_prediction: what the base predicts, epsilon or v_prediction. If None, what its
            configuration says.
        tuning: which weights train: Full, LoRA, TLoRA, CustomDiffusion or TextualInversion.
        learning_rate: if None, the usual one of the method for this base (`Method.rates`).
        text_encoder_learning_rate: of a text encoder that trains. If None, `learning_rate`.
        optimizer: AdamW, AdamW8bit, Adafactor, Prodigy, Lion or AdamWScheduleFree.
        lr_scheduler: constant, or linear, cosine, cosine_with_restarts or polynomial down to zero
            at the last step.
        lr_warmup_steps: the steps over which the rate rises, from 1/lr_warmup_steps of it at the
            first to all of it at the last.
        lr_num_cycles: how many times cosine_with_restarts goes down to zero.
        lr_power: of polynomial; 1, a line, if None.
        weight_decay: of the optimizer.
        timesteps: which timesteps are drawn, and how often.
        loss: l2, huber or smooth_l1.
        rescale_betas_zero_snr: make the last timestep noise alone (Lin et al., 2024), in training
            and in drawing, for a base that predicts v.
        prior_loss_weight: weight of the class images' loss beside the photos' (prior preservation).
        min_snr_gamma: Min-SNR loss weighting (5 is usual). None turns it off.
        noise_offset: share of per-channel constant noise (0.05 to 0.1 is usual).
        frozen_dtype: of the weights of the denoiser and the text encoder that do not train: fp32,
            fp16 or bf16. If None, the dtype of the autocast on a GPU in mixed precision, else fp32.
            The weights that train and the autoencoder are in fp32.
        quantize: int8 or nf4 quantises the frozen weights of the denoiser and of large text
            encoders, for methods whose trained weights are added to them. If None, they are kept in
            `frozen_dtype`.
        gradient_checkpointing: use much less memory, for a quarter more time.
        on_nan: what to do at a step whose loss or gradients are NaN or infinite: `stop` before it
            changes a weight, or `skip` it.
        revision: of a base on the hub: a branch, a tag or a commit.
        variant: of the base's weights, such as fp16, in a folder or on the hub: the files of that
            name are read, and the plain ones of parts without.
        vae: another autoencoder that encodes the photos: a folder, a .safetensors file or a hub id.
        offload: none, or model, where the modules take turns on the device while prompts are
            encoded and images are drawn: less memory there, more time.
        safety_checker: let the base's own safety checker, where it has one, look at what is drawn:
            class images are drawn again where it flags them, previews leave them out.
    """

    backbone: Backbone  # the base with what trains in it, from `configure_model` on
    encoded: EncodedPrompts | None = None  # None where prompts are encoded at every step

    def __init__(
        self,
        base: str = "sandbox",
        base_config: str | None = None,
        base_prediction: str | None = None,
        tuning: Method = Full(),
        learning_rate: float | None = None,
        text_encoder_learning_rate: float | None = None,
        lr_scheduler: str = "constant",
        lr_warmup_steps: int = 0,
        weight_decay: float = 1e-2,
        prior_loss_weight: float = 1.0,
        min_snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        frozen_dtype: str | None = None,
        quantize: str | None = None,
        gradient_checkpointing: bool = False,
        on_nan: str = "stop",
        optimizer: Optimizer = AdamW(),
        lr_num_cycles: int | None = None,
        lr_power: float | None = None,
        timesteps: Timesteps = Timesteps(),
        loss: Loss = Loss(),
        rescale_betas_zero_snr: bool = False,
        revision: str | None = None,
        variant: str | None = None,
        vae: str | None = None,
        offload: str = "none",
        safety_checker: bool = True,
    ):
        super().__init__()
        for name, choice, choices in (
            ("on_nan", on_nan, ON_NAN),
            ("frozen_dtype", frozen_dtype, (None, *DTYPES)),
        ):
            if choice not in choices:
                raise InputError(
                    f"model.{name} is {choice!r}: it is one of {', '.join(filter(None, choices))}"
                )
        for name, value in (("learning_rate", learning_rate), ("min_snr_gamma", min_snr_gamma)):
            if value is not None and value <= 0:
                raise InputError(f"model.{name} is {value}: it must be above zero")
        rest: dict[str, float | None] = {
            "text_encoder_learning_rate": text_encoder_learning_rate,
            "lr_warmup_steps": lr_warmup_steps,
            "weight_decay": weight_decay,
            "prior_loss_weight": prior_loss_weight,
            "noise_offset": noise_offset,
        }
        for name, value in rest.items():
            if value is not None and value < 0:
                raise InputError(f"model.{name} is {value}: it must be zero or above")
        check_quantize(quantize)
        check_offload(offload)
        if quantize and not tuning.apart:
            raise InputError(
                f"model.quantize {quantize} keeps the frozen weights in few bits, and {tuning.name}"
                " trains them: train LoRA, or leave it out"
            )
        locate_base(base)
        check_version(base, revision, variant)
        self.revision, self.variant = revision, variant
        self.vae = vae and _named(vae)
        self.base, self.base_config = _named(base), base_config and _named(base_config)
        self.base_prediction, self.tuning = base_prediction, tuning
        self.timesteps, self.loss, self.zero_snr = timesteps, loss, rescale_betas_zero_snr
        self.optimizer = optimizer
        self.schedule = Schedule(lr_scheduler, lr_warmup_steps, lr_num_cycles, lr_power)
        if optimizer.averages and self.schedule.ends:
            raise InputError(
                f"model.optimizer {optimizer.name} has no schedule: set model.lr_scheduler to"
                " constant"
            )
        usual = optimizer.usual_rate(tuning.usual_rate(base))
        self.learning_rate = usual if learning_rate is None else learning_rate
        self._judge_rates(base, usual, learning_rate is None, text_encoder_learning_rate)
        if optimizer.one_rate and text_encoder_learning_rate not in (None, 0, self.learning_rate):
            raise InputError(
                f"model.optimizer {optimizer.name} has one rate for all that trains: leave"
                " model.text_encoder_learning_rate out"
            )
        self.text_encoder_learning_rate = text_encoder_learning_rate
        self.weight_decay = weight_decay
        self.prior_loss_weight = prior_loss_weight
        self.min_snr_gamma = min_snr_gamma
        self.noise_offset = noise_offset
        self.frozen_dtype = frozen_dtype
        self.quantize, self.offload = quantize, offload
        self.safety_checker = safety_checker
        self.gradient_checkpointing = gradient_checkpointing
        self.averages: list[str] = []  # descriptions of the callbacks that average the weights
        self._images: dict[str, str | None] | None = None  # hashes of the photos and class images
        self._planned: int | None = None  # the last step of a run that is resumed, by its schedule
        # of a run whose schedule was lengthened: up to which step it was how long
        self._parts: list[list[int]] = []
        self._finite = FiniteSteps(on_nan)

    def _judge_rates(self, base: str, usual: float, chosen: bool, others: float | None) -> None:
        """Print the chosen rate, and warn about one that is far above the usual: a rate for
        the sandbox ruins Stable Diffusion in a few steps.
        """
        whose = self.tuning.name
        if type(self.optimizer) is not AdamW:
            whose += f" with {self.optimizer.name}"
        if chosen:
            rank_zero_info(
                f"learning rate {self.learning_rate:g}, the usual one of {whose} for this base:"
                " model.learning_rate sets another"
            )
        for name, value in (
            ("learning_rate", self.learning_rate),
            ("text_encoder_learning_rate", others),
        ):
            if base not in SHIPPED and value is not None and value > FAR * usual:
                rank_zero_warn(
                    f"model.{name} is {value:g}, {value / usual:.0f} times the usual {usual:g} of"
                    f" {whose}: it may ruin the base in a few steps"
                )

    # -- before training
    def configure_model(self) -> None:
        """Load the base. `setup` would be too late, as Lightning's weight averaging copies the
        module before it.
        """
        if hasattr(self, "backbone"):
            return
        self.seed, self.frozen = torch.initial_seed(), self._frozen()
        with torch.device("cpu"):  # Lightning calls this with its device as the default
            self.backbone = load_backbone(
                self.base,
                self.base_config,
                self.base_prediction,
                zero_snr=self.zero_snr,
                revision=self.revision,
                variant=self.variant,
            )
            if why := self.backbone.untrainable:
                raise InputError(f"{self.base} is {why}")
            self.base_hash = self.backbone.fingerprint()
            if self.vae:
                vae = autoencoder(self.vae, self.backbone.vae)
                self.backbone.vae, self.vae_weights = vae, self.backbone.fingerprint([vae])
            if self.quantize:
                quantise(self.backbone, self.quantize, DTYPES[self.frozen])
            self.tuning.attach(self.backbone, self.data.identifier, self.data.class_noun)
            if self.backbone.concept is not None and len(record(self.data.folders)) > 1:
                raise InputError(
                    f"{self.tuning.name} learns one word, and {self.data.instance_dir} has several"
                    " subjects: train each of its own, or train full weights or LoRA"
                )
            for module in self.backbone.parts().values():
                for parameter in module.parameters():
                    if parameter.requires_grad:  # adapters take the dtype of the base's files
                        parameter.data = parameter.data.float()
                    elif parameter.is_floating_point() and parameter.dtype != DTYPES[self.frozen]:
                        parameter.data = parameter.data.to(DTYPES[self.frozen])
        self.trained = nn.ModuleList(self.tuning.trained(self.backbone).values())
        if self.gradient_checkpointing:
            self.backbone.enable_gradient_checkpointing()
        if self.device_mesh is not None:  # Lightning's ModelParallelStrategy makes one
            self._check_sharding(self.device_mesh)
            shard(self.trained, self.device_mesh["data_parallel"])
        self.noise = self.backbone.training_noise()
        self.timesteps.check(self.noise)

    def _frozen(self) -> str:
        """The dtype of the frozen weights. Raises InputError if it differs from fp32 without mixed
        precision, as only autocast combines two dtypes.
        """
        precision = self.trainer.precision_plugin
        if not isinstance(precision, MixedPrecision):
            if self.frozen_dtype not in (None, "fp32"):
                raise InputError(
                    f"model.frozen_dtype {self.frozen_dtype} needs mixed precision, as the weights"
                    " in training are fp32: set trainer.precision to bf16-mixed or 16-mixed (it is"
                    f" {self.trainer.precision}), or model.frozen_dtype to fp32"
                )
            return "fp32"
        autocast = (
            {"bf16-mixed": "bf16", "16-mixed": "fp16"}[precision.precision]
            if self.trainer.strategy.root_device.type != "cpu"
            else "fp32"
        )
        return self.frozen_dtype or autocast

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Inside the `with` block, drawing computes in the precision of training, and all modules
        are on the device, or take turns there; those that a training step does not take leave it
        afterwards.
        """
        precision = self.trainer.precision_plugin
        turns = Turns(self.device) if self.offload == "model" else None
        place(self.backbone, self.device, turns=turns)
        try:
            with (
                torch.no_grad(),
                (
                    precision.autocast_context_manager()
                    if isinstance(precision, MixedPrecision)
                    else nullcontext()
                ),
            ):
                yield
        finally:
            if turns is not None:
                turns.end()
            waiting = self._waiting()
            for module in self.backbone.modules():
                module.to("cpu" if module in waiting else self.device)

    def _waiting(self) -> list[nn.Module]:
        """What a training step does not take: the autoencoder, and the text encoders where prompts
        are encoded only once.
        """
        backbone = self.backbone
        encoders = {**backbone.text_encoders, **backbone.untrained_encoders}
        return [
            *([] if self._encodes_crops else [backbone.vae]),
            *([] if self._encodes_always else encoders.values()),
        ]

    @property
    def _encodes_crops(self) -> bool:
        """Whether photos are cut and encoded at every step."""
        return self.data.crop == RANDOM

    @property
    def _encodes_always(self) -> bool:
        """Whether prompts are encoded at every step: where their encoding or their text changes."""
        return self.tuning.text_encoder or self.data.shuffle_tags

    def _check_sharding(self, mesh: DeviceMesh) -> None:
        """Raise InputError for settings that do not work with sharded weights."""
        strategy = "trainer.strategy"
        if not self.optimizer.sharded:
            raise InputError(
                f"{strategy} shares out the weights in training, which model.optimizer"
                f" {self.optimizer.name} does not take: leave it out, for AdamW"
            )
        if self.offload != "none":
            raise InputError(
                f"{strategy} shares out the weights in training, which then cannot take turns:"
                " leave model.offload out"
            )
        if not isinstance(self.tuning, Full):
            raise InputError(
                f"{strategy} shares out the weights in training, and with {self.tuning.name} these"
                " are few: set it to ddp"
            )
        if mesh["tensor_parallel"].size() > 1:
            raise InputError(
                f"{strategy}.tensor_parallel_size must be 1, and data_parallel_size the number of"
                " processes"
            )
        assert isinstance(self.trainer.strategy, ModelParallelStrategy)  # it made the mesh
        if self.trainer.strategy._save_distributed_checkpoint:
            raise InputError(
                f"set {strategy}.save_distributed_checkpoint to false: the resume state is one file"
            )
        if averagers := [
            type(c).__name__ for c in callbacks(self.trainer) if isinstance(c, WeightAveraging)
        ]:
            raise InputError(
                f"{averagers[0]} keeps a whole copy of the weights, and {strategy} shares them out:"
                " leave it out of trainer.callbacks"
            )

    @property
    def data(self) -> SubjectData:
        return datamodule(self.trainer, SubjectData)

    def on_fit_start(self) -> None:
        size = self.data.resolution or self.backbone.size
        if size % self.backbone.multiple:
            raise InputError(
                f"data.resolution is {size}: for {self.base} it must be a multiple of"
                f" {self.backbone.multiple}"
            )
        with self.drawing():
            if self.data.num_class_images:
                self._draw_missing_priors()
            self._warn_of_lost_words()
            if not self._encodes_always:
                dropped = [""] * bool(self.data.caption_dropout)
                told = [*self.data.prompts, self.data.class_prompt, *self.data.classes]
                self.encoded = self._encode([*told, *dropped])
        self._images = self._hashes()
        self.backbone.vae.to(self.device)
        self.data.arrange(size, self.backbone.multiple, self.backbone.pixels_a_latent)
        self.latents = self._encode_all()
        for module in self._waiting():
            module.to("cpu")
        for module in self.trained:
            module.train()

    def _encode_all(self) -> Latents:
        """The latents of the photos and the class images: of photos at the size of their bucket,
        of class images at that of each.
        """
        data = self.data
        latents: Latents = {
            False: [{} for _ in data.photos],
            True: [{} for _ in data.class_images],
        }
        for bucket, size in enumerate(data.sizes):
            photos = [] if self._encodes_crops else data.photos_in(bucket)
            for prior, within, pixels in (
                (False, photos, data.instance_pixels(size, bucket) if photos else []),
                (True, range(len(latents[True])), data.prior_pixels(size)),
            ):
                if within:
                    means, deviations = self._encode_images(pixels, data.flip)
                    for row, index in enumerate(within):
                        latents[prior][index][bucket] = means[:, row], deviations[:, row]
        return latents

    @torch.no_grad()
    def _encode_images(self, batches: Iterable[Tensor], flip: bool) -> tuple[Tensor, Tensor]:
        """Means and deviations of the latents (flips, n, ...), encoded once. Images are flipped
        before encoding, as flipping their latents is not the same.
        """
        encoded = [
            [
                self.backbone.encode(version)
                for version in ([pixels, pixels.flip(-1)] if flip else [pixels])
            ]
            for pixels in batches
        ]
        means, deviations = (
            torch.cat(
                [torch.stack([version[i] for version in versions]) for versions in encoded], 1
            ).float()
            for i in (0, 1)
        )
        return means, deviations

    def _draw_missing_priors(self) -> None:
        """Draw the missing class images with the base. Every process draws its share."""
        from dreamblend.training.class_images import ROUNDS, check_priors, draw_priors

        strategy, rank, processes = self.trainer.strategy, self.global_rank, self.trainer.world_size
        for prompt, folder in self.data.classes.items():
            check_priors(folder, prompt, self.base, self.base_hash)
            missing = self._missing_priors(folder)
            if missing and self.trainer.ckpt_path:
                raise InputError(
                    f"{folder} lacks {len(missing)} of the class images this run"
                    " began with: put them back, or begin a new run"
                )
            checker = self.load_checker() if missing else None
            for attempt in range(ROUNDS):
                # all call the denoiser equally often, as they must if it is sharded
                even = missing + missing[-1:] * (-len(missing) % processes)
                draw_priors(
                    *(self.backbone, prompt, even[rank::processes], self.base_hash),
                    checker=checker,
                    attempt=attempt,
                )
                strategy.barrier("class images drawn")
                if not missing or not (missing := self._missing_priors(folder)):
                    break
            else:
                raise InputError(
                    f"the base's safety checker took {ROUNDS} class images for {prompt!r} in a row"
                    f" for unsafe, and {folder} lacks {len(missing)}: choose another class_prompt,"
                    " or set model.safety_checker to false where it is mistaken"
                )

    def _missing_priors(self, folder: Path) -> list[Path]:
        """The class images that the first process misses."""
        from dreamblend.training.class_images import missing_priors

        return self.trainer.strategy.broadcast(missing_priors(folder, self.data.num_class_images))

    def load_checker(self) -> SafetyChecker | None:
        """The base's safety checker, on the CPU; None where it has none, or is not to look."""
        return load_checker(self.base, self.revision, self.variant) if self.safety_checker else None

    def on_train_start(self) -> None:
        """Say and set the rate of a schedule that got more steps: it may have been at its end."""
        if not self.schedule.ends or self._planned in (None, self.trainer.max_steps):
            return
        schedule = self.trainer.lr_scheduler_configs[0].scheduler
        rates = refresh(cast(LambdaLR, schedule))  # as `Schedule` makes it
        rank_zero_info(
            f"the {self.schedule.name} schedule, which ended at step {self._planned}, now ends at"
            f" step {self.trainer.max_steps}: the rate goes on from {rates[0]:g}"
        )

    # -- training
    def training_step(self, batch: dict, _: int) -> Tensor:
        """One batch of draws. The loss is the photos' mean plus prior_loss_weight times the class
        images'.
        """
        noise_source = generator(self.seed, "noise", 0, batch["draw"])
        z = self._latents(batch, noise_source)
        noise = self._moved(objective.draw_noise(z.shape, noise_source, self.noise_offset))
        index = self.timesteps.draw(self.noise, len(z), noise_source)
        alpha, sigma = (x[index].to(self.device) for x in (self.noise.alpha, self.noise.sigma))

        kind = self.device.type
        # mps has one state for all its devices
        devices = [] if kind in ("cpu", "mps") else [self.device]
        with torch.random.fork_rng(devices, device_type=kind):
            # dropout depends only on the draw too, so that a run can be continued
            if kind == "cpu":  # what `torch.manual_seed` leaves for a GPU that never comes adds up
                torch.default_generator.manual_seed(noise_source.initial_seed())
            else:
                torch.manual_seed(noise_source.initial_seed())
            predicted = self.backbone.denoise(
                objective.add_noise(z, noise, alpha, sigma),
                self.noise.timestep(index).to(self.device),
                self._conditioning(batch),
            )
        loss = self.loss(
            predicted,
            objective.target(self.noise.prediction, z, noise, alpha, sigma),
            alpha,
            sigma,
            index.to(self.device) / len(self.noise),
            weights if (weights := batch.get("weights")) is None else weights.to(self.device),
        )
        if len(self.noise.weight):
            loss = loss * self.noise.weight[index].to(self.device)
        if self.min_snr_gamma is not None:
            loss = loss * objective.min_snr_weight(
                self.noise.prediction, alpha, sigma, self.min_snr_gamma
            )
        of_priors = int(batch["prior"].sum())  # the last rows of a batch
        photos, priors = loss.split([len(loss) - of_priors, of_priors])
        instance_loss = photos.mean()
        self.log("loss", instance_loss, prog_bar=True)
        total = instance_loss
        if len(priors):
            prior_loss = priors.mean()
            self.log("prior_loss", prior_loss)
            total = instance_loss + self.prior_loss_weight * prior_loss
        self._finite.saw(batch, total)
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._finite.check(self.trainer, self.in_training, self._photos)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, by the norm of the gradients that is known already. Lightning
        itself refuses a fused optimizer in mixed precision, which only loss scaling calls for.
        """
        norm, most = self._finite.norm, gradient_clip_val
        if norm is None or not most:
            super().configure_gradient_clipping(optimizer, most, gradient_clip_algorithm)
        elif gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(self.in_training, most)
        else:
            nn.utils.clip_grads_with_norm_(self.in_training, float(most), norm)

    @cached_property
    def in_training(self) -> list[nn.Parameter]:
        """The weights that train, in the optimizer's order. Found once: every step asks for them,
        and to look through all modules takes as long as a small step's optimizer.
        """
        return [p for p in self.trained.parameters() if p.requires_grad]

    def _photos(self, batch: dict) -> list[str]:
        """The file names of a batch's photos and class images."""
        folders = {
            prior: self.data.class_images if prior else self.data.photos
            for prior in batch["prior"].unique().tolist()
        }
        return [
            folders[prior][index].name
            for index, prior in zip(batch["index"].tolist(), batch["prior"].tolist())
        ]

    def _latents(self, batch: dict, source: torch.Generator) -> Tensor:
        means, deviations, noise = [], [], []
        for row, (index, flipped, prior) in enumerate(
            zip(batch["index"].tolist(), batch["flipped"].tolist(), batch["prior"].tolist())
        ):
            if self._cuts(batch) and not prior:
                frame = batch["frames"][row].tolist()
                mean, deviation = self._encode_crop(self.data.drawn_crop(index, flipped, frame))
            else:
                mean, deviation = (
                    part[int(flipped)] for part in self.latents[prior][index][batch["bucket"]]
                )
            means.append(mean)
            deviations.append(deviation)
            noise.append(torch.randn(mean.shape, generator=source))
        return torch.stack(means) + torch.stack(deviations) * self._moved(torch.stack(noise))

    def _moved(self, drawn: Tensor) -> Tensor:
        """A tensor of the CPU on the device. From memory that is not pinned, a GPU would finish all
        that it has to do before it copies one of some size.
        """
        if self.device.type != "cuda":
            return drawn.to(self.device)
        return drawn.pin_memory().to(self.device, non_blocking=True)

    def _cuts(self, batch: dict) -> bool:
        """Whether a batch's photos are cut and encoded now."""
        return "frames" in batch and self._encodes_crops

    @torch.no_grad()
    def _encode_crop(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents of one image, in the precision of those that are
        encoded once.
        """
        with torch.autocast(self.device.type, enabled=False):
            mean, deviation = self.backbone.encode(pixels)
        return mean[0].float(), deviation[0].float()

    def _conditioning(self, batch: dict) -> Conditioning:
        """What the rows of a batch are told: their prompts, and what they see of their photos."""
        prompts = batch["prompts"]
        # the class prompt too, so that some gradient, if only zero, reaches a text encoder
        told = (self.encoded or self._encode([*prompts, self.data.class_prompt]))[prompts]
        return self.backbone.framed(told, batch["frames"]) if "frames" in batch else told

    def _encode(self, prompts: list[str]) -> EncodedPrompts:
        return EncodedPrompts(self.backbone, prompts)

    def _warn_of_lost_words(self) -> None:
        for prompt in dict.fromkeys(self.data.prompts):
            if lost := self.backbone.dropped_words(prompt):
                rank_zero_warn(
                    f"the caption {prompt[:60]!r} is over the token limit: these words fall off its"
                    f" end: {' '.join(lost)}"
                )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        # the first module is the denoiser, or the only one; text encoders follow
        other = (
            self.learning_rate
            if self.text_encoder_learning_rate is None
            else self.text_encoder_learning_rate
        )
        groups = [
            {
                "params": [p for p in module.parameters() if p.requires_grad],
                "lr": other if i else self.learning_rate,
            }
            for i, module in enumerate(self.trained)
        ]
        # with the loss scaling of fp16, Lightning cannot clip the gradients of a fused one
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        optimizer = self.optimizer.make(
            groups,
            self.learning_rate,
            self.weight_decay,
            fused=self.device.type in ("cpu", "cuda") and not scaled,
        )
        # not trainer.estimated_stepping_batches, which would start the stream of draws before a
        # resumed run knows its step
        schedule = self.schedule.make(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- the resume state: the trained weights alone, also if weight averaging keeps two sets
    def on_save_checkpoint(self, checkpoint: dict) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        for key in _STATES & checkpoint.keys():
            checkpoint[key] = {k: v for k, v in checkpoint[key].items() if k in trained}
        checkpoint["dreamblend"] = json.dumps(
            identity(self.about(self.trainer.global_step, torch.float32))
        )

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Raise InputError if the resume state is from another run, or from the end of this one."""
        where = f"the resume state {self.trainer.ckpt_path}"
        step = checkpoint["global_step"]
        last = self.trainer.max_steps
        theirs = json.loads(checkpoint.get("dreamblend", "{}"))
        self.check_same_run(theirs, where)
        if step >= last > 0:
            raise InputError(
                f"{where} is of step {step}, and trainer.max_steps is {last}: raise it to go on,"
                " or choose another --out"
            )
        self._planned = theirs.get("max_steps", last)
        self._parts = theirs.get(PARTS, [])
        if self.schedule.ends and self._planned != last:
            self._parts = [*self._parts, [step, self._planned]]
        for key in _STATES & checkpoint.keys():
            checkpoint[key] = {**self.state_dict(), **checkpoint[key]}

    def check_same_run(self, theirs: dict, where: str) -> None:
        """Raise InputError if files at `where` are from another run: if its `identity` differs from
        ours.
        """
        ours = identity(self.about(0, torch.float32))
        check_same(theirs, ours, where, going_on=bool(self.trainer.ckpt_path))

    # -- snapshots
    def settings(self) -> dict:
        """The training settings in snapshot.json: all that the weights at a step depend on. on_nan
        is not among them, as it changes no step that is kept.
        """
        data, trainer = self.data, self.trainer
        return {
            "base_config": self.base_config,
            "base_prediction": self.base_prediction,
            **({"revision": self.revision} if self.revision else {}),
            **({"variant": self.variant} if self.variant else {}),
            **({"vae": self.vae, "vae_weights": self.vae_weights} if self.vae else {}),
            "tuning": self.tuning.settings,
            "learning_rate": self.learning_rate,
            "text_encoder_learning_rate": self.text_encoder_learning_rate,
            "lr_scheduler": self.schedule.name,
            "lr_warmup_steps": self.schedule.warmup,
            **self.schedule.record,
            **self.optimizer.record,
            **self.timesteps.record,
            **self.loss.record,
            **({"rescale_betas_zero_snr": True} if self.zero_snr else {}),
            "weight_decay": self.weight_decay,
            "min_snr_gamma": self.min_snr_gamma,
            "noise_offset": self.noise_offset,
            "batch_size": data.batch_size,
            "flip": data.flip,
            "crop": data.crop,
            "resolution": data.resolution,
            "prompt": data.instance_prompt,
            "instance_dir": str(Path(data.instance_dir).resolve()),
            "num_class_images": data.num_class_images,
            "prior_loss_weight": self.prior_loss_weight,
            "class_prompt": ", ".join(data.classes) or None,
            **data.settings,
            **(self._images or self._hashes()),
            "processes": trainer.world_size,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "limit_train_batches": trainer.limit_train_batches,
            "precision": str(trainer.precision),
            "frozen_dtype": self.frozen,
            "quantize": self.quantize,
            "gradient_clip_val": trainer.gradient_clip_val or None,  # 0 clips nothing either
            "gradient_clip_algorithm": str(trainer.gradient_clip_algorithm),
            "averages": self.averages,
            # where the schedule ends
            **({"max_steps": trainer.max_steps} if self.schedule.ends else {}),
            **({PARTS: self._parts} if self._parts else {}),
        }

    def _hashes(self) -> dict[str, str | None]:
        """Hashes of the photos and class images. None for class images that are not drawn yet."""
        try:
            priors = digest(self.data.class_images) if self.data.num_class_images else None
        except InputError:
            priors = None
        return {"photos": digest(self.data.photos), "class_images": priors}

    def about(self, step: int, dtype: torch.dtype) -> About:
        """The record in the snapshot of this step."""
        return About(
            step=step,
            method=self.tuning.name,
            base=self.base,
            base_hash=self.base_hash,
            identifier=self.data.identifier,
            class_noun=self.data.class_noun,
            dtype=str(dtype).removeprefix("torch."),
            seed=self.seed,
            settings=self.settings(),
            versions={
                name: importlib.metadata.version(name)
                for name in (
                    "torch",
                    "lightning",
                    "diffusers",
                    "transformers",
                    "peft",
                    "safetensors",
                )
            },
        )


def tuner(module: L.LightningModule) -> Tuner:
    """The module that Lightning hands to a callback of training: it is the Tuner."""
    return cast(Tuner, module)
