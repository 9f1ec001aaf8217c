"""How fast train.py trains beside the limit, and beside what a script of diffusers does.

All train the same tensors in one process and take turns of some steps: `Tuner` under Lightning with
what the recipes in configs/ have (clipped gradients, averaged weights, a log); the bare loop of
forward, backward and AdamW on latents that are there; and the loop of diffusers'
examples/dreambooth, which reads the photos and encodes photos and prompts at every step. Photos are
counted, and not steps: its last batch of an epoch is short.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from benchmarks.cost.bases import Base
from benchmarks.cost.clock import finish, over, shown, spread
from benchmarks.tables import markdown
from benchmarks.training import IDENTIFIER, Subject, make_trainer
from dreamblend.callbacks import SnapshotCheckpoint
from dreamblend.errors import InputError
from dreamblend.storage.photos import open_photo
from dreamblend.training.data import SubjectData
from dreamblend.training.encoded import EncodedPrompts
from dreamblend.training.module import Tuner, tuner
from dreamblend.tuning import Full, LoRA, Method

METHODS: dict[str, Callable[[], Method]] = {
    "full": lambda: Full(text_encoder=True),
    "lora": lambda: LoRA(rank=16),
}
RATE = 1e-5
OURS, BARE, SCRIPT = "train.py", "bare loop", "diffusers' loop"
LAST = "bare, channels last"

Step = Callable[[], int]  # trains one step, and says of how many photos


class InTurn(L.Callback):
    """Lets others train between the steps of a run, and takes the time of each and of the run.

    Args:
        others: name -> what makes their step, once the run's weights are there.
        steps: of each turn; the run's first turn is not counted.
    """

    def __init__(
        self, others: dict[str, Callable[[L.Trainer, Tuner], Step]], steps: int, rounds: int
    ):
        self.makers, self.steps, self.rounds = others, steps, rounds
        self.rates: dict[str, list[float]] = {name: [] for name in (OURS, *others)}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.others = {name: make(trainer, tuner(module)) for name, make in self.makers.items()}
        self.done = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int
    ) -> None:
        self.done += 1
        if self.done % self.steps:
            return
        finish(module.device)
        first = self.done == self.steps
        if not first:
            photos = self.steps * tuner(module).data.batch_size
            self.rates[OURS].append(photos / (time.perf_counter() - self.since))
        for name, step in self.others.items():
            if first:
                step()
                continue
            started = time.perf_counter()
            photos = sum(step() for _ in range(self.steps))
            finish(module.device)
            self.rates[name].append(photos / (time.perf_counter() - started))
        self.since = time.perf_counter()


# -------------------------------------------------------------------------------------- the others
def autocast(device: torch.device) -> torch.autocast:
    """As Lightning's: bf16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def bare(trainer: L.Trainer, module: Tuner, last: bool = False) -> Step:
    """The limit: forward, backward and AdamW of the run's own weights, on latents, noise and
    prompts that are there. A text encoder that trains is called, too.

    `last` trains a copy whose denoiser is in the channels-last layout.
    """
    model, rows = module.backbone, module.data.batch_size
    if last:
        model = copy.copy(model)
        model._parts = {**model.parts()}
        denoiser = copy.deepcopy(model.denoiser).to(memory_format=torch.channels_last)
        model._parts[model.denoiser_name] = denoiser
    optimizer = trainer.optimizers[0]
    if last:
        fused = optimizer.defaults["fused"]
        optimizer = torch.optim.AdamW(module.tuning.parameters(model), RATE, fused=fused)
    mean, deviation = (x[:1] for x in module.latents[False][0][0])
    z = (mean + deviation * torch.randn_like(mean)).expand(rows, *mean.shape[1:]).contiguous()
    noise = torch.randn_like(z)
    if last:
        z, noise = (x.to(memory_format=torch.channels_last) for x in (z, noise))
    index = torch.randint(len(module.noise), (rows,))
    alpha, sigma = (
        x[index].to(module.device).view(-1, 1, 1, 1)
        for x in (module.noise.alpha, module.noise.sigma)
    )
    noisy, t = alpha * z + sigma * noise, module.noise.timestep(index).to(module.device)
    prompts = [module.data.prompts[0]] * rows
    there = module.encoded and module.encoded[prompts]

    def step() -> int:
        with autocast(module.device):
            told = there or EncodedPrompts(model, prompts)[prompts]
            loss = F.mse_loss(model.denoise(noisy, t, told).float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return rows

    return step


def script(trainer: L.Trainer, module: Tuner) -> Step:
    """What train_dreambooth.py and train_dreambooth_lora.py do at a step (diffusers 0.42)."""
    from tqdm import tqdm

    model, device = module.backbone, module.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights, optimizer = module.in_training, trainer.optimizers[0]
    trains_text = module.tuning.text_encoder
    # where the run keeps these on the CPU the script has its own on the device
    vae = model.vae if device.type == "cpu" else copy.deepcopy(model.vae).to(device, dtype)
    encoder: Any = next(iter(model.text_encoders.values()))
    if device.type != "cpu" and not trains_text:
        encoder = copy.deepcopy(encoder).to(device, dtype)
    scheduler = copy.deepcopy(model.scheduler)
    alphas = scheduler.alphas_cumprod
    tokenizer: Any = getattr(model, "tokenizer")  # noqa: B009  # of this family
    batches = script_batches(module, tokenizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    progress = tqdm(disable=None)

    def step() -> int:
        pixels, ids = (x.to(device) for x in next(batches))
        with torch.no_grad():
            z = vae.encode(pixels.to(dtype)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(z)
        t = torch.randint(len(alphas), (len(z),), device=device)
        noisy = scheduler.add_noise(z, noise, t)
        with autocast(device):
            states = encoder(ids)[0]
            loss = F.mse_loss(
                model.denoiser(noisy, t, states, return_dict=False)[0].float(), noise.float()
            )
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.update(1)
        progress.set_postfix(loss=loss.detach().item(), lr=schedule.get_last_lr()[0])
        return len(z)

    return step


def script_batches(module: Tuner, tokenizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels and token ids of its batches: every photo opened, cut and its prompt tokenised each
    time, the last batch of an epoch short.
    """
    import numpy as np
    from PIL import Image

    data = module.data
    size = data.resolution or module.backbone.size

    def photo(path: Path) -> Tensor:
        image = open_photo(path)
        scale = size / min(image.size)
        sides = [max(size, round(side * scale)) for side in image.size]
        image = image.resize((sides[0], sides[1]), Image.Resampling.BILINEAR)
        left, top = ((side - size) // 2 for side in sides)
        values = np.asarray(image.crop((left, top, left + size, top + size)), np.float32)
        return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)

    def ids() -> Tensor:
        return tokenizer(
            data.prompts[0],
            truncation=True,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids

    for _ in count():
        order = torch.randperm(len(data.photos)).tolist()
        for start in range(0, len(order), data.batch_size):
            chosen = order[start : start + data.batch_size]
            yield (
                torch.stack([photo(data.photos[i]) for i in chosen]).contiguous(),
                torch.cat([ids() for _ in chosen]),
            )


OTHERS: dict[str, Callable[[L.Trainer, Tuner], Step]] = {
    BARE: bare,
    SCRIPT: script,
    LAST: lambda trainer, module: bare(trainer, module, last=True),
}


# ---------------------------------------------------------------------------------------- a run
def fit(
    base: Base,
    method: str,
    subject: Subject,
    steps: int,
    out: Path,
    name: str,
    callbacks: list[L.Callback],
    **settings: Any,
) -> Path:
    """A run as the recipes in configs/ have it, but for its previews; its snapshots and states are
    those of the callbacks. Returns its folder, of this name in `out`.

    `settings` are the Trainer's.
    """
    run = out / name
    logged: dict[str, Any] = {"logger": CSVLogger(run), "log_every_n_steps": 10}
    trainer = make_trainer(run, steps, callbacks, **logged, **settings)
    module = Tuner(
        base.where(out), tuning=METHODS[method](), learning_rate=RATE, lr_warmup_steps=10
    )
    data = SubjectData(
        subject.photos, subject.class_noun, IDENTIFIER, batch_size=base.batch, resolution=base.size
    )
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        trainer.fit(module, data)  # with its progress bar, as anyone runs it
    return run


def compare(
    base: Base,
    method: str,
    subject: Subject,
    rounds: int,
    out: Path,
    others: dict[str, Callable[[L.Trainer, Tuner], Step]] = OTHERS,
    **settings: Any,
) -> list[dict]:
    """A row for each loop: photos a second, and the ratio to the bare loop's of the same round."""
    turns = InTurn(others, base.steps, rounds)
    last = base.steps * (rounds + 1)
    callbacks = [turns, SnapshotCheckpoint([last])]
    shutil.rmtree(fit(base, method, subject, last, out, "training", callbacks, **settings))
    return [
        {"name": name, "rate": spread(rates), "times": over(rates, turns.rates[BARE])}
        for name, rates in turns.rates.items()
    ]


def table(rows: list[dict], script: dict | None = None) -> str:
    """In Markdown; `script` is what `peer` measured."""
    lines = [
        {
            "kind": r["name"],
            "photos a second": f"{r['rate']['median']:.3g}",
            "of the bare loop": shown(r["times"]),
        }
        for r in rows
    ]
    if script is not None:
        limit = next(r for r in rows if r["name"] == BARE)["rate"]["median"]
        rate = script["rate"]
        own = (script["name"], f"{rate:.3g}", f"{rate / limit:.2f}")
        lines.append(dict(zip(lines[0], own)))
    return markdown(lines)


# --------------------------------------------------------------------------------------- the script
PEERS = {"full": "train_dreambooth.py", "lora": "train_dreambooth_lora.py"}


def peer(
    base: Base, method: str, subject: Subject, scripts: Path, steps: tuple[int, int], out: Path
) -> dict:
    """Photos a second of diffusers' own script, in a process of its own: what a run of more steps
    takes beside one of fewer.
    """
    file = scripts / PEERS[method]
    if not file.is_file():
        raise InputError(f"there is no {file}: --peer names diffusers' folder examples/dreambooth")
    photos = sum(1 for _ in subject.photos.iterdir())
    took, seen = [], []
    for last in steps:
        command = [sys.executable, file, "--pretrained_model_name_or_path", base.folder(out)]
        command += ["--instance_data_dir", subject.photos, "--output_dir", out / "peer"]
        command += ["--instance_prompt", f"a {IDENTIFIER} {subject.class_noun}"]
        command += ["--resolution", base.size or 64, "--train_batch_size", base.batch]
        command += ["--max_train_steps", last, "--learning_rate", RATE, "--seed", 0]
        command += ["--checkpointing_steps", 10**6]
        command += ["--train_text_encoder"] if method == "full" else ["--rank", 16]
        started = time.perf_counter()
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        took.append(time.perf_counter() - started)
        if done.returncode:
            raise InputError(f"{file} failed: {done.stderr.strip().splitlines()[-1]}")
        laps, rest = divmod(last, -(-photos // base.batch))
        seen.append(laps * photos + min(photos, rest * base.batch))
    shutil.rmtree(out / "peer", ignore_errors=True)
    return {"name": file.name, "rate": (seen[1] - seen[0]) / (took[1] - took[0])}
