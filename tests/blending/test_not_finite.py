"""NaN and infinity: training stops or skips and says where; a blend draws again in fp32, and leaves
out what is still not finite.
"""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from PIL import Image
from processes import together
from safetensors.torch import load_file
from tiny_runs import command, contents, fit, step

from blend import main
from dreamblend.callbacks import ResumeState
from dreamblend.callbacks.resume import NAME
from dreamblend.errors import InputError
from dreamblend.storage import snapshots
from dreamblend.storage.blend_folder import slug
from dreamblend.storage.snapshots import Weights
from dreamblend.training.finite import MOST_SKIPPED
from dreamblend.tuning import Full, LoRA

LORA_FILE = "pytorch_lora_weights.safetensors"


class Poison(L.Callback):
    """Latents of one photo that are not finite, as a VAE in half precision makes them."""

    def __init__(self, photo: int, value: float = torch.nan):
        self.photo, self.value = photo, value

    def on_train_start(self, trainer, module):
        module.latents[False][self.photo][0][0][0] = self.value


def finite(path: Path) -> bool:
    return all(torch.isfinite(v).all() for v in load_file(path).values())


# ----------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("value", [torch.nan, pytest.param(torch.inf, marks=pytest.mark.heavy)])
def test_training_stops_before_the_step_and_names_its_photos_and_goes_on_by_skipping(
    tiny_base, mug_photos, tmp_path, value
):
    photos = sorted(p.name for p in mug_photos.iterdir())
    options = dict(steps=[1, 8], callbacks=(Poison(2, value), ResumeState(every=1)))
    with pytest.raises(
        InputError,
        match=r"the loss of step \d is NaN or infinite \(photos: "
        + photos[2]
        + r"\).*model.on_nan",
    ) as stop:
        fit(tiny_base, mug_photos, tmp_path / "run", LoRA(rank=2), **options)
    before = contents(tmp_path / "run/snapshots")
    state = torch.load(tmp_path / "run" / NAME, weights_only=True)
    assert f"step {state['global_step'] + 1} " in str(stop.value) and finite(
        step(tmp_path / "run", 1) / LORA_FILE
    )
    with pytest.warns(UserWarning, match=f"photos: {photos[2]}.: it is skipped"):
        fit(
            tiny_base,
            mug_photos,
            tmp_path / "run",
            LoRA(rank=2),
            on_nan="skip",
            ckpt_path=tmp_path / "run" / NAME,
            **options,
        )
    assert (
        finite(step(tmp_path / "run", 8) / LORA_FILE)
        and before.items() <= contents(tmp_path / "run/snapshots").items()
    )
    with pytest.warns(UserWarning, match="it is skipped"):
        fit(tiny_base, mug_photos, tmp_path / "whole", LoRA(rank=2), on_nan="skip", **options)
    assert contents(tmp_path / "run/snapshots") == contents(tmp_path / "whole/snapshots")


def test_a_skipped_step_changes_no_weight(tiny_base, mug_photos, tmp_path):
    """Accumulated, averaged and with weight decay, which would move weights without a gradient."""
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(
                torch.cat(
                    [
                        p.detach().flatten().clone()
                        for p in module.trained.parameters()
                        if p.requires_grad
                    ]
                )
            )

    options = dict(on_nan="skip", weight_decay=0.5, trainer={"accumulate_grad_batches": 2})
    with pytest.warns(UserWarning, match="skipped"):
        fit(
            tiny_base,
            mug_photos,
            tmp_path,
            Full(),
            steps=[3],
            callbacks=(Poison(0), Look(), EMAWeightAveraging(decay=0.5)),
            **options,
        )
    moved = [not torch.equal(seen[i], seen[i + 2]) for i in (1, 3)]
    assert torch.isfinite(torch.stack(seen)).all() and True in moved and False in moved


def test_a_rate_that_blows_up_stops_and_does_not_skip_forever(tiny_base, mug_photos, tmp_path):
    with pytest.raises(
        InputError, match=r"of step \d is NaN or infinite .*lower model.learning_rate"
    ):
        fit(tiny_base, mug_photos, tmp_path / "stop", steps=[9], learning_rate=1e30)
    with (
        pytest.raises(InputError, match=f"as were the {MOST_SKIPPED} steps before it"),
        pytest.warns(UserWarning),
    ):
        fit(tiny_base, mug_photos, tmp_path / "skip", steps=[99], learning_rate=1e30, on_nan="skip")


def test_two_processes_agree(tiny_base, mug_photos, tmp_path):
    """The photo is one process's alone; both skip the same steps, and both stop."""

    def work(rank: int) -> None:
        options = dict(
            steps=[1, 4],
            learning_rate=1e-3,
            callbacks=(Poison(1),),
            trainer={"devices": 2, "strategy": "ddp"},
        )
        module = fit(
            tiny_base, mug_photos, tmp_path / "skip", LoRA(rank=2), on_nan="skip", **options
        )
        torch.save(
            [p.detach() for p in module.trained.parameters() if p.requires_grad],
            tmp_path / f"{rank}.pt",
        )
        try:
            fit(tiny_base, mug_photos, tmp_path / "stop", LoRA(rank=2), **options)
        except InputError as error:
            (tmp_path / f"{rank}.txt").write_text(str(error))

    assert together(2, work) == [0, 0]
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(p, q) and torch.isfinite(p).all() for p, q in zip(a, b, strict=True))
    said = {(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)}
    assert len(said) == 1 and sorted(p.name for p in mug_photos.iterdir())[1] in said.pop()


# ----------------------------------------------------------------------------------------- blending
def words(run: Path, out: Path, *more: object) -> list[object]:
    return [
        "predict",
        "--run",
        run,
        "--early",
        1,
        "--late",
        2,
        "--prompts",
        json.dumps(["a sks mug", "a sks mug on the beach"]),
        "--seeds",
        0,
        "--out",
        out,
        "--model.num_inference_steps",
        2,
        "--trainer.accelerator",
        "cpu",
        "--trainer.logger",
        "false",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.enable_model_summary",
        "false",
        "--trainer.enable_checkpointing",
        "false",
        *more,
    ]


@pytest.fixture(scope="module")
def run(tiny_base, mug_photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    fit(tiny_base, mug_photos, out, Full(text_encoder=True), steps=[1, 2], learning_rate=1e-3)
    return out


def spoilt(run: Path, out: Path, spoil) -> Path:
    """The same run, with another embedding of the word `beach` in its late snapshot."""
    from transformers import CLIPTokenizer

    from dreamblend.models import SANDBOX

    (beach,) = CLIPTokenizer.from_pretrained(SANDBOX / "tokenizer")(
        "beach", add_special_tokens=False
    ).input_ids
    for number in (1, 2):
        read = snapshots.read(step(run, number))
        weights = {
            name: Weights(load_file(read.path / name))
            for name in read.about.files
            if name.endswith(".safetensors")
        }
        files = weights | {
            name: json.loads((read.path / name).read_text())
            for name in read.about.files
            if name not in weights
        }
        if number == 2:
            (table,) = [
                v
                for k, v in files["text_encoder/model.safetensors"].tensors.items()
                if k.endswith("token_embedding.weight")
            ]
            table[beach] = spoil(table[beach])
        snapshots.write(out / "snapshots", read.about, files)
    return out


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_an_image_that_half_precision_cannot_hold_is_drawn_again_in_fp32(run, tmp_path):
    far = spoilt(run, tmp_path / "run", lambda row: row * 1e8)
    with pytest.warns(
        UserWarning,
        match="not finite in fp16, drawn again in fp32: 'a sks mug on the beach' with seed 0$",
    ):
        status, _, err = command(main, *words(far, tmp_path / "out", "--model.dtype", "fp16"))
    assert status == 0, err
    assert {(row["prompt"], row["dtype"]) for row in rows(tmp_path / "out")} == {
        ("a sks mug", "fp16"),
        ("a sks mug on the beach", "fp32"),
    }
    assert len(rows(tmp_path / "out")) == 6
    assert command(main, *words(far, tmp_path / "precise"))[0] == 0
    for image in (tmp_path / "precise/images" / slug("a sks mug on the beach")).iterdir():
        assert (
            Image.open(image).tobytes()
            == Image.open(tmp_path / "out" / image.relative_to(tmp_path / "precise")).tobytes()
        )
    before = contents(
        tmp_path / "out"
    )  # what was drawn in another dtype than was asked for is no reason to draw again, or to refuse
    assert (
        command(main, *words(far, tmp_path / "out", "--model.dtype", "fp16"))[0] == 0
        and contents(tmp_path / "out") == before
    )


def test_an_image_that_is_never_finite_is_left_out_and_told(run, tmp_path):
    far = spoilt(run, tmp_path / "run", lambda row: row * torch.nan)
    with pytest.warns(
        UserWarning, match="NaN or infinite in fp32 too, and left out: 'a sks mug on the beach'"
    ):
        status, _, err = command(main, *words(far, tmp_path / "out", "--model.dtype", "fp16"))
    assert (
        status == 2
        and "1 of 2 pairs gave NaN or infinite images" in err
        and "'a sks mug on the beach' with seed 0" in err
    ), err
    kinds = {(row["prompt"], row["kind"]) for row in rows(tmp_path / "out")}
    assert kinds == {("a sks mug", k) for k in ("early", "region", "late")} | {
        ("a sks mug on the beach", "early")
    }
    before = contents(tmp_path / "out")
    assert (
        command(main, *words(far, tmp_path / "out"))[0] == 2
        and contents(tmp_path / "out") == before
    )
    assert command(main, *words(run, tmp_path / "sound"))[0] == 0
    mug = f"images/{slug('a sks mug')}"
    assert {n.split("-")[1] for n in contents(tmp_path / "out" / mug)} == {
        n.split("-")[1] for n in contents(tmp_path / "sound" / mug)
    }
