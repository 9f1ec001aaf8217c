"""What only a GPU runs, without one: training, selection, diagnosis, blending and scoring on a
pretend device, and in a GPU's bf16 on the CPU.

On the pretend device tensors that were left on the CPU raise, and what is computed there in fp32 is
what the CPU computes.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from pretend import NAME, ON_PRETEND, READ_BACK, pretend_device
from safetensors.torch import load_file
from tiny_runs import Send, command, fit, step
from torch.nn.attention import SDPBackend, sdpa_kernel

from blend import main as blend
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import BLENDS
from dreamblend.blending.models import Models
from dreamblend.blending.pair import Pair
from dreamblend.blending.picture import pictures
from dreamblend.callbacks import Preview, Probe, ResumeState, WeightEMA
from dreamblend.callbacks.resume import NAME as STATE
from dreamblend.evaluation.diagnosis import diagnose
from dreamblend.evaluation.encoders import ImageEncoder
from dreamblend.evaluation.measures import DIAGNOSED
from dreamblend.evaluation.scores import Scores
from dreamblend.models import load_backbone
from dreamblend.sandbox import world
from dreamblend.selection import survey
from dreamblend.selection.command import picked, select
from dreamblend.storage import snapshots
from dreamblend.storage.photos import to_pixels
from dreamblend.storage.snapshots import DTYPES
from dreamblend.tuning import CustomDiffusion, Full, LoRA, TextualInversion, TLoRA

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "full with text encoder": lambda: Full(text_encoder=True),
    "lora": lambda: LoRA(rank=2, dropout=0.2),
    "t-lora": lambda: TLoRA(rank=4, min_rank=1),
    "custom diffusion": CustomDiffusion,
    "textual inversion": lambda: TextualInversion(vectors=2),
}
PAIRS = [("a sks mug on the beach", 3), ("a red sks mug", 8)]


@dataclass(frozen=True)
class Place:
    """Where something runs and in what precision."""

    device: str
    dtype: str
    trainer: dict = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """The trainer's on the command line."""
        return [
            word
            for key, value in self.trainer.items()
            if key != "precision"
            for word in (f"--trainer.{key}", value)
        ]


CPU = Place("cpu", "fp32", {"accelerator": "cpu"})
BF16 = Place("cpu", "bf16", {"accelerator": "cpu", "precision": "bf16-mixed"})
PRETEND = Place("pretend:0", "fp32", ON_PRETEND)


@pytest.fixture(params=[BF16, PRETEND], ids=["bf16", "pretend"])
def place(request) -> Iterator[Place]:
    with pretend_device() if request.param is PRETEND else nullcontext():
        yield request.param


def near(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float, rtol: float = 0.0
) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name].cpu().float(),
            b[name].cpu().float(),
            rtol=rtol,
            atol=atol,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def weights(run: Path, number: int) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}/{k}": v
        for file in sorted(step(run, number).rglob("*.safetensors"))
        for k, v in load_file(file).items()
    }


# -------------------------------------------------------------------------------- the device itself
def test_the_pretend_device_refuses_what_a_gpu_refuses_and_else_computes():
    with pretend_device() as device:
        a = torch.arange(6.0, device=device).view(2, 3)
        for wrong in (
            lambda: a + torch.ones(3),
            lambda: torch.ones(2, 3) @ a.T,
            lambda: torch.cat([a, torch.ones(2, 3)]),
            lambda: torch.zeros(()).add_(a.sum()),
            lambda: torch.ones(6)[a.long()],
            lambda: torch.nn.Linear(3, 2)(a),
            lambda: torch.nn.functional.embedding(torch.tensor([0]), a),
        ):
            with pytest.raises(RuntimeError, match="at least two devices"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            a.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device=device, generator=torch.Generator())
        assert (a * torch.tensor(2.0))[torch.tensor([1])].tolist() == [
            [6.0, 8.0, 10.0]
        ]  # a number, and an index, may be the CPU's
        assert (
            torch.tensor([1.0, 2.0], device=device).cpu().tolist() == [1.0, 2.0]
            and a.sum().item() == 15
        )

        turn = torch.polar(torch.ones(3), torch.arange(3.0)).to(device)
        assert (turn.conj() * turn).real.tolist() == pytest.approx([1, 1, 1])
        assert torch.arange(1, 6, 2, device=device).shape == (3,)

        torch.manual_seed(0)
        layer = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
        before = torch.get_rng_state()
        layer.to(device)(a).sum().backward()
        assert layer[0].weight.grad.device == device and torch.equal(
            torch.get_rng_state(), before
        )  # it has random numbers of its own
    assert not torch.accelerator.is_available()


# ----------------------------------------------------------------------------------------- training
class Devices(L.Callback):
    """Those of all weights at the end of training steps: what a step takes, and what waits."""

    def __init__(self):
        self.taken, self.waiting = set(), set()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        model = module.backbone
        encoders = {**model.text_encoders, **model.untrained_encoders}.values()
        at_every_step = module.tuning.text_encoder
        taken = [model.denoiser, module.trained, *(encoders if at_every_step else ())]
        waiting = [model.vae, *(() if at_every_step else encoders)]
        for devices, modules in ((self.taken, taken), (self.waiting, waiting)):
            devices.update(str(p.device) for part in modules for p in part.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.holds("device, bf16", of="stable_diffusion")
def test_training(method, place, tiny_base, mug_photos, tmp_path):
    """With class images that are drawn first, previews, curves, averaged weights, a stop by signal
    and the way on.
    """

    def train(out: Path, place: Place, *callbacks, **more):
        watch = [WeightEMA(decay=0.5), Preview(["a {subject}"], 1, 1), ResumeState(every=1)]
        watch += (
            [Probe(["a {subject}"], 2, 1, judges="sandbox")]
            if method == "full with text encoder"
            else []
        )
        classes = out / "class" if method == "lora" else priors  # drawn first, or there already
        return fit(
            tiny_base,
            mug_photos,
            out,
            METHODS[method](),
            steps=[1, 2],
            callbacks=(*watch, *callbacks),
            learning_rate=1e-3,
            noise_offset=0.1,
            min_snr_gamma=5.0,
            **more,
            data={"class_images_dir": classes, "num_class_images": 2, "flip": True},
            trainer={**place.trainer, "logger": CSVLogger(out)},
        )

    priors = copytree(mug_photos, tmp_path / "priors")
    with pytest.raises(SystemExit):
        train(tmp_path / "a", place, Send(signal.SIGUSR2, 0))
    train(tmp_path / "a", place, devices := Devices(), ckpt_path=tmp_path / "a" / STATE)
    assert devices.taken == {place.device} and devices.waiting == {"cpu"}
    assert {f.name for f in (tmp_path / "a/previews").iterdir()} == {
        "step-000001.png",
        "step-000002.png",
    }
    about, here = snapshots.read(step(tmp_path / "a", 2)).about, weights(tmp_path / "a", 2)
    assert about.step == 2 and all(torch.isfinite(w).all() for w in here.values())
    if place is PRETEND:
        train(tmp_path / "b", CPU)

        # a bias of keys moves all scores of a query alike, so its gradient is nothing but rounding,
        # which AdamW makes steps of
        def moved(found):
            return {k: v for k, v in found.items() if not k.endswith("k_proj.bias")}

        near(moved(here), moved(weights(tmp_path / "b", 2)), 1e-4)


@pytest.mark.parametrize("method", ["lora", "full with text encoder"])
def test_a_training_step_waits_for_nothing(method, tiny_base, mug_photos, tmp_path):
    """All of a step is on its way before anything is read back from the device."""

    class Reads(L.Callback):
        during: list[list[str]] = []

        def on_train_batch_start(self, *_):
            READ_BACK.clear()

        def on_before_backward(self, *_):
            self.during.append([*READ_BACK])

    data = {"num_class_images": 2, "class_images_dir": copytree(mug_photos, tmp_path / "priors")}
    with pretend_device():
        fit(
            *(tiny_base, mug_photos, tmp_path / "run", METHODS[method]()),
            steps=[1, 3],
            callbacks=(reads := Reads(),),
            noise_offset=0.1,
            min_snr_gamma=5.0,
            data={**data, "flip": True},
            trainer=ON_PRETEND,
        )
        assert reads.during == [[]] * 3
        READ_BACK.clear()
        assert torch.ones(2, device=NAME).sum().item() == 2 and len(READ_BACK) == 1


# -------------------------------------------------------------------------------------- from a pair
@pytest.fixture(scope="module")
def runs(tiny_base, mug_photos, tmp_path_factory) -> dict[str, Path]:
    """Runs whose snapshots are blended."""
    out = tmp_path_factory.mktemp("runs")
    for name, tuning in (
        ("full", Full(text_encoder=True)),
        ("lora", LoRA(rank=2)),
        ("words", CustomDiffusion()),
    ):
        fit(tiny_base, mug_photos, out / name, tuning, steps=[1, 3])
    return {path.name: path for path in out.iterdir()}


def loaded(run: Path, base: Path, place: Place) -> Models:
    pair = Models.load(Pair.find(run, "1", "3"), str(base))
    pair.to(place.device, DTYPES[place.dtype])
    return pair


def drawn(blend, run: Path, base: Path, place: Place):
    pair = loaded(run, base, place)
    batch = Batch.of(pair, PAIRS, "sks", "mug", 3, 4.0, 4)
    with torch.no_grad():
        return batch, blend.draw(batch)


# every blend of one pair, and of the others those that read maps, take gradients or merge weights
SOME = [(name, "full") for name in BLENDS]
SOME += [(name, "lora") for name in ("cag", "merge", "region")] + [("region", "words")]


@pytest.mark.parametrize("name, pair", SOME)
@pytest.mark.holds("device, bf16", of="stable_diffusion")
def test_every_blend(name, pair, place, runs, tiny_base):
    batch, found = drawn(BLENDS[name](), runs[pair], tiny_base, place)
    assert str(found.latents.device) == place.device
    assert [p.dtype for p in pictures(PAIRS, batch, name, found)] == [
        place.dtype
    ] * 2  # none is lacking
    if place is PRETEND:
        # a processor's own kernel of attention rounds in another way than a device without one
        with sdpa_kernel(SDPBackend.MATH):
            there = drawn(BLENDS[name](), runs[pair], tiny_base, CPU)[1]
        near(
            {k: v for k, v in vars(found).items() if isinstance(v, torch.Tensor)},
            {k: v for k, v in vars(there).items() if isinstance(v, torch.Tensor)},
            2e-5,
            rtol=1e-5,  # latents are as large as 4
        )


def draw(run: Path, out: Path, place: Place, *more: object) -> None:
    """The command as README has it, in the precision that is a GPU's own."""
    words = [
        "--config",
        ROOT / "configs/blend.yaml",
        "--run",
        run,
        "--early",
        1,
        "--late",
        3,
        "--prompts",
        '["a {subject} on the beach"]',
        "--out",
        out,
    ]
    rest = [
        "--seeds",
        "0-1",
        "--model.num_inference_steps",
        2,
        "--trainer.callbacks.judges",
        "sandbox",
    ]
    dtype = ["--model.dtype", "bf16"] if place is BF16 else []
    status, _, err = command(blend, "predict", *words, *rest, *dtype, *place.words, *more)
    assert status == 0, err


@pytest.mark.parametrize(
    "pair, kind, offload", [("full", "Region", "model"), ("lora", "CAG", "none")]
)
def test_the_blend_command_with_its_diagnosis_scores_and_report(
    pair, kind, offload, place, runs, tmp_path
):
    draw(runs[pair], tmp_path, place, "--model.blend", kind, "--model.offload", offload)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    dtype = (
        "bf16" if place is BF16 or pair == "lora" else "fp32"
    )  # a GPU's own, which of full weights swallows nothing
    assert (
        len(rows) == 6
        and {row["dtype"] for row in rows} == {dtype}
        and all(row["scores"]["subject"] is not None for row in rows)
    )
    assert {row["kind"] for row in json.loads((tmp_path / "summary.json").read_text())["rows"]} == {
        "early",
        kind.lower(),
        "late",
    }
    assert (tmp_path / "report.html").exists()


def test_a_blend_is_scored_where_it_was_drawn(runs, tmp_path, monkeypatch):
    seen, really = set(), ImageEncoder.images
    monkeypatch.setattr(
        ImageEncoder,
        "images",
        lambda self, pixels: seen.add(torch.device(self.device).type) or really(self, pixels),
    )
    with pretend_device():
        draw(
            runs["full"],
            tmp_path,
            PRETEND,
            "--model.compare",
            "false",
            "--trainer.callbacks.diagnose",
            "false",
        )
    assert seen == {"pretend"}


@pytest.mark.parametrize("pair", ["full", "lora", "words"])
def test_diagnosis(pair, place, runs, tiny_base):
    def rows(place: Place) -> list[dict]:
        base = load_backbone(str(tiny_base)).to(place.device, DTYPES[place.dtype])
        found = [snapshots.read(path) for _, path in snapshots.find(runs[pair])]
        return diagnose(base, found, [p for p, _ in PAIRS], "sks", "mug", 4, num_inference_steps=2)

    here = rows(place)
    assert len(here) == 3 and all(row[m] is not None for row in here for m in DIAGNOSED)
    if place is PRETEND:
        for row, there in zip(here, rows(CPU)):
            assert {m: row[m] for m in DIAGNOSED} == pytest.approx(
                {m: there[m] for m in DIAGNOSED}, abs=1e-4
            )


# ----------------------------------------------------------------------------- scores and selection
def test_scores(place, mug_photos):
    images = to_pixels(world.photos("teal_mug")[:2])

    def score(device: str) -> dict:
        scores = Scores(mug_photos, "sks", "sandbox", device)
        metrics = scores.metrics(1)
        rows = scores.update(metrics, images, "a sks mug on the moon", 0, torch.arange(2))
        return (
            {"diversity": scores.diversity(images), "prior": scores.prior(images)}
            | rows[1]
            | {k: m.compute().item() for k, m in metrics.items()}
        )

    assert score(place.device) == pytest.approx(score("cpu"), abs=1e-5, nan_ok=True)


@pytest.fixture(scope="module")
def sandbox_run(mug_photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("selected") / "run"
    fit(
        "sandbox",
        mug_photos,
        out,
        Full(),
        steps=[1, 12],
        learning_rate=2e-3,
        data={"batch_size": 4},
    )
    return out


def test_select(place, sandbox_run, tmp_path, monkeypatch):
    def measured(where: Place) -> dict:
        run = copytree(sandbox_run, tmp_path / where.device[:3] / where.dtype)
        monkeypatch.setattr(survey, "own_device", lambda: where.device)
        monkeypatch.setattr(survey, "drawing_dtype", lambda *_: where.dtype)
        select(
            run,
            prompts=["a picture of a {subject} on the moon"],
            seeds="7-8",
            num_inference_steps=2,
        )
        assert picked(run) == (1, 12)
        return json.loads((run / "survey.json").read_text())["points"]

    points = measured(place)
    assert len(points) == 4  # the base, two snapshots and their blend
    if place is PRETEND:
        for key, point in measured(CPU).items():
            for here, there in zip(points[key]["images"], point["images"], strict=True):
                assert here == pytest.approx(there, abs=2e-3)
