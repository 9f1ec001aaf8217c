"""`blend.py predict` on tiny runs: what it writes, that a rerun does what is missing and nothing
else, and how it refuses.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import save_tiny_base
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import BLENDED as PROMPTS
from tiny_runs import blend_words, command, contents, fit, step

from blend import main
from dreamblend.blending.module import Blender
from dreamblend.storage import snapshots
from dreamblend.storage.blend_folder import CHUNK, image_path, maps_path, slug
from dreamblend.storage.snapshots import sha256
from dreamblend.tuning import Full, LoRA

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("early", "cag", "late")


@pytest.fixture(scope="module")
def run(tiny_base, mug_photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    fit(tiny_base, mug_photos, out, LoRA(rank=4), steps=[1, 3], learning_rate=3e-2)
    return out


def words(run: Path, out: Path, *more: object, config: Path | None = None) -> list[object]:
    """A guided blend of steps 1 and 3: two prompts with two seeds, twelve images in two batches."""
    guided = ("--model.blend", "CAG", "--data.batch_size", 2)
    return blend_words(run, out, *guided, *more, late=3, config=config)


@pytest.fixture(scope="module")
def blended(run, tmp_path_factory) -> Path:
    """The output of one blend. Not to be changed."""
    out = tmp_path_factory.mktemp("blend") / "out"
    status, _, err = command(main, *words(run, out))
    assert status == 0, err
    return out


def copied(blended: Path, tmp_path: Path) -> Path:
    return shutil.copytree(blended, tmp_path / "out")


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        name: ((folder / name).stat().st_mtime_ns, data) for name, data in contents(folder).items()
    }


# ---------------------------------------------------------------------------------- what is written
def test_every_image_has_its_maps_and_its_line(blended):
    expected = {f"images/{slug(p)}/{s}-{k}.png" for p in PROMPTS for s in (0, 1) for k in KINDS}
    assert (
        {str(p.relative_to(blended)) for p in blended.glob("images/*/*")}
        == expected
        == {row["file"] for row in rows(blended)}
    )
    for row in rows(blended):
        with Image.open(blended / row["file"]) as image:
            assert image.size == (32, 32) and image.mode == "RGB"
        maps = load_file(
            blended / row["file"].replace("images/", "maps/").replace(".png", ".safetensors")
        )["maps"]
        assert (
            maps.shape[1:] == (4, 4)
            and len(maps) == {"a sks mug": 2, "a sks mug on the beach": 3}[row["prompt"]]
        )
        assert torch.isfinite(maps).all() and (maps >= 0).all() and (maps.sum(0) <= 1 + 1e-5).all()


def test_the_png_says_what_its_line_says(blended):
    for row in rows(blended):
        with Image.open(blended / row["file"]) as image:
            said = json.loads(image.text[CHUNK])
        assert said == {k: v for k, v in row.items() if k not in ("file", "sha256", "scores")}
        assert row["sha256"] == sha256(blended / row["file"])
        assert (
            said["early"],
            said["late"],
            said["settings"]["num_inference_steps"],
            said["settings"]["blend"],
        ) == ("1", "3", 2, "cag")
        assert all(isinstance(v, float) for v in said["collapse"].values()) and (
            said["distance"] is None
        ) == (said["kind"] != "cag")


def test_images_have_the_size_that_is_asked_for(run, tmp_path):
    """And their maps, their record and the report follow."""
    out, size = tmp_path / "out", ("--model.height", 96, "--model.width", 64)
    config = ROOT / "configs/blend.yaml"  # with Region, and the report
    status, _, err = command(main, *blend_words(run, out, *size, late=3, config=config))
    assert status == 0, err
    for row in rows(out):
        assert row["settings"]["size"] == [96, 64] and row["settings"]["grid"] == 12
        with Image.open(out / row["file"]) as image:
            assert image.size == (64, 96)
        maps = load_file(maps_path(out, out / row["file"]))
        assert maps["maps"].shape[1:] == (12, 8)
    assert (out / "report.html").exists() and (out / "collapse.json").exists()


def test_lines_are_in_order_and_no_part_is_left(blended):
    def key(row):
        return (row["prompt"], row["seed"], row["kind"])

    assert [key(r) for r in rows(blended)] == sorted(key(r) for r in rows(blended))
    assert not [name for name in contents(blended) if "part" in name or "writable" in name]


def test_the_snapshots_differ_and_so_do_their_images(blended):
    by = {(r["prompt"], r["seed"], r["kind"]): r["sha256"] for r in rows(blended)}
    assert len(set(by.values())) == len(by)


# ------------------------------------------------------------------------------------------- reruns
def test_a_rerun_changes_no_file_and_draws_nothing(run, blended, tmp_path, monkeypatch):
    out = copied(blended, tmp_path)
    before = state(out)

    def refuse(*_):
        raise AssertionError("it draws")

    monkeypatch.setattr(Blender, "draw", refuse)
    status, _, err = command(main, *words(run, out))
    assert status == 0, err
    assert state(out) == before


@pytest.mark.parametrize("how", ["deleted", "truncated"])
def test_a_rerun_makes_exactly_what_is_missing_as_it_was(run, blended, tmp_path, how):
    out = copied(blended, tmp_path)
    before = state(out)
    gone = [f"images/{slug(PROMPTS[0])}/1-cag.png", f"images/{slug(PROMPTS[1])}/0-late.png"]
    for name in gone:
        (
            (out / name).unlink()
            if how == "deleted"
            else (out / name).write_bytes((out / name).read_bytes()[:-200])
        )
    status, _, err = command(main, *words(run, out))
    assert status == 0, err
    after = state(out)
    assert {name: data for name, (_, data) in after.items()} == {
        name: data for name, (_, data) in before.items()
    }
    images = [name for name in before if name.endswith(".png") and "/" in name]
    assert sorted(name for name in images if before[name][0] != after[name][0]) == sorted(gone)


def test_one_pair_alone_is_made_again_nearly_as_it_was(run, blended, tmp_path):
    """In a batch of one where it was of two: kernels of another batch size may round
    another way.
    """
    out = copied(blended, tmp_path)
    before = state(out)
    gone = [f"images/{slug(PROMPTS[0])}/0-{kind}.png" for kind in KINDS]
    for name in gone:
        (out / name).unlink()
    status, _, err = command(main, *words(run, out))
    assert status == 0, err
    after = state(out)
    assert sorted(
        name for name in before if name.endswith(".png") and before[name][0] != after[name][0]
    ) == sorted(gone)
    alike(blended, out)


def alike(a: Path, b: Path) -> None:
    """The same images to one level, the same measures to four digits."""
    for one, other in zip(rows(a), rows(b), strict=True):
        assert one["file"] == other["file"] and one["settings"] == other["settings"]
        assert one["collapse"] == pytest.approx(other["collapse"], rel=1e-4, abs=1e-5)
        assert one["distance"] == (
            other["distance"] and pytest.approx(other["distance"], rel=1e-3)
        )  # None where nothing was guided
        pixels = [
            torch.tensor(list(Image.open(out / one["file"]).tobytes()), dtype=torch.float)
            for out in (a, b)
        ]
        assert (pixels[0] - pixels[1]).abs().max() <= 1


def test_more_seeds_are_added_beside_the_old_ones(run, blended, tmp_path):
    out = copied(blended, tmp_path)
    before = state(out)
    status, _, err = command(main, *words(run, out, "--seeds", "1-2"))
    assert status == 0, err
    after = state(out)
    kept = [name for name in before if name != "results.jsonl"]
    assert all(after[name] == before[name] for name in kept)
    assert {row["seed"] for row in rows(out)} == {0, 1, 2} and len(rows(out)) == 18


def test_images_do_not_depend_on_the_batch_size(run, blended, tmp_path):
    status, _, err = command(main, *words(run, tmp_path / "one", "--data.batch_size", 3))
    assert status == 0, err
    alike(blended, tmp_path / "one")


@pytest.mark.parametrize(
    "more, say",
    [
        (["--model.num_inference_steps", "3"], "num_inference_steps 2"),
        (["--model.guidance_scale", "2"], "guidance_scale 4.0"),
        (["--model.blend", "Switch"], "blend cag"),
        (["--model.blend", "CAG", "--model.blend.strength", ".1"], "strength 0.5"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(run, blended, tmp_path, more, say):
    out = copied(blended, tmp_path)
    before = state(out)
    status, _, err = command(main, *words(run, out, *more))
    assert status == 2 and "made with other settings" in err and say in err and "--out" in err, err
    assert state(out) == before


def test_another_run_of_the_same_steps_is_refused(tiny_base, mug_photos, run, blended, tmp_path):
    """The steps are the same, the weights are not."""
    fit(
        tiny_base,
        mug_photos,
        tmp_path / "run",
        LoRA(rank=4),
        steps=[1, 3],
        learning_rate=3e-2,
        seed=1,
    )
    out = copied(blended, tmp_path)
    status, _, err = command(main, *words(tmp_path / "run", out))
    assert status == 2 and "made with other settings (early_weights" in err, err


@pytest.fixture(scope="module")
def elsewhere(run, tiny_base, tmp_path_factory) -> Path:
    """A base, two LoRA files that say nothing of themselves, and a blend of them. Each test changes
    a copy.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(tiny_base, folder / "base")
    for number in (1, 3):
        shutil.copy(
            step(run, number) / "pytorch_lora_weights.safetensors", folder / f"{number}.safetensors"
        )
    status, _, err = command(main, *made_elsewhere(run, folder))
    assert status == 0, err
    return folder


def made_elsewhere(run: Path, folder: Path, *more: object) -> list[object]:
    return words(
        run,
        folder / "out",
        "--early",
        folder / "1.safetensors",
        "--late",
        folder / "3.safetensors",
        "--model.base",
        folder / "base",
        "--model.identifier",
        "sks",
        "--model.class_noun",
        "mug",
        "--prompts",
        '["a sks mug"]',
        "--seeds",
        0,
        "--model.compare",
        "false",
        *more,
    )


def overwrite(path: Path) -> None:
    """Other values in a file of weights, of the same shapes."""
    save_file(
        {
            k: v + 0.01 * torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
            for k, v in load_file(path).items()
        },
        path,
        {"format": "pt"},
    )


def reschedule(folder: Path) -> None:
    path = folder / "base/scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_end": 0.02}))


CHANGES = {
    "early_weights": lambda folder: overwrite(folder / "1.safetensors"),
    "late_weights": lambda folder: overwrite(folder / "3.safetensors"),
    "base_weights": lambda folder: overwrite(
        folder / "base/vae/diffusion_pytorch_model.safetensors"
    ),
    "scheduler": reschedule,
    "dtype": ["--model.dtype", "bf16"],
    "identifier": ["--model.identifier", "ohwx", "--prompts", '["a sks mug"]'],
    "class_noun": ["--model.class_noun", "cup", "--prompts", '["a sks mug"]'],
    "num_inference_steps": ["--model.num_inference_steps", 3],
    "guidance_scale": ["--model.guidance_scale", 2],
    "grid": ["--model.grid", 8],
    "size": ["--model.width", 64],
    "attention_layers": ["--model.attention_layers", '["up_blocks.0"]'],
    "blend": ["--model.blend", "Merge"],
    "strength": ["--model.blend", "CAG", "--model.blend.strength", 0.1],
    "window": ["--model.blend", "CAG", "--model.blend.window", "[0, 1]"],
    "repeats": ["--model.blend", "CAG", "--model.blend.repeats", 2],
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_an_image_is_noticed_and_named_with_old_and_new(
    run, elsewhere, tmp_path, name
):
    folder, change = Path(shutil.copytree(elsewhere, tmp_path / "copy")), CHANGES[name]
    if callable(change):
        change(folder)
    before = state(folder / "out")
    status, _, err = command(
        main, *made_elsewhere(run, folder, *([] if callable(change) else change))
    )
    assert (
        status == 2
        and err.count("\n") == 1
        and re.search(rf"other settings \(.*\b{name} .*, now ", err)
    ), err
    assert state(folder / "out") == before


def test_every_part_of_the_provenance_is_tried_above(elsewhere):
    """But the names: what they name is in the weights' hashes."""
    told = {*CHANGES, "early", "late", "base"} - {"attention_layers"}  # told where some are named
    assert set(rows(elsewhere / "out")[0]["settings"]) == told


def test_the_same_weights_by_another_name_are_the_same(run, elsewhere, tmp_path, monkeypatch):
    """The folder was moved, and is named by relative paths."""
    folder = Path(shutil.copytree(elsewhere, tmp_path / "copy"))
    before = state(folder / "out")
    monkeypatch.chdir(folder)
    status, _, err = command(main, *made_elsewhere(run, Path(".")))
    assert status == 0 and state(folder / "out") == before, err


def test_a_trainers_checkpoint_is_told_by_what_is_read_of_it(run, tmp_path):
    """And not by its optimizer."""
    folder = tmp_path / "checkpoint-100"
    folder.mkdir()
    shutil.copy(step(run, 1) / "pytorch_lora_weights.safetensors", folder)
    first = snapshots.read(folder).weights
    (folder / "optimizer.bin").write_bytes(b"1")
    assert snapshots.read(folder).weights == first
    overwrite(folder / "pytorch_lora_weights.safetensors")
    assert snapshots.read(folder).weights != first


class Interrupt(L.Callback):
    """Ctrl-C after the first batch."""

    def on_predict_batch_end(self, *_):
        raise KeyboardInterrupt


def test_an_interrupted_blend_leaves_whole_files_and_goes_on(run, blended, tmp_path):
    out = tmp_path / "out"
    callbacks = [
        "--trainer.callbacks",
        "callbacks.BlendWriter",
        "--trainer.callbacks+",
        "test_blend_cli.Interrupt",
    ]
    status, _, err = command(main, *words(run, out, *callbacks))
    assert status == 130 and "interrupted" in err and err.count("\n") == 1, err
    there = contents(out)
    whole = contents(blended)
    images = [name for name in there if name.endswith(".png")]
    assert len(images) == 6 and not [name for name in there if "part" in name]
    assert all(there[name] == whole[name] for name in there if name != "results.jsonl")
    assert {row["file"] for row in rows(out)} == set(images)
    status, _, err = command(main, *words(run, out))
    assert status == 0, err
    assert contents(out) == whole


def test_a_full_pair_and_prompts_from_a_file(tiny_base, mug_photos, tmp_path):
    fit(
        tiny_base, mug_photos, tmp_path / "run", Full(text_encoder=True), steps=[1, 3], dtype="fp16"
    )
    (tmp_path / "prompts.txt").write_text("# two\n\na {subject}\na  {subject} in the snow\n")
    status, _, err = command(
        main,
        *words(
            tmp_path / "run",
            tmp_path / "out",
            "--prompts",
            tmp_path / "prompts.txt",
            "--seeds",
            "5",
        ),
    )
    assert status == 0, err
    assert {row["prompt"] for row in rows(tmp_path / "out")} == {
        "a sks mug",
        "a sks mug in the snow",
    } and len(rows(tmp_path / "out")) == 6


def test_a_pair_made_elsewhere_says_nothing_and_is_told(tiny_base, run, tmp_path):
    """A LoRA file has no base, identifier or class noun: each is asked for by name."""
    for number in (1, 3):
        (tmp_path / f"{number}.safetensors").write_bytes(
            (step(run, number) / "pytorch_lora_weights.safetensors").read_bytes()
        )
    pair = ["--early", tmp_path / "1.safetensors", "--late", tmp_path / "3.safetensors"]
    told = ["--model.base", tiny_base, "--model.identifier", "sks", "--model.class_noun", "mug"]
    for known in (0, 2, 4):
        status, _, err = command(main, *words(run, tmp_path / "out", *pair, *told[:known]))
        assert status == 2 and told[known] in err, err
    status, _, err = command(
        main,
        *words(run, tmp_path / "out", *pair, *told, "--prompts", '["a sks mug"]', "--seeds", 0),
    )
    assert status == 0, err
    assert len(rows(tmp_path / "out")) == 3


def test_the_recipe_writes_its_report_and_a_rerun_leaves_it(run, tmp_path):
    one = ("--seeds", "0", "--prompts", '["a sks mug"]')
    recipe = words(run, tmp_path / "out", *one, config=ROOT / "configs/blend.yaml")
    status, _, err = command(main, *recipe)
    assert status == 0, err
    before = state(tmp_path / "out")
    assert "report.html" in before and len(rows(tmp_path / "out")) == 3
    status, _, err = command(main, *recipe)
    assert status == 0, err
    after = state(tmp_path / "out")
    assert [name for name in before if after[name] != before[name]] == []


def test_images_are_not_kept_in_memory(run, blended, monkeypatch):
    kept = []
    really = L.Trainer.predict

    def watch(self, *args, **kwargs):
        kept.append(really(self, *args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(L.Trainer, "predict", watch)
    assert command(main, *words(run, blended.parent / "memory", "--seeds", 0))[0] == 0
    assert kept == [None]


# ----------------------------------------------------------------------------------------- refusals
WRONG = {
    "no prompts": (["--prompts", "[]"], "there are no prompts"),
    "blank prompts": (["--prompts", '[" "]'], "there are no prompts"),
    "prompt file": (["--prompts", "{tmp}/none.txt"], "{tmp}/none.txt"),
    "empty prompt file": (["--prompts", "{tmp}/blank.txt"], "there are no prompts"),
    "seeds": (["--seeds", "3-1"], "seeds '3-1'"),
    "no seeds": (["--seeds", "x"], "seeds 'x'"),
    "step": (["--late", "400"], "no snapshot at step 400: it has 1, 3"),
    "path": (["--late", "{tmp}/nowhere"], "{tmp}/nowhere"),
    "same": (["--late", "1"], "same snapshot"),
    "order": (["--early", "3", "--late", "1"], "exchange them"),
    "run": (["--run", "{tmp}"], "{tmp} is not a run"),
    "pickle": (["--late", "{tmp}/lora.bin"], "{tmp}/lora.bin is a pickle"),
    "damaged": (["--late", "{tmp}/step-000003"], "pytorch_lora_weights.safetensors is damaged"),
    "out": (["--out", "{tmp}/file/out"], "{tmp}/file/out"),
    "base": (["--model.base", "{tmp}/other"], "--model.base"),
    "no base": (["--model.base", "{tmp}/nowhere"], "{tmp}/nowhere"),
    "inference mode": (["--trainer.inference_mode", "true"], "trainer.inference_mode"),
    "grid": (["--model.grid", "7"], "grid 7"),
    "layers": (["--model.attention_layers", '["up_blocks.7"]'], "no attention layer 'up_blocks.7'"),
    "height": (["--model.height", "60"], "model.height is 60"),
    "steps": (["--model.num_inference_steps", "0"], "model.num_inference_steps is 0"),
    "batch": (["--data.batch_size", "0"], "data.batch_size is 0"),
    "strength": (["--model.blend", "CAG", "--model.blend.strength", "-1"], "strength is -1"),
}


@pytest.fixture(scope="module")
def wrongs(run, tmp_path_factory) -> Path:
    """What the wrong inputs name."""
    tmp = tmp_path_factory.mktemp("wrong")
    save_tiny_base(tmp / "other", seed=9)
    shutil.copytree(step(run, 3), tmp / "step-000003")
    weights = tmp / "step-000003/pytorch_lora_weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (tmp / "file").touch()
    (tmp / "blank.txt").write_text("\n# nothing\n")
    torch.save({}, tmp / "lora.bin")
    return tmp


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_sentence_and_status_2(run, wrongs, tmp_path, case):
    more, say = WRONG[case]
    status, _, err = command(
        main, *words(run, tmp_path / "out", *[w.format(tmp=wrongs) for w in more])
    )
    assert status == 2 and say.format(tmp=wrongs) in err, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert not list((tmp_path / "out").glob("images/*/*"))


def test_a_wrong_input_in_its_own_process(run, tmp_path):
    """Nothing else on stderr: no traceback, no library's notices."""
    line = [sys.executable, ROOT / "blend.py", *map(str, blend_words(run, tmp_path, late=400))]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and "it has 1, 3" in done.stderr


def test_a_missing_option_is_named(run):
    status, _, err = command(main, "predict", "--run", run, "--early", 1, "--prompts", '["a"]')
    assert status == 2 and "late" in err


def test_help_lists_the_main_options():
    status, out, _ = command(main, "--help")
    assert status == 0 and "predict" in out
    status, out, _ = command(main, "predict", "--help")
    assert status == 0
    for option in (
        "run early late prompts seeds out model.blend model.num_inference_steps"
        " model.guidance_scale data.batch_size"
    ).split():
        assert f"--{option}" in out, option
    assert "--ckpt_path" not in out


@pytest.mark.parametrize(
    "config",
    sorted(p for p in (ROOT / "configs").glob("*.yaml") if not p.name.startswith("train")),
    ids=lambda p: p.stem,
)
def test_every_blending_recipe_parses(config, run):
    given = ["--run", run, "--early", 1, "--late", 3, "--prompts", '["a {subject}"]']
    status, out, err = command(main, "predict", "--config", config, *given, "--print_config")
    assert status == 0 and "blend" in out, err


def test_the_writer_names_folders_by_prompt():
    assert slug("A sks mug, on the beach!").startswith("a-sks-mug-on-the-beach-") and slug(
        "a b"
    ) != slug("a  b")
    assert (
        slug("日本").startswith("prompt-")
        and "/" not in slug("../../etc")
        and len(slug("word " * 100)) < 80
    )
    assert image_path(Path("o"), "a", 3, "cag") == Path("o/images") / slug("a") / "3-cag.png"
