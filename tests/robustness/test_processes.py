"""Several processes: what they train is what one trains with as many batches a step, and what they
draw is the same to the byte.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import BLENDS, PROMPTS, together, train
from safetensors.torch import load_file
from tiny_runs import blend_words, command, contents, plain_pipeline, step

from blend import main
from dreamblend.blending.blends import Early
from dreamblend.blending.models import Models
from dreamblend.errors import InputError, cause
from dreamblend.evaluation.bench import Bench
from dreamblend.models import load_backbone
from dreamblend.storage.blend_folder import slug
from dreamblend.storage.files import locked
from dreamblend.storage.photos import list_photos
from dreamblend.training.optimizers import Adafactor, AdamWScheduleFree, Lion
from dreamblend.tuning import LoRA

UNET = "unet/diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def made(tiny_base, mug_photos, tmp_path_factory) -> Path:
    """All that the processes made. Not to be changed."""
    out = tmp_path_factory.mktemp("processes")
    script = Path(__file__).resolve().parents[1] / "processes.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, script, tiny_base, mug_photos, out],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    (out / "said.txt").write_text(done.stderr)
    return out


def close(a: dict, b: dict, rate: float = 1e-3) -> None:
    """The same weights but for the order in which gradients were added: far less than the two steps
    of `rate` that they made.
    """
    assert a.keys() == b.keys()
    moved = torch.cat([(a[k] - b[k]).flatten().abs() for k in a])
    assert moved.max() < 0.5 * rate and (moved > 0.01 * rate).float().mean() < 0.01


# ----------------------------------------------------------------------------------------- training
@pytest.mark.parametrize(
    "one, two, file",
    [
        ("one", "two", UNET),
        ("one", "two", "text_encoder/model.safetensors"),
        ("lora-one", "lora-two", LORA),
    ],
)
def test_two_processes_train_what_one_does_with_twice_the_batches(made, one, two, file):
    for number in (1, 2):
        close(
            load_file(step(made / one, number) / file), load_file(step(made / two, number) / file)
        )
    assert (step(made / two, 1) / file).read_bytes() != (step(made / two, 2) / file).read_bytes()


@pytest.mark.heavy
@pytest.mark.parametrize("optimizer", [Adafactor, Lion, AdamWScheduleFree])
def test_two_processes_train_alike_in_buckets_and_with_other_optimizers(
    optimizer, tiny_base, mug_photos, tmp_path
):
    """To the bit: of two batches a step the gradients are added in one order only."""
    if optimizer.package:
        pytest.importorskip(optimizer.package)
    (tmp_path / "photos").mkdir()
    for i, path in enumerate(list_photos(mug_photos)):
        with Image.open(path) as photo:
            shape = (48, 32) if i % 2 else (32, 48)
            photo.convert("RGB").resize(shape).save(tmp_path / "photos" / path.name)
    for processes in (1, 2):
        train(
            *(tiny_base, tmp_path / "photos", tmp_path / str(processes), processes, LoRA(rank=2)),
            total=2,
            data={"buckets": True, "batch_size": 2},
            optimizer=optimizer(),
        )
    one, two = (step(tmp_path / name, 2) for name in "12")
    assert load_file(one / LORA) and (one / LORA).read_bytes() == (two / LORA).read_bytes()
    assert (one / LORA).read_bytes() != (step(tmp_path / "1", 1) / LORA).read_bytes()


@pytest.mark.parametrize("run", ["two", "lora-two"])
def test_both_end_with_the_same_weights_and_write_each_snapshot_once(made, run):
    a, b = (load_file(made / run / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert a and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert sorted(p.name for p in (made / run / "snapshots").iterdir()) == [
        "step-000001",
        "step-000002",
    ]


def test_a_state_that_is_due_by_the_clock_of_one_process_is_kept_by_all(made):
    states = [(made / "lora-two" / f"states-{rank}").read_text().split() for rank in (0, 1)]
    assert states == [["1", "2"]] * 2


def test_the_same_two_processes_give_the_same_bits(made):
    assert contents(made / "two/snapshots") == contents(made / "again/snapshots")


def test_a_process_leaves_its_group_before_it_ends():
    """Gloo's threads else abort it now and then, after its work is done."""
    code = """
import atexit, torch.distributed as dist
@atexit.register  # runs after what is registered later
def told(): print("left" if not dist.is_initialized() else "still there")
import dreamblend.processes
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["left"])


def test_class_images_are_drawn_once_in_shares(made):
    for folder in ("prior", "sharded-prior"):
        assert [p.name for p in list_photos(made / folder)] == [
            "00000.png",
            "00001.png",
            "00002.png",
        ] and len(contents(made / folder)) == 3


def test_sharded_weights_train_alike_and_make_an_ordinary_snapshot(made, tiny_base):
    for number in (1, 2):
        for file in (UNET, "text_encoder/model.safetensors"):
            close(
                load_file(step(made / "sharded", number) / file),
                load_file(step(made / "two", number) / file),
            )
    configs = [
        json.loads((step(made / run, 2) / "unet/config.json").read_text())
        for run in ("sharded", "two")
    ]
    assert configs[0] == configs[1] and configs[0]["_class_name"] == "UNet2DConditionModel"
    unet = type(plain_pipeline(tiny_base).unet).from_pretrained(
        step(made / "sharded", 2), subfolder="unet"
    )
    assert all(
        torch.equal(v, unet.state_dict()[k])
        for k, v in load_file(step(made / "sharded", 2) / UNET).items()
    )
    assert {p.name for p in (made / "sharded/previews").iterdir()} == {
        "step-000001.png",
        "step-000002.png",
    }
    with open(next((made / "sharded-log").rglob("metrics.csv"))) as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["probe/subject"]] == [
            0,
            1,
            2,
        ]


# ----------------------------------------------------------------------------------------- blending
@pytest.mark.parametrize("other", list(BLENDS)[1:])
def test_images_maps_and_index_are_the_same_to_the_byte_for_any_processes_and_batches(made, other):
    first = contents(made / "blends" / next(iter(BLENDS)))
    assert contents(made / "blends" / other) == first
    rows = [json.loads(line) for line in first["results.jsonl"].decode().splitlines()]
    assert len(rows) == 3 * 2 * len(PROMPTS) == len({row["file"] for row in rows})


def test_fewer_pairs_than_processes_are_drawn_too(made):
    whole, few = contents(made / "blends/1-8"), contents(made / "few")
    kinds = ("early", "region", "late")
    assert {name for name in few if name.endswith(".png")} == {
        f"images/{slug(p)}/0-{kind}.png" for p in ("a sks mug", "sks") for kind in kinds
    }
    assert all(whole[name] == data for name, data in few.items() if name != "results.jsonl")


# -------------------------------------------------------------------------------------- one for all
def test_a_refusal_by_the_first_process_ends_all_and_is_told_once(made, tmp_path):
    """Each is started by itself, as by srun: nobody kills the second one, which would wait."""
    out = shutil.copytree(made / "blends/1-8", tmp_path / "out")
    before = contents(out)

    def work(rank: int) -> None:
        words = blend_words(
            made / "one",
            out,
            "--model.num_inference_steps",
            3,
            "--trainer.devices",
            2,
            prompts=PROMPTS,
        )
        status, _, err = command(main, *words)
        (tmp_path / f"{rank}.txt").write_text(err)
        sys.exit(status)

    assert together(2, work) == [2, 2]
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert (
        "error: " in said[0]
        and "steps 2, now 3" in said[0]
        and "error: " not in said[1]
        and contents(out) == before
    )


def test_one_process_of_two_scores_alone(mug_photos, tmp_path):
    """Every measure of a bench, while the other one does not take part."""

    def work(rank: int) -> None:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
        if rank == 0:
            model = load_backbone("sandbox")
            bench = Bench(mug_photos, "sks", "mug", ["a sks mug on the moon"], [0, 1], 1)
            (
                bench.single(model),
                bench.prior({"early": Early()}, Models(model, model, model)),
                bench.scores.diversity(torch.rand(2, 3, 64, 64)),
            )
            scores = bench.scores.metrics(1)
            bench.scores.update(
                scores, torch.rand(2, 3, 64, 64), "a sks mug on the moon", 0, torch.arange(2)
            )
            [metric.compute() for metric in scores.values()]
        torch.distributed.barrier()

    assert together(2, work) == [0, 0]


def test_what_failed_first_is_what_is_told():
    """And not the communication that failed as it was handled."""
    lost = RuntimeError(
        "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
    )
    with pytest.raises(RuntimeError) as caught:
        try:
            raise InputError("the disk is full")
        except InputError:
            raise lost  # noqa: B904
    assert isinstance(cause(caught.value), InputError) and cause(InputError("a")).args == ("a",)
    alone = RuntimeError("Connection closed by peer")
    assert cause(alone) is alone


# -------------------------------------------------------------------------------------------- turns
def test_a_turn_is_taken_by_one_and_ends_with_it(tmp_path):
    lock = tmp_path / "a/b.lock"
    with locked(lock) as mine, locked(lock, wait=False) as other:
        assert mine and not other
    with locked(lock, wait=False) as mine:
        assert mine
    (tmp_path / "file").touch()
    with locked(tmp_path / "file/b.lock") as mine:  # where there can be no lock
        assert mine
