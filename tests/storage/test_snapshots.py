"""The snapshot folder: whole or absent, verified when read, refused where it is damaged, foreign or
a pickle.
"""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from snapshot_folders import FILES, edit, write
from tiny_runs import contents

from dreamblend.blending.pair import Pair
from dreamblend.errors import InputError
from dreamblend.storage import snapshots
from dreamblend.storage.foreign import LORA, PEFT, PEFT_CONFIG, WORD
from dreamblend.storage.snapshots import ABOUT, Weights


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with the snapshots 5 and 20."""
    for step in (5, 20):
        write(tmp_path / "run" / "snapshots", step)
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------ writing
def test_what_is_written_is_read_back(tmp_path):
    path = write(tmp_path)
    assert path == tmp_path / "step-000005" and path in dict(snapshots.listing(tmp_path)).values()
    read = snapshots.read(path)
    assert (read.method, read.name, read.about.identifier, read.about.settings) == (
        "full",
        "5",
        "sks",
        {"learning_rate": 1e-3},
    )
    assert set(read.about.files) == set(FILES)
    saved = load_file(path / "unet/diffusion_pytorch_model.safetensors")
    assert torch.equal(saved["w"], torch.arange(4.0)) and saved["n"].item() == 3
    assert os.listdir(tmp_path) == ["step-000005"]


def test_the_weights_hash_tells_runs_apart(tmp_path):
    changed = FILES | {"unet/diffusion_pytorch_model.safetensors": Weights({"w": torch.zeros(4)})}
    same, other = write(tmp_path / "a"), write(tmp_path / "b", files=changed)
    again = write(tmp_path / "c", seed=9)
    assert (
        snapshots.read(same).weights
        == snapshots.read(again).weights
        != snapshots.read(other).weights
    )


@pytest.mark.parametrize(
    "culprit", ["os.rename", "dreamblend.storage.snapshots.save_file", "os.fsync"]
)
def test_an_interrupted_write_leaves_nothing(run, monkeypatch, culprit):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = contents(run)
    monkeypatch.setattr(culprit, full)
    with pytest.raises(InputError, match="step-000030.*No space left on device"):
        write(run / "snapshots", 30)
    assert contents(run) == before and sorted(os.listdir(run / "snapshots")) == [
        "step-000005",
        "step-000020",
    ]


def test_a_disk_that_takes_no_more_leaves_nothing(run):
    """Not patched: the system itself refuses files over 64 KiB, in the middle of the weights."""
    before, limit = contents(run), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limit[1]))
    try:
        with pytest.raises(InputError, match="step-000030"):
            write(
                run / "snapshots",
                30,
                {"unet/diffusion_pytorch_model.safetensors": Weights({"w": torch.zeros(10**6)})},
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(run) == before and sorted(os.listdir(run / "snapshots")) == [
        "step-000005",
        "step-000020",
    ]


def test_any_other_error_leaves_nothing_either(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(run / "snapshots", 30)
    assert sorted(os.listdir(run / "snapshots")) == ["step-000005", "step-000020"]


def test_what_a_killed_process_left_is_no_snapshot_and_is_swept(run):
    (run / "snapshots" / ".step-000030.part-123" / "unet").mkdir(parents=True)
    assert [step for step, _ in snapshots.find(run)] == [5, 20]
    snapshots.sweep(run / "snapshots")
    assert sorted(os.listdir(run / "snapshots")) == ["step-000005", "step-000020"]


def test_a_snapshot_is_never_overwritten(run):
    before = contents(run)
    with pytest.raises(InputError, match="step-000005 exists already"):
        write(run / "snapshots", 5, files={"unet/config.json": {"width": 8}})
    assert contents(run) == before


def test_a_root_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/snapshots/step-000005"):
        write(tmp_path / "file" / "snapshots")


# ------------------------------------------------------------------------------------- verification
def test_every_bit_of_snapshot_json_counts(tmp_path):
    """Also where JSON has two spellings of one value: 1e-05 and 1E-05, or the last digit of a long
    number.
    """
    snapshot = write(
        tmp_path,
        base="é",
        settings={"learning_rate": 1e-5, "decay": 0.1 + 0.2, "lr_warmup_steps": 10},
    )
    whole = (snapshot / ABOUT).read_bytes()
    spelled = [
        8 * whole.index(text) + bit
        for text in (b"1e-05", b"30000000000000004")
        for bit in range(8 * 17)
    ]
    for bit in (*range(0, 8 * len(whole), 11), *spelled):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (snapshot / ABOUT).write_bytes(data)
        with pytest.raises(InputError, match="snapshot.json (is damaged|has format)"):
            snapshots.read(snapshot)
    (snapshot / ABOUT).write_bytes(whole)
    assert snapshots.read(snapshot).about.settings["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.fp16.safetensors", ".hidden", "notes/readme.txt"]
)
def test_a_file_that_is_not_listed_is_refused_by_name(run, name):
    snapshot = run / "snapshots/step-000005"
    (snapshot / name).parent.mkdir(exist_ok=True)
    (snapshot / name).write_text("x")
    with pytest.raises(InputError, match=f"{name} is no file of the snapshot.*move it out"):
        snapshots.read(snapshot)


@pytest.mark.parametrize("name", [*FILES, ABOUT])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_one_flipped_byte_is_found_and_its_file_named(run, name, share):
    file = run / "snapshots/step-000005" / name
    data = bytearray(file.read_bytes())
    data[int(share * len(data))] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=name) as error:
        snapshots.read(file.parents[name.count("/")])
    assert "step-000005" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*FILES, ABOUT])
def test_a_missing_or_truncated_file_is_named(run, name):
    snapshot = run / "snapshots/step-000005"
    whole = (snapshot / name).read_bytes()
    (snapshot / name).write_bytes(whole[:-9])
    with pytest.raises(InputError, match=f"{name} is damaged"):
        snapshots.read(snapshot)
    (snapshot / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        snapshots.read(snapshot)


def test_a_folder_under_the_name_of_another_step_is_refused(run):
    (run / "snapshots/step-000005").rename(run / "snapshots/step-000010")
    with pytest.raises(
        InputError, match="step-000010 holds the snapshot of step 5: name it step-000005 again"
    ):
        snapshots.read(run / "snapshots/step-000010")
    (run / "snapshots/step-000010").rename(run / "mine")
    assert (
        snapshots.read(run / "mine").about.step == 5
    )  # a name that says no step says nothing wrong


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"format": 1}', '{"format": 1, "step": 5', "\udcff"]
)
def test_a_snapshot_json_that_is_none_is_named(run, text):
    (run / "snapshots/step-000005" / ABOUT).write_text(text, errors="surrogateescape")
    with pytest.raises(InputError, match=ABOUT):
        snapshots.read(run / "snapshots/step-000005")


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "5"},
        {"files": {"unet/config.json": 3}},
        {"files": {"unet/config.json": {}}},
        {"files": []},
    ],
)
def test_a_snapshot_json_of_other_types_is_damaged(run, changes):
    edit(run / "snapshots/step-000005", **changes)
    with pytest.raises(InputError, match="snapshot.json is damaged"):
        snapshots.read(run / "snapshots/step-000005")


def test_a_newer_format_asks_for_an_upgrade(run):
    edit(run / "snapshots/step-000005", format=2, new_field=1)
    with pytest.raises(InputError, match="format 2.*upgrade"):
        snapshots.read(run / "snapshots/step-000005")


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "unet/../../step-000020/unet/config.json"]
)
def test_files_outside_of_the_folder_are_refused(run, name):
    snapshot = run / "snapshots/step-000005"
    (run / "snapshots/outside").write_text("x")
    target = snapshot / name
    edit(
        snapshot, files={name: {"sha256": snapshots.sha256(target), "bytes": target.stat().st_size}}
    )
    with pytest.raises(InputError, match="not a file of the snapshot"):
        snapshots.read(snapshot)


@pytest.mark.parametrize("what", ["unet/config.json", "unet"])
def test_links_out_of_the_folder_are_refused(run, tmp_path, what):
    snapshot = run / "snapshots/step-000005"
    shutil.move(snapshot / what, tmp_path / "elsewhere")
    (snapshot / what).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="not a file of the snapshot"):
        snapshots.read(snapshot)


# ----------------------------------------------------------------------------------- made elsewhere
@pytest.mark.parametrize(
    "name", ["model.ckpt", "pytorch_lora_weights.bin", "model.pt", "model.pth"]
)
def test_pickles_are_refused_with_the_way_to_convert(tmp_path, name):
    torch.save({"lora": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(InputError, match=f"{name} is a pickle.*save_pretrained"):
        snapshots.read(tmp_path / name)


def test_a_folder_of_pickled_weights_is_refused_with_the_way_to_convert(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text("{}")
    torch.save({}, tmp_path / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(
        InputError, match="unet has no .safetensors weights: save it with safe_serialization=True"
    ):
        snapshots.read(tmp_path)


def test_other_things_are_no_snapshots(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "vae.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "empty").mkdir()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / LORA).write_bytes(b"\x08")
    for name, say in (
        ("vae.safetensors", "is no snapshot"),
        ("text.safetensors", "not a readable"),
        ("empty", "is no snapshot"),
        ("lora", LORA),
    ):
        with pytest.raises(InputError, match=say) as error:
            snapshots.read(tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(InputError, match="no snapshot at .*nowhere"):
        snapshots.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "key, kind",
    [
        ("lora_unet_mid_block.hada_w1_a", "LoHa"),
        ("lora_unet_mid_block.lokr_w1", "LoKr"),
        ("lora_unet_mid_block.lora_mid.weight", "LoCon adapter with a middle factor"),
        ("lora_unet_mid_block.oft_blocks", "OFT"),
        ("base_model.model.mid_block.boft_R", "OFT"),
        ("lora_unet_mid_block.a1.weight", "GLoRA"),
        ("lora_unet_mid_block.on_input", "IA"),
        ("base_model.model.mid_block.ia3_l", "IA"),
        ("lora_unet_mid_block.diff", "whole differences"),
    ],
)
def test_adapters_of_other_kinds_are_called_by_their_name(tmp_path, key, kind):
    save_file(
        {key: torch.zeros(2, 2), "lora_unet_conv_in.lora_down.weight": torch.zeros(2, 2)},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(
        InputError,
        match=(
            f"a.safetensors is an? .*{kind}.* only LoRA, LoCon and DoRA can be read: merge it into"
            " its base"
        ),
    ):
        snapshots.read(tmp_path / "a.safetensors")


def test_a_folder_of_two_kinds_is_refused_and_neither_left_out(tmp_path):
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(2, 2)}, tmp_path / LORA)
    save_file({"<sks>": torch.zeros(16)}, tmp_path / WORD)
    with pytest.raises(InputError, match=f"holds {LORA} and {WORD}.*name the file"):
        snapshots.read(tmp_path)
    assert (
        snapshots.read(tmp_path / LORA).method == "lora"
        and snapshots.read(tmp_path / WORD).method == "textual-inversion"
    )


def test_a_peft_adapter_of_pickled_weights_or_beside_whole_ones_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / PEFT_CONFIG).write_text("{}")
    (tmp_path / "unet/adapter_model.bin").touch()
    for path in (tmp_path, tmp_path / "unet"):
        with pytest.raises(
            InputError,
            match=(
                "unet is a peft adapter without adapter_model.safetensors.*safe_serialization=True"
            ),
        ):
            snapshots.read(path)
    save_file(
        {"base_model.model.conv_in.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "unet" / PEFT
    )
    assert snapshots.read(tmp_path).method == snapshots.read(tmp_path / "unet").method == "lora"
    (tmp_path / "unet/config.json").write_text("{}")
    with pytest.raises(InputError, match="a peft adapter and all weights"):
        snapshots.read(tmp_path)


# ----------------------------------------------------------------------------------------- choosing
def test_a_step_or_a_path_names_a_snapshot(run, monkeypatch):
    assert snapshots.resolve(run, "20") == run / "snapshots/step-000020"
    assert (
        snapshots.resolve(run, str(run / "snapshots/step-000005")) == run / "snapshots/step-000005"
    )
    assert (
        snapshots.resolve(None, str(run / "snapshots/step-000005")) == run / "snapshots/step-000005"
    )


@pytest.mark.parametrize(
    "which, say",
    [("400", "no snapshot at step 400: it has 5, 20"), ("nowhere/x", "neither a step nor a path")],
)
def test_an_unknown_step_lists_those_there(run, which, say):
    with pytest.raises(InputError, match=say):
        snapshots.resolve(run, which)


def test_a_step_needs_a_run(run, tmp_path):
    with pytest.raises(InputError, match="--run"):
        snapshots.resolve(None, "20")
    with pytest.raises(InputError, match="is not a run.*snapshots/"):
        snapshots.resolve(tmp_path, "20")
    (tmp_path / "new/snapshots").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no snapshot yet"):
        snapshots.resolve(tmp_path / "new", "20")


def test_the_listing_is_by_number(run):
    for step in (100, 1_000_000):
        write(run / "snapshots", step)
    (run / "snapshots/notes").mkdir()
    (run / "snapshots/step-7").touch()
    assert [step for step, _ in snapshots.find(run)] == [5, 20, 100, 1_000_000]


def test_a_pair_is_in_order(run):
    pair = Pair.find(run, "5", "20")
    assert (pair.early.name, pair.late.name) == ("5", "20")


@pytest.mark.parametrize(
    "early, late, say",
    [("5", "5", "same snapshot"), ("20", "5", "early is step 20 and late step 5: exchange them")],
)
def test_a_pair_of_one_or_out_of_order_is_refused(run, early, late, say):
    with pytest.raises(InputError, match=say):
        Pair.find(run, early, late)


def test_the_same_snapshot_by_another_path_is_the_same(run, tmp_path):
    (tmp_path / "link").symlink_to(run / "snapshots/step-000005")
    with pytest.raises(InputError, match="same snapshot"):
        Pair.find(run, "5", str(tmp_path / "link"))


@pytest.mark.parametrize(
    "change, say",
    [
        ({"base_hash": "cd", "base": "other"}, "different bases .sandbox and other"),
        ({"method": "lora"}, "full snapshot and late a lora"),
    ],
)
def test_a_pair_of_two_kinds_of_runs_is_refused(run, change, say):
    write(run / "snapshots", 30, **change)
    with pytest.raises(InputError, match=say):
        Pair.find(run, "5", "30")


def test_a_pair_with_a_damaged_half_is_refused(run):
    (run / "snapshots/step-000020/unet/config.json").write_text("{}")
    with pytest.raises(InputError, match="step-000020/unet/config.json is damaged"):
        Pair.find(run, "5", "20")
