"""A LoRA of any tool is trained on."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import command, fit, fit_words, predict, step

from dreamblend.errors import InputError
from dreamblend.models import load_backbone
from dreamblend.storage import snapshots
from dreamblend.tuning import LoRA, TLoRA, restore
from train import main

NAME = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def first(tiny_base, mug_photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("first")
    tuning = LoRA(rank=3, alpha=6, targets=["to_q", "to_v"], text_encoder=True)
    fit(tiny_base, mug_photos, out, tuning, steps=[2])
    return step(out, 2)


def drawn(base, folder):
    return predict(restore(snapshots.read(folder), load_backbone(str(base)), "x"))


def test_it_begins_where_the_file_ends_and_trains_its_layers(
    first, tiny_base, mug_photos, tmp_path
):
    still = fit(
        tiny_base,
        mug_photos,
        tmp_path / "still",
        LoRA(start=first),
        steps=[1],
        learning_rate=1e-12,
        weight_decay=0.0,
    )
    torch.testing.assert_close(
        drawn(tiny_base, first), drawn(tiny_base, step(tmp_path / "still", 1))
    )
    fit(tiny_base, mug_photos, tmp_path / "on", LoRA(rank=3, start=first), steps=[1])
    before, after = (load_file(folder / NAME) for folder in (first, step(tmp_path / "on", 1)))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[key], after[key]) for key in before)
    about = snapshots.read(step(tmp_path / "on", 1)).about
    tuning = about.settings["tuning"]
    assert (tuning["rank"], tuning["alpha"], tuning["text_encoder"]) == (3, 6, True)
    assert tuning["start"] == snapshots.Snapshot(first, "lora").weights
    assert still.tuning.settings == tuning
    assert "start" not in LoRA().settings


def test_a_file_of_kohya_gives_rank_and_alpha(tiny_base, mug_photos, tmp_path):
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    weight = load_backbone(str(tiny_base)).denoiser.mid_block.attentions[0]
    rows, columns = weight.transformer_blocks[0].attn2.to_k.weight.shape
    tensors = {
        f"{layer}.lora_down.weight": torch.randn(2, columns),
        f"{layer}.lora_up.weight": torch.randn(rows, 2),
        f"{layer}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "kohya.safetensors")
    words = ["--model.tuning", "LoRA", "--model.tuning.start", tmp_path / "kohya.safetensors"]
    run = tmp_path / "run"
    status, _, err = command(main, *fit_words(tiny_base, mug_photos, run, *words))
    assert (status, err) == (0, "")
    written = load_file(step(run, 1) / NAME)
    assert len(written) == 2 and all("mid_block" in key for key in written)
    about = json.loads((step(run, 1) / "snapshot.json").read_text())
    assert (about["settings"]["tuning"]["rank"], about["settings"]["tuning"]["alpha"]) == (2, 1.0)
    more = fit_words(tiny_base, mug_photos, run, *words, "--model.tuning.rank", 4)
    status, _, err = command(main, *more, "--out", tmp_path / "other")
    assert status == 2 and "model.tuning.rank is 4, and that of model.tuning.start" in err


def test_what_cannot_be_a_start_is_said(first, tiny_base, mug_photos, tmp_path):
    with pytest.raises(InputError, match="start .*none does not exist: name a LoRA file"):
        LoRA(start=tmp_path / "none")
    with pytest.raises(InputError, match="model.tuning.alpha is that of the file"):
        LoRA(start=first, alpha=2.0)
    fit(tiny_base, mug_photos, tmp_path / "t", TLoRA(rank=2), steps=[1])
    with pytest.raises(InputError, match="of the method t-lora, and lora trains"):
        start = LoRA(start=step(tmp_path / "t", 1))
        fit(tiny_base, mug_photos, tmp_path / "u", start, steps=[1])
