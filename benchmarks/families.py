"""Does every family run on a GPU, and what does it take? `python benchmarks/families.py --tiny`
trains, records and blends tiny models of each family in bf16, compares them with the CPU in fp32,
and runs the commands; `--full NAME ...` measures denoisers of full size with random weights.

A case that fails is told with the last lines of its error, and the others go on. `--out` has what
came out of each case, after each.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import pieces  # noqa: E402
from dreamblend.attention import record  # noqa: E402
from dreamblend.blending.batch import Batch  # noqa: E402
from dreamblend.blending.blends import CAG, Late, Region  # noqa: E402
from dreamblend.blending.models import Models  # noqa: E402
from dreamblend.blending.pair import Pair  # noqa: E402
from dreamblend.blending.picture import pictures  # noqa: E402
from dreamblend.models import Backbone, Conditioning, load_backbone  # noqa: E402
from dreamblend.sandbox import world  # noqa: E402
from dreamblend.storage.files import save_text  # noqa: E402
from dreamblend.tuning.lora import TRAINING  # noqa: E402

TINY = (
    *("sdxl", "sd3", "flux_dev", "flux_schnell", "flux2", "klein_base", "klein"),
    *("qwen_image", "z_image", "z_image_turbo", "sana", "pixart_sigma"),
)
PAIRS = [("a sks mug on the beach", 3)]
TOLERANCE = 1e-3  # of late on the device, of the CPU's latents' norm
# Tiny pipelines that text comes from, and the denoiser's name in tests/families/full_size.py
FULL = {
    "sdxl": ("sdxl", "Stable Diffusion XL"),
    "sd35_medium": ("sd3", "Stable Diffusion 3.5 medium"),
    "sd35_large": ("sd3", "Stable Diffusion 3.5 large"),
    "flux_dev": ("flux_dev", "FLUX.1-dev"),
    "klein_4b": ("klein_base", "FLUX.2 klein base 4B"),
    "qwen_image": ("qwen_image", "Qwen-Image"),
    "z_image": ("z_image", "Z-Image"),
    "sana": ("sana", "Sana 1.6B"),
    "pixart_sigma": ("pixart_sigma", "PixArt-Sigma"),
}


class Results:
    """What came out of each case so far, printed and in a file."""

    def __init__(self, path: Path, device: str):
        self.path, self.rows = path, []
        self.about = {"device": device, "torch": torch.__version__}
        if device == "cuda":
            self.about["device"] = torch.cuda.get_device_name()

    def case(self, name: str, run: Callable[..., dict | None], *args: Any) -> bool:
        """Run a case, `run(*args)`; its error becomes a row."""
        started = time.perf_counter()
        try:
            row = {"case": name, "ok": True, **(run(*args) or {})}
        except Exception:
            last = traceback.format_exc().strip().splitlines()
            row = {"case": name, "ok": False, "error": last[-6:]}
        row["seconds_in_all"] = round(time.perf_counter() - started, 2)
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_text(json.dumps({**self.about, "rows": self.rows}, indent=1), self.path)
        return row["ok"]


# ---------------------------------------------------------------------------------------- tiny ones
def build(folder: Path, names: list[str]) -> None:
    """Write the tests' tiny pipelines."""
    run([sys.executable, "-m", "families", folder, *names], PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")


def run(command: list[object], limit: float = 120, **environment: str) -> None:
    """A command in a process of its own. Raises RuntimeError with its last lines."""
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit,
    )
    if done.returncode:
        raise RuntimeError("\n".join((done.stdout + done.stderr).strip().splitlines()[-4:]))


def train(base: Path, photos: Path, out: Path, device: str) -> dict:
    """Three steps of LoRA in bf16, the first and the last kept."""
    import lightning as L

    from dreamblend.callbacks import SnapshotCheckpoint
    from dreamblend.training.data import SubjectData
    from dreamblend.training.module import Tuner
    from dreamblend.tuning import LoRA

    L.seed_everything(0, verbose=False)
    tuner = Tuner(
        str(base),
        tuning=LoRA(rank=2),
        learning_rate=1e-3,
        frozen_dtype="bf16",
        gradient_checkpointing=True,
    )
    trainer = L.Trainer(
        default_root_dir=out,
        max_steps=3,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SnapshotCheckpoint([1, 3])],
    )
    trainer.fit(tuner, datamodule=SubjectData(photos, "mug", batch_size=1))
    return {"loss": float(trainer.callback_metrics["loss"])}


def pair_of(base: Path, run: Path) -> Models:
    """The run's pair; the base itself where it cannot be trained."""
    if (run / "snapshots").exists():
        return Models.load(Pair.find(run, "1", "3"), str(base))
    plain = load_backbone(str(base))
    return Models(plain, plain, plain)


def batch_of(models: Models, steps: int = 2, size: tuple[int, int] | None = (64, 64)) -> Batch:
    return Batch.of(models, PAIRS, "sks", "mug", steps, 4.0, size=size)


@torch.no_grad()
def blended(models: Models, blend: Any) -> dict:
    batch = batch_of(models)
    drawing = blend.draw(batch)
    assert pictures(PAIRS, batch, blend.name, drawing), f"{blend.name} is not finite"
    return {"maps": round(drawing.maps.mean().item(), 6)}


@torch.no_grad()
def compared(base: Path, run: Path, device: str) -> dict:
    """How far late in fp32 is from the CPU's, as a share of its norm."""
    drawn = []
    for place in ("cpu", device):
        models = pair_of(base, run)
        models.to(place, torch.float32)
        drawn.append(Late().draw(batch_of(models)).latents.cpu())
    off = ((drawn[1] - drawn[0]).norm() / drawn[0].norm()).item()
    assert off < TOLERANCE, f"late is {off:.2g} of its norm from the CPU's"
    return {"off": off}


def tiny(results: Results, folder: Path, names: list[str], device: str) -> None:
    """Every tiny family, and the commands."""
    for name in ("runs", "commands"):  # those of a former call
        shutil.rmtree(folder / name, ignore_errors=True)
    photos = folder / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for i, photo in enumerate(world.photos("teal_mug")[:2]):
        photo.save(photos / f"{i}.png")
    bases = folder / "bases"
    if not all((bases / name).is_dir() for name in names):
        results.case("build", build, bases, names)
    for name in names:
        tiny_family(results, bases / name, photos, folder / "runs" / name, device)
    for base in ("sandbox", bases / names[0]):
        name = Path(base).name
        out = folder / "commands" / name
        results.case(f"{name} commands", commands, base, photos, out, device)


def tiny_family(results: Results, base: Path, photos: Path, out: Path, device: str) -> None:
    """Train one, draw its pair, compare it with the CPU."""
    name, held = base.name, []
    if name not in ("flux_schnell", "klein"):  # distilled, and not to be trained
        results.case(f"{name} train", train, base, photos, out, device)

    def load() -> None:
        held.append(pair_of(base, out))
        held[0].to(device, torch.bfloat16)

    if results.case(f"{name} load", load):
        for blend in (Late(), Region(), CAG()):
            results.case(f"{name} {blend.name}", blended, held[0], blend)
    results.case(f"{name} fp32", compared, base, out, device)


def commands(base: object, photos: Path, out: Path, device: str) -> None:
    """`fit` in mixed precision and `predict`, as a user calls them."""
    accelerator = ["--trainer.accelerator", "gpu" if device == "cuda" else "cpu"]
    quiet = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    program = [sys.executable, "-m", "dreamblend"]
    run(
        [
            *(*program, "fit", "--config", "configs/train_lora.yaml", "--model.base", base),
            *("--data.instance_dir", photos, "--data.class_noun", "mug", "--out", out / "run"),
            *("--data.batch_size", 1, "--data.num_class_images", 0),
            *("--snapshots.steps", "[1,3]", "--trainer.max_steps", 3, "--trainer.callbacks", "[]"),
            *("--trainer.precision", "bf16-mixed", *accelerator, *quiet),
        ]
    )
    run(
        [
            *(*program, "predict", "--config", "configs/blend.yaml", "--run", out / "run"),
            *("--early", 1, "--late", 3, "--prompts", json.dumps([PAIRS[0][0]]), "--seeds", "0-1"),
            *("--out", out / "blend", "--model.num_inference_steps", 2, *accelerator, *quiet),
            *("--trainer.callbacks", "[]"),
        ]
    )
    drawn = len(list((out / "blend/images").rglob("*.png")))
    assert drawn == 6, f"{drawn} images of 6"


# ---------------------------------------------------------------------------------------- full size
class Widened(Backbone):
    """A family with a denoiser of full size behind tiny text encoders, whose states are filled up
    to its width.
    """

    widths: dict[str, int]

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return self._wide(super().encode_prompts(prompts))

    def without_prompt(self, count: int) -> Conditioning:
        return self._wide(super().without_prompt(count))

    def _wide(self, text: Conditioning) -> Conditioning:
        def fill(x: torch.Tensor, name: str) -> torch.Tensor:
            lacking = self.widths.get(name, 0) - x.shape[-1]
            return torch.nn.functional.pad(x, (0, lacking)) if lacking > 0 else x

        extras = {name: fill(x, name) for name, x in text.extras.items()}
        return Conditioning(fill(text.states, "states"), extras)


def widths(config: Any) -> dict[str, int]:
    """The channels of the text that a denoiser takes."""
    states = next(
        config[key]
        for key in ("caption_channels", "cap_feat_dim", "joint_attention_dim")
        + ("cross_attention_dim",)
        if config.get(key)
    )
    pooled = config.get("pooled_projection_dim")
    if sizes := config.get("addition_time_embed_dim"):  # SDXL's pooled text stands before its sizes
        pooled = config["projection_class_embeddings_input_dim"] - 6 * sizes
    return {"states": states} | ({"pooled": pooled} if pooled else {})


def full_size(base: Path, published: str, device: str) -> Backbone:
    """A family with random weights of full size, made on the device in bf16."""
    from tests.families import full_size as without_memory

    tiny = load_backbone(str(base))
    part, kind = tiny.denoiser_name, type(tiny.denoiser)
    config = without_memory.full_size(published).denoiser.config
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            denoiser = kind.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for weight in denoiser.parameters():  # memory as it was
            weight.nan_to_num_(0, 0, 0).clamp_(-1, 1)
    pipe = tiny.pipe
    pipe.register_modules(**{part: denoiser})
    # pipelines say how large a picture is for the denoiser that they got
    model = type("Widened", (Widened, type(tiny)), {})(pipe, "full size")
    model.widths = widths(denoiser.config)
    model.to(device, torch.bfloat16)
    return model


def measured(device: str, run: Callable[[], Any], repeats: int = 1) -> dict:
    """Seconds, and the most GB that were held."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    row = {"seconds": (time.perf_counter() - started) / repeats}
    if device == "cuda":
        row["gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {name: round(value, 3) for name, value in row.items()}


def training_step(model: Backbone, device: str) -> dict:
    """One step of LoRA at the base's own size: one photo, gradient checkpointing, AdamW; the second
    is measured. The model is as it was before.
    """
    shape = (1, *model.latent_shape)
    latents = torch.zeros(shape, device=device), torch.ones(shape, device=device)
    step = pieces.training_step(pieces.lora_tuner(model), PAIRS[0][0], latents)
    try:
        step()
        return measured(device, step)
    finally:
        model.denoiser.eval().disable_gradient_checkpointing()
        model.forget(TRAINING)


def full(results: Results, folder: Path, names: list[str], device: str) -> None:
    """What full-size denoisers take to train and to draw, a picture of their own size."""
    bases = folder / "bases"
    for name in names:
        tiny, published = FULL[name]
        if not (bases / tiny).is_dir():
            results.case(f"{tiny} build", build, bases, [tiny])
        full_family(results, name, bases / tiny, published, device)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def full_family(results: Results, name: str, base: Path, published: str, device: str) -> None:
    """Measure one denoiser."""
    held: list[Any] = []

    def load() -> dict:
        model = full_size(base, published, device)
        count = sum(weight.numel() for weight in model.denoiser.parameters())
        held.append(model)
        return {"parameters": count, "size": model.size, **measured(device, lambda: None)}

    if not results.case(f"{name} load", load):
        return
    (model,) = held
    results.case(f"{name} train", training_step, model, device)
    models = pieces.lora_pair(model)
    with torch.no_grad():
        steps = one_step(batch_of(models, size=None))
        results.case(f"{name} warm", measured, device, steps["plain"])
        for kind, step in steps.items():
            results.case(f"{name} {kind}", measured, device, step, 2)


def one_step(batch: Batch) -> dict[str, Callable[[], Any]]:
    """One step of drawing: late alone with guidance, with its maps, the region's two models, and
    the map guidance before a step (its reference too).
    """
    from dreamblend.blending.guidance import distance_and_gradient
    from dreamblend.blending.recorder import Recorder

    z, t = batch.noise, batch.schedule().timesteps[0]
    made: dict[str, Any] = {}

    def get(name: str, make: Callable[[], Any]) -> Any:
        if name not in made:
            made[name] = make()
        return made[name]

    def plain() -> None:
        get("plain", lambda: batch.predictor(batch.late))(z, t, 0)

    def recorded() -> None:
        get("late", lambda: Recorder(batch, batch.late))(z, t, 0)

    def region() -> None:
        recorded()
        get("early", lambda: batch.predictor(batch.early))(z, t, 0)
        Region().share(made["late"].last, batch)

    def cag() -> None:
        reference = get("reference", lambda: Recorder(batch, batch.early, range(1)))
        reference(z, t, 0)
        late = get("late", lambda: Recorder(batch, batch.late))

        def read(z: torch.Tensor) -> dict[str, torch.Tensor]:
            with record(batch.late.denoiser, batch.sites, batch.tokens, stop_at_last=True) as maps:
                batch.late.denoise(z, t, late.prompts)
            return maps

        distance_and_gradient(read, z, reference.kept[0], batch.weights)
        late(z, t, 0)

    return {"plain": plain, "recorded": recorded, "region": region, "cag": cag}


def main() -> None:
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("--tiny", nargs="*", choices=TINY, metavar="NAME", help="all where no NAME")
    asked.add_argument("--full", nargs="*", choices=sorted(FULL), metavar="NAME")
    asked.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    asked.add_argument("--out", type=Path, default=Path("runs/families.json"))
    asked.add_argument("--folder", type=Path, help="for pipelines and runs; a temporary one if not")
    args = asked.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    results = Results(args.out, args.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if args.tiny is not None:
            tiny(results, folder, args.tiny or list(TINY), args.device)
        if args.full is not None:
            full(results, folder, args.full or list(FULL), args.device)
    failed = [row["case"] for row in results.rows if not row["ok"]]
    print(f"{len(results.rows) - len(failed)} of {len(results.rows)} cases are ok", *failed)


if __name__ == "__main__":
    main()
