"""The training LightningModule: photos -> latents -> noisy latents -> denoiser -> loss."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from dreamblend.errors import InputError
from dreamblend.models import Backbone, Conditioning, load_backbone, locate_base
from dreamblend.models.bases import SHIPPED
from dreamblend.storage.photos import list_photos
from dreamblend.storage.snapshots import DTYPES, About
from dreamblend.training import objective
from dreamblend.training.data import SubjectData, digest
from dreamblend.training.finite import ON_NAN, FiniteSteps
from dreamblend.training.identity import check_same, identity
from dreamblend.training.seeding import generator
from dreamblend.tuning import Full, Method
from dreamblend.tuning.sharding import shard

SCHEDULES = ("constant", "linear", "cosine", "polynomial")
FAR = 10  # times the usual rate
_STATES = {"state_dict", "current_model_state"}  # the second is of Lightning's WeightAveraging


def _named(base: str) -> str:
    """A base as snapshots say it: what lies on this machine by its whole path, so that it is found
    from any folder.
    """
    path = Path(base).expanduser()
    return str(path.resolve()) if base not in SHIPPED and path.exists() else base


class Tuner(L.LightningModule):
    """Fine-tunes a base on a few photos of a subject.

    Args:
        base: `sandbox`, a hub id (owner/name), a diffusers pipeline folder, or a single
            .safetensors file.
        base_config: for a single file, the hub id or folder of its configuration where diffusers
            cannot tell it.
        base_prediction: what the base predicts, epsilon or v_prediction; what it says of itself
            where None.
        tuning: which weights train: Full, LoRA, TLoRA, CustomDiffusion or TextualInversion.
        learning_rate: where None the usual one of the method for this base (`Method.rates`).
        text_encoder_learning_rate: of the text encoder where it trains; `learning_rate` where None.
        lr_scheduler: of the learning rate: constant, linear, cosine or polynomial, down to zero at
            the last step.
        lr_warmup_steps: over which the rate rises: it is a part 1/lr_warmup_steps of itself at the
            first, and whole at the last of them.
        weight_decay: of AdamW.
        prior_loss_weight: weight of the class images' loss beside the photos' (prior preservation).
        min_snr_gamma: Min-SNR loss weighting (5 is usual); off where None.
        noise_offset: share of per-channel constant noise (0.05 to 0.1 is usual).
        frozen_dtype: of the denoiser's and the text encoder's weights that do not train: fp32, fp16
            or bf16; that of the autocast where None and a GPU trains in mixed precision, else fp32.
            The weights that train are in fp32, and so is the autoencoder.
        gradient_checkpointing: trade a quarter more time for much less memory.
        on_nan: what happens at a step whose loss or gradients are NaN or infinite: `stop` before it
            changes a weight, or `skip` it.
    """

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
        gradient_checkpointing: bool = False,
        on_nan: str = "stop",
    ):
        super().__init__()
        for name, value, known in (
            ("lr_scheduler", lr_scheduler, SCHEDULES),
            ("on_nan", on_nan, ON_NAN),
            ("frozen_dtype", frozen_dtype, (None, *DTYPES)),
        ):
            if value not in known:
                raise InputError(
                    f"model.{name} is {value!r}: it is one of {', '.join(filter(None, known))}"
                )
        for name, value in (("learning_rate", learning_rate), ("min_snr_gamma", min_snr_gamma)):
            if value is not None and value <= 0:
                raise InputError(f"model.{name} is {value}: it must be above zero")
        rest = {
            "text_encoder_learning_rate": text_encoder_learning_rate,
            "lr_warmup_steps": lr_warmup_steps,
            "weight_decay": weight_decay,
            "prior_loss_weight": prior_loss_weight,
            "noise_offset": noise_offset,
        }
        for name, value in rest.items():
            if value is not None and value < 0:
                raise InputError(f"model.{name} is {value}: it must be zero or above")
        locate_base(base)
        self.base, self.base_config = _named(base), base_config and _named(base_config)
        self.base_prediction, self.tuning = base_prediction, tuning
        self.learning_rate = tuning.usual_rate(base) if learning_rate is None else learning_rate
        self._judge_rates(base, chosen=learning_rate is None, others=text_encoder_learning_rate)
        self.text_encoder_learning_rate = text_encoder_learning_rate
        self.lr_scheduler = lr_scheduler
        self.lr_warmup_steps = lr_warmup_steps
        self.weight_decay = weight_decay
        self.prior_loss_weight = prior_loss_weight
        self.min_snr_gamma = min_snr_gamma
        self.noise_offset = noise_offset
        self.frozen_dtype = frozen_dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.averages: list[
            str
        ] = []  # what averages the weights that snapshots hold, as callbacks tell it
        self._images: dict[str, str | None] | None = None  # hashes of what trains
        self._finite = FiniteSteps(on_nan)
        self.backbone: Backbone | None = None

    def _judge_rates(self, base: str, chosen: bool, others: float | None) -> None:
        """Say which rate was chosen, and warn of what is far from usual: a rate of the sandbox
        ruins Stable Diffusion in a few steps.
        """
        usual = self.tuning.usual_rate(base)
        if chosen:
            rank_zero_info(
                f"learning rate {self.learning_rate:g}, the usual one of {self.tuning.name} for"
                " this base: model.learning_rate sets another"
            )
        for name, value in (
            ("learning_rate", self.learning_rate),
            ("text_encoder_learning_rate", others),
        ):
            if base not in SHIPPED and value is not None and value > FAR * usual:
                rank_zero_warn(
                    f"model.{name} is {value:g}, {value / usual:.0f} times the usual {usual:g} of"
                    f" {self.tuning.name}: it may ruin the base in a few steps"
                )

    # -- before training
    def configure_model(self) -> None:
        """Load the base. Not in `setup`, which callbacks that copy the module (Lightning's weight
        averaging) precede.
        """
        if self.backbone is not None:
            return
        self.seed, self.frozen = torch.initial_seed(), self._frozen()
        with torch.device("cpu"):  # Lightning calls this with its own device as the default
            self.backbone = load_backbone(self.base, self.base_config, self.base_prediction)
            if why := self.backbone.untrainable:
                raise InputError(f"{self.base} is {why}")
            self.base_hash = self.backbone.fingerprint()
            self.tuning.attach(self.backbone, self.data.identifier, self.data.class_noun)
            for module in self.backbone.parts().values():
                for parameter in module.parameters():
                    if parameter.is_floating_point() and not parameter.requires_grad:
                        parameter.data = parameter.data.to(DTYPES[self.frozen])
        self.trained = nn.ModuleList(self.tuning.trained(self.backbone).values())
        if self.gradient_checkpointing:
            self.backbone.enable_gradient_checkpointing()
        if self.device_mesh is not None:  # of Lightning's ModelParallelStrategy
            self._check_sharding()
            shard(self.trained, self.device_mesh["data_parallel"])
        self.noise = self.backbone.training_noise()

    def _frozen(self) -> str:
        """The dtype of the frozen weights. Raises InputError where they would not go with the
        others, which only autocast brings together.
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
        own = (
            {"bf16-mixed": "bf16", "16-mixed": "fp16"}[precision.precision]
            if self.trainer.strategy.root_device.type != "cpu"
            else "fp32"
        )
        return self.frozen_dtype or own

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """What draws within computes as a training step does, and has the autoencoder on the
        device, which training itself does not need.
        """
        precision = self.trainer.precision_plugin
        self.backbone.vae.to(self.device)
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
            self.backbone.vae.to("cpu")

    def _check_sharding(self) -> None:
        """Raise InputError for what cannot be combined with weights that are shared out among the
        processes.
        """
        strategy = "trainer.strategy"
        if not isinstance(self.tuning, Full):
            raise InputError(
                f"{strategy} shares out the weights in training, and with {self.tuning.name} these"
                " are few: set it to ddp"
            )
        if self.device_mesh["tensor_parallel"].size() > 1:
            raise InputError(
                f"{strategy}.tensor_parallel_size must be 1, and data_parallel_size the number of"
                " processes"
            )
        if self.trainer.strategy._save_distributed_checkpoint:
            raise InputError(
                f"set {strategy}.save_distributed_checkpoint to false: the resume state is one file"
            )
        if averagers := [
            type(c).__name__ for c in self.trainer.callbacks if isinstance(c, WeightAveraging)
        ]:
            raise InputError(
                f"{averagers[0]} keeps a whole copy of the weights, and {strategy} shares them out:"
                " leave it out of trainer.callbacks"
            )

    @property
    def data(self) -> SubjectData:
        return self.trainer.datamodule

    def on_fit_start(self) -> None:
        self.backbone.to(self.device)
        size = self.backbone.size
        with self.drawing():
            if self.data.num_class_images:
                self._draw_missing_priors()
            if not self.tuning.text_encoder:
                self.encoded = self.backbone.encode_prompts(
                    [self.data.instance_prompt, self.data.class_prompt]
                )
        self._images = self._hashes()
        self.backbone.vae.to(self.device)
        self.latents = {False: self._encode_images(self.data.instance_pixels(size), self.data.flip)}
        if self.data.num_class_images:
            self.latents[True] = self._encode_images(self.data.prior_pixels(size), self.data.flip)
        self.backbone.vae.to("cpu")
        for module in self.trained:
            module.train()

    @torch.no_grad()
    def _encode_images(self, batches: Iterable[Tensor], flip: bool) -> tuple[Tensor, Tensor]:
        """Means and deviations of the latents (flips, n, ...), encoded once: flipping latents is
        not flipping images.
        """
        encoded = [
            [
                self.backbone.encode(version)
                for version in ([pixels, pixels.flip(-1)] if flip else [pixels])
            ]
            for pixels in batches
        ]
        return tuple(
            torch.cat(
                [torch.stack([version[i] for version in versions]) for versions in encoded], 1
            ).float()
            for i in (0, 1)
        )

    def _draw_missing_priors(self) -> None:
        """Class images that are not there yet, drawn by the base; every process draws its share."""
        from dreamblend.training.class_images import check_priors, draw_priors, missing_priors

        check_priors(self.data.class_images_dir, self.data.class_prompt, self.base, self.base_hash)
        missing = self.trainer.strategy.broadcast(
            missing_priors(self.data.class_images_dir, self.data.num_class_images)
        )  # as the first process saw them
        if missing and self.trainer.ckpt_path:
            raise InputError(
                f"{self.data.class_images_dir} lacks {len(missing)} of the class images this run"
                " began with: put them back, or begin a new run"
            )
        rank, processes = self.global_rank, self.trainer.world_size
        even = missing + missing[-1:] * (
            -len(missing) % processes
        )  # all call the denoiser equally often, as they must where it is sharded
        draw_priors(self.backbone, self.data.class_prompt, even[rank::processes], self.base_hash)
        self.trainer.strategy.barrier("prior images drawn")

    # -- training
    def training_step(self, batch: dict, _: int) -> Tensor:
        """One batch of draws. The loss is the photos' mean plus prior_loss_weight times the class
        images'.
        """
        noise_source = generator(self.seed, "noise", 0, batch["draw"])
        prior = batch["prior"].cpu()
        z = self._latents(batch, noise_source)
        noise = objective.draw_noise(z.shape, noise_source, self.noise_offset).to(self.device)
        index = self.noise.draw(len(z), noise_source)
        alpha, sigma = (x[index].to(self.device) for x in (self.noise.alpha, self.noise.sigma))

        kind = self.device.type
        with torch.random.fork_rng(
            [] if kind in ("cpu", "mps") else [self.device], device_type=kind
        ):  # of mps, the state is not of a device
            torch.manual_seed(
                noise_source.initial_seed()
            )  # dropout, too, depends on the draw alone, so that a run can be continued
            predicted = self.backbone.denoise(
                objective.add_noise(z, noise, alpha, sigma),
                self.noise.timestep(index).to(self.device),
                self._conditioning(prior),
            )
        loss = objective.sample_loss(
            predicted, objective.target(self.noise.prediction, z, noise, alpha, sigma)
        )
        if len(self.noise.weight):
            loss = loss * self.noise.weight[index].to(self.device)
        if self.min_snr_gamma is not None:
            loss = loss * objective.min_snr_weight(
                self.noise.prediction, alpha, sigma, self.min_snr_gamma
            )
        instance_loss = loss[~prior].mean()
        self.log("loss", instance_loss, prog_bar=True)
        total = instance_loss
        if prior.any():
            prior_loss = loss[prior].mean()
            self.log("prior_loss", prior_loss)
            total = instance_loss + self.prior_loss_weight * prior_loss
        self._finite.saw(batch, total)
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._finite.check(self.trainer, self.trained.parameters(), self._photos)

    def _photos(self, batch: dict) -> list[str]:
        """The names of what a batch was drawn from."""
        folders = {
            prior: list_photos(self.data.class_images_dir) if prior else self.data.photos
            for prior in batch["prior"].unique().tolist()
        }
        return [
            folders[prior][index].name
            for index, prior in zip(batch["index"].tolist(), batch["prior"].tolist())
        ]

    def _latents(self, batch: dict, source: torch.Generator) -> Tensor:
        rows = []
        for index, flipped, prior in zip(
            batch["index"].tolist(), batch["flipped"].tolist(), batch["prior"].tolist()
        ):
            mean, deviation = (part[int(flipped), index] for part in self.latents[prior])
            rows.append(
                mean + deviation * torch.randn(mean.shape, generator=source).to(mean.device)
            )
        return torch.stack(rows)

    def _conditioning(self, prior: Tensor) -> Conditioning:
        prompts = [self.data.instance_prompt, self.data.class_prompt]
        encoded = (
            self.backbone.encode_prompts(prompts) if self.tuning.text_encoder else self.encoded
        )
        return encoded[prior.long().to(self.device)]

    def configure_optimizers(self) -> dict:
        from diffusers.optimization import get_scheduler

        # the first is the denoiser, or the one module that trains; what encodes prompts follows
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
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        if self.lr_scheduler != "constant" and self.trainer.max_steps < 1:
            raise InputError(
                f"model.lr_scheduler {self.lr_scheduler} ends at the last step: set"
                " trainer.max_steps"
            )
        name = "constant_with_warmup" if self.lr_scheduler == "constant" else self.lr_scheduler
        # not trainer.estimated_stepping_batches, which would make the stream of draws before a
        # continued run knows its step
        last, begun = self.trainer.max_steps, {}
        if (
            self.lr_warmup_steps
        ):  # the scheduler's own first step has rate 0 and trains nothing: begin at its second
            last, begun = last + 1, {"last_epoch": 0}
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        schedule = get_scheduler(
            name, optimizer, num_warmup_steps=self.lr_warmup_steps, num_training_steps=last, **begun
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- the resume state: the trained weights alone, also where weight averaging keeps two of each
    def on_save_checkpoint(self, checkpoint: dict) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        for key in _STATES & checkpoint.keys():
            checkpoint[key] = {k: v for k, v in checkpoint[key].items() if k in trained}
        checkpoint["dreamblend"] = json.dumps(
            identity(self.about(self.trainer.global_step, torch.float32))
        )

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Raise InputError where what would go on is another run, or is at its end."""
        where = f"the resume state {self.trainer.ckpt_path}"
        step = checkpoint["global_step"]
        last = self.trainer.max_steps
        self.check_same_run(json.loads(checkpoint.get("dreamblend", "{}")), where)
        if step >= last > 0:
            raise InputError(
                f"{where} is of step {step}, and trainer.max_steps is {last}: raise it to go on"
            )
        for key in _STATES & checkpoint.keys():
            checkpoint[key] = {**self.state_dict(), **checkpoint[key]}

    def check_same_run(self, theirs: dict, where: str) -> None:
        """Raise InputError where what is there is of a run (its `identity`) whose weights at a step
        would be others.
        """
        check_same(theirs, identity(self.about(0, torch.float32)), where)

    # -- snapshots
    def settings(self) -> dict:
        """How it was trained, as snapshot.json keeps it: all that the weights at a step depend on.
        Not on_nan, which changes no step that is kept.
        """
        data, trainer = self.data, self.trainer
        return {
            "base_config": self.base_config,
            "base_prediction": self.base_prediction,
            "tuning": self.tuning.settings,
            "learning_rate": self.learning_rate,
            "text_encoder_learning_rate": self.text_encoder_learning_rate,
            "lr_scheduler": self.lr_scheduler,
            "lr_warmup_steps": self.lr_warmup_steps,
            "weight_decay": self.weight_decay,
            "min_snr_gamma": self.min_snr_gamma,
            "noise_offset": self.noise_offset,
            "batch_size": data.batch_size,
            "flip": data.flip,
            "crop": data.crop,
            "prompt": data.instance_prompt,
            "instance_dir": str(Path(data.instance_dir).resolve()),
            "num_class_images": data.num_class_images,
            "prior_loss_weight": self.prior_loss_weight,
            "class_prompt": data.class_prompt if data.num_class_images else None,
            **(self._images or self._hashes()),
            "processes": trainer.world_size,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "limit_train_batches": trainer.limit_train_batches,
            "precision": str(trainer.precision),
            "frozen_dtype": self.frozen,
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": str(trainer.gradient_clip_algorithm),
            "averages": self.averages,
            **(
                {"max_steps": trainer.max_steps} if self.lr_scheduler != "constant" else {}
            ),  # where the schedule ends
        }

    def _hashes(self) -> dict[str, str | None]:
        """What the photos and class images are; None for class images that have yet to be drawn."""
        try:
            priors = digest(self.data.class_images) if self.data.num_class_images else None
        except InputError:
            priors = None
        return {"photos": digest(self.data.photos), "class_images": priors}

    def about(self, step: int, dtype: torch.dtype) -> About:
        """What the snapshot of this step says."""
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
