"""The command line: options and --config files, `~`, rates by base, and one sentence for whatever
goes wrong.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny_runs import command, fit_words, step

from dreamblend.__main__ import COMMANDS
from dreamblend.cli import DEBUG, entry
from dreamblend.commands.help import show
from dreamblend.errors import InputError, is_lost_process
from dreamblend.models import SHIPPED
from dreamblend.options import RECIPES, arranged, home
from dreamblend.storage import snapshots
from dreamblend.training.module import Tuner
from dreamblend.tuning import METHODS, CustomDiffusion, Full, LoRA, TextualInversion, TLoRA
from train import main

ROOT = Path(__file__).resolve().parents[2]


def warned(recorded) -> list[str]:
    return [str(w.message) for w in recorded]


# ----------------------------------------------------------------------------- the order of options
@pytest.mark.parametrize(
    "words, expected",
    [
        (
            ["fit", "--model.base", "X", "--config", "a.yaml"],
            ["fit", "--config", "a.yaml", "--model.base", "X"],
        ),
        (
            ["fit", "--config=a.yaml", "--x", "1", "-c", "b.yaml"],
            ["fit", "--config", "a.yaml", "--config", "b.yaml", "--x", "1"],
        ),
        (["--x", "1", "--config", "a.yaml"], ["--config", "a.yaml", "--x", "1"]),  # no subcommand
        (
            ["fit", "--x", "-1", "--config"],
            ["fit", "--config", "--x", "-1"],
        ),  # the parser tells what is missing
        (
            ["fit", "--trainer.callbacks+", "A", "--trainer.callbacks.x", "1"],
            ["fit", "--trainer.callbacks+", "A", "--trainer.callbacks.x", "1"],
        ),
    ],
)
def test_files_come_before_options_and_nothing_else_moves(words, expected):
    assert arranged(words) == expected


def test_an_option_wins_over_files_wherever_it_stands(tiny_base, mug_photos, tmp_path):
    for name, rank in (("a", 2), ("b", 3)):
        (tmp_path / f"{name}.yaml").write_text(
            "model:\n  base: sandbox\n  rate: 9.0\n  tuning:\n    class_path: LoRA\n   "
            f" init_args:\n      rank: {rank}\n"
        )
    line = fit_words(tiny_base, mug_photos, tmp_path / "run", "--model.learning_rate", 1e-4)
    status, _, err = command(
        main, *line, "--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml"
    )
    assert status == 0, err
    about = snapshots.read(step(tmp_path / "run", 2)).about
    assert (about.base, about.settings["learning_rate"], about.settings["tuning"]["rank"]) == (
        str(tiny_base),
        1e-4,
        3,
    )  # the later file wins over the earlier


@pytest.mark.parametrize(
    "words, said",
    [
        (["--seeds", "0", "--seeds", "1"], ["--seeds is given 2 times, and the last one counts"]),
        (
            ["--prompts", "a", "--prompts=b"],
            [
                "--prompts is given 2 times, and the last one counts; several are one option:"
                ' --prompts \'["...", "..."]\''
            ],
        ),
        (["--seeds", "0", "--seed", "1"], []),
        (["--prompts", "a", "--prompts+", "b", "--prompts+", "c"], []),
        (["-c", "a", "-c", "b"], []),
        (
            [
                "--x.callbacks+",
                "A",
                "--x.callbacks.n",
                "1",
                "--x.callbacks+",
                "B",
                "--x.callbacks.n",
                "2",
            ],
            [],
        ),  # each of its own item
    ],
)
def test_an_option_that_is_given_twice_is_told(words, said):
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        arranged(words)
    assert warned(recorded) == said


# ------------------------------------------------------------------------------------------ folders
def test_the_home_folder_is_found_in_every_option(monkeypatch):
    monkeypatch.setenv("HOME", "/me")
    assert arranged(["fit", "--out=~/a", "--early", "~/b", "--config", "~/c", "~"]) == [
        "fit",
        "--config",
        "/me/c",
        "--out=/me/a",
        "--early",
        "/me/b",
        "/me",
    ]
    assert home({"a": ["~/x", Path("~/y")], "b": 1}) == {"a": ["/me/x", Path("/me/y")], "b": 1}
    for text in ("~ root", "a ~/b", "~root", "sks~/mug"):
        assert home(text) == text


def test_the_home_folder_is_found_in_files_too(tiny_base, mug_photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").symlink_to(mug_photos)
    (tmp_path / "x.yaml").write_text(
        "data:\n  instance_dir: ~/photos\n  class_images_dir: ~/prior\n  num_class_images: 1\nout:"
        " ~/run\n"
    )
    line = fit_words(tiny_base, mug_photos, tmp_path / "run")
    for option in ("--data.instance_dir", "--out"):
        del line[line.index(option) : line.index(option) + 2]
    status, _, err = command(main, *line, "--config=~/x.yaml")
    assert status == 0, err
    assert len(list((tmp_path / "prior").glob("*.png"))) == 1 and snapshots.read(
        step(tmp_path / "run", 2)
    )


def test_a_base_of_this_machine_is_kept_by_its_whole_path(tiny_base, monkeypatch):
    monkeypatch.chdir(tiny_base.parent)
    assert (
        Tuner(f"./{tiny_base.name}").base == Tuner(str(tiny_base)).base == str(tiny_base.resolve())
    )
    assert (Tuner("sandbox").base, Tuner("owner/name", base_config="owner/other").base_config) == (
        "sandbox",
        "owner/other",
    )


# -------------------------------------------------------------------------------------------- rates
@pytest.mark.parametrize(
    "tuning, sandbox, usual",
    [
        (Full(), 5e-4, 5e-6),
        (LoRA(), 2e-3, 1e-4),
        (TLoRA(), 2e-3, 1e-4),
        (CustomDiffusion(), 1e-3, 1e-5),
        (TextualInversion(), 5e-3, 5e-4),
    ],
)
def test_each_method_has_a_rate_for_the_sandbox_and_one_for_others(tuning, sandbox, usual):
    assert (
        Tuner("sandbox", tuning=tuning).learning_rate,
        Tuner("owner/name", tuning=tuning).learning_rate,
    ) == (
        sandbox,
        usual,
    )
    assert Tuner("owner/name", tuning=tuning, learning_rate=3e-4).learning_rate == 3e-4


def test_every_method_has_its_rates():
    assert all(set(method.rates) == {*SHIPPED, "usual"} for method in METHODS.values())
    assert not [
        path
        for path in (ROOT / "configs").glob("*.yaml")
        if re.search(r"^\s*rate:", path.read_text(), re.M)
    ]


def test_the_rate_that_was_chosen_is_said_and_kept(tiny_base, mug_photos, tmp_path, caplog):
    status, _, err = command(
        main,
        *fit_words(
            tiny_base,
            mug_photos,
            tmp_path,
            "--config",
            ROOT / "configs/train_lora.yaml",
            "--trainer.callbacks",
            "[]",
        ),
    )
    assert status == 0, err
    assert snapshots.read(step(tmp_path, 2)).about.settings["learning_rate"] == 1e-4
    with caplog.at_level("INFO"):
        Tuner("sandbox", tuning=LoRA())
    assert "learning rate 0.002, the usual one of lora" in caplog.text


@pytest.mark.parametrize(
    "base, rates, said",
    [
        (
            "owner/name",
            dict(learning_rate=2e-3),
            "model.learning_rate is 0.002, 20 times the usual 0.0001 of lora",
        ),
        ("owner/name", dict(learning_rate=1e-3), None),
        ("sandbox", dict(learning_rate=1.0), None),
        (
            "owner/name",
            dict(text_encoder_learning_rate=2e-3),
            "model.text_encoder_learning_rate is 0.002, 20 times",
        ),
    ],
)
def test_a_rate_far_above_the_usual_is_told(base, rates, said):
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        Tuner(base, tuning=LoRA(), **rates)
    assert len(warned(recorded)) == bool(said) and (not said or said in warned(recorded)[0])


# ------------------------------------------------------------------------------ wrong command lines
T = "--trainer."
EMA = "lightning.pytorch.callbacks.EMAWeightAveraging"
WRONG = {
    "a logger that is not installed": ([T + "logger", "WandbLogger"], "wandb"),
    "no such logger": ([T + "logger", "NoLogger"], "--trainer.logger: .*NoLogger"),
    "a callback that needs a logger": (
        [T + "callbacks", "LearningRateMonitor"],
        "LearningRateMonitor.*no logger",
    ),
    "no such callback": (
        [T + "callbacks", "lightning.pytorch.callbacks.Nothing"],
        "no attribute 'Nothing'",
    ),
    "a number as a callback": (
        [T + "callbacks", "[1]"],
        "--trainer.callbacks: .*Given value: \\[1\\]",
    ),
    "a callback's setting": ([T + "callbacks", EMA, T + "callbacks.decay", "7"], "decay value 7.0"),
    "a metric that is not there": (
        [T + "callbacks", "EarlyStopping", T + "callbacks.monitor", "x"],
        "metric `x` which is not available",
    ),
    "no such accelerator": ([T + "accelerator", "abacus"], "invalid accelerator name"),
    "TPUs": ([T + "accelerator", "tpu"], "torch_xla"),
    "no such precision": ([T + "precision", "17"], "--trainer.precision: .*bf16-mixed.*17"),
    "sharding on a CPU": ([T + "strategy", "fsdp"], "fsdp.*requires a GPU"),
    "no such strategy": ([T + "strategy", "nonsense"], "invalid strategy name"),
    "no devices": ([T + "devices", "0"], "devices='0'"),
    "a word as devices": ([T + "devices", "many"], "devices"),
    "no nodes": ([T + "num_nodes", "0"], "num_nodes.*0"),
    "no accumulation": ([T + "accumulate_grad_batches", "0"], "accumulate_grad_batches is 0"),
    "no batches": ([T + "limit_train_batches", "0"], "limit_train_batches is 0"),
    "clipping below zero": ([T + "gradient_clip_val", "-1"], "gradient_clip_val is -1"),
    "no such time": ([T + "max_time", "never"], "duration='never'"),
    "a word as a number": (
        ["--model.learning_rate", "fast"],
        "--model.learning_rate: Expected .*float.*fast",
    ),
    "an option that is half typed": (
        [T + "max_step", "2"],
        "unrecognized arguments: --trainer.max_step 2",
    ),
    "an option with a slip": (["--modl.rate", "1"], "unrecognized arguments: --modl.rate 1"),
    "a stray word": (["stray"], "unrecognized arguments: stray"),
    "no such method": (["--model.tuning", "Lora"], "--model.tuning: .*Lora"),
    "a method's setting with a slip": (
        ["--model.tuning", "LoRA", "--model.tuning.rnk", "3"],
        "'rnk' is not accepted",
    ),
    "no such file": (["--config", "{tmp}/none.yaml"], "{tmp}/none.yaml"),
    "a broken file": (["--config", "{tmp}/broken.yaml"], "parsing"),
    "a file with a slip": (["--config", "{tmp}/slip.yaml"], "'model.bse'"),
    "a seed below zero": (["--seed_everything", "-1"], "-1 is not in bounds"),
    "a file as --out": (["--out", "{tmp}/none"], "{tmp}/none.*--out"),
    "no such crop": (["--data.crop", "middle"], "crop is 'middle'.*top"),
}
if not torch.cuda.is_available():
    WRONG["a GPU where there is none"] = ([T + "accelerator", "gpu"], "gpu")


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_line_is_one_sentence_and_status_2(tiny_base, mug_photos, tmp_path, case):
    words, said = WRONG[case]
    (tmp_path / "broken.yaml").write_text("model: [\n")
    (tmp_path / "slip.yaml").write_text("model:\n  bse: x\n")
    (tmp_path / "none").touch()
    status, _, err = command(
        main,
        *fit_words(
            tiny_base, mug_photos, tmp_path / "run", *[w.format(tmp=tmp_path) for w in words]
        ),
    )
    assert status == 2 and re.search(said.format(tmp=re.escape(str(tmp_path))), err), err
    assert (
        err.startswith("error: ")
        and err.count("\n") == 1
        and len(err) < 600
        and "Subtypes" not in err
    ), err


# --------------------------------------------------------------------------------- recipes and help
def test_a_recipe_is_found_by_its_name_where_no_file_of_the_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(RECIPES / "train_lora.yaml")
    assert arranged(["fit", "--config", "train_lora.yaml"]) == ["fit", "--config", shipped]
    for name in ("x/train_lora.yaml", "no_such.yaml"):
        assert arranged(["fit", "--config", name]) == ["fit", "--config", name]
    (tmp_path / "train_lora.yaml").touch()
    assert arranged(["-c", "train_lora.yaml"]) == ["--config", "train_lora.yaml"]


def test_help_is_made_once_and_anew_where_anything_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def run():
        made.append(os.environ["COLUMNS"])
        print(f"help of {made[-1]} columns")
        raise SystemExit(0)

    for columns, times in (("80", 1), ("80", 1), ("100", 2)):
        monkeypatch.setenv("COLUMNS", columns)
        show("fit", run)
        assert capsys.readouterr().out == f"help of {columns} columns\n"
        assert len(made) == times


def test_the_commands_are_listed_and_a_wrong_one_is_told():
    status, said, _ = command(main, "--help")
    assert status == 0 and all(name in said for name in COMMANDS)
    status, _, err = command(main, "draw")
    assert status == 2 and "'draw' is no command" in err


def test_select_is_there_without_lightning():
    code = "import sys, dreamblend.__main__, dreamblend.commands.select; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not {"lightning", "torchmetrics", "transformers", "diffusers"} & set(done.stdout.split())


# ------------------------------------------------------------------------------- whatever is raised
def ended(error: Exception) -> tuple[int, str]:
    @entry
    def raises():
        raise error

    raises.__module__ = "raises"
    status, _, err = command(raises)
    return status, err


@pytest.mark.parametrize(
    "error, said",
    [
        (InputError("a sentence"), "a sentence"),
        (
            ModuleNotFoundError("No module named 'scipy'", name="scipy.stats"),
            "scipy is not installed: pip install scipy",
        ),
        (
            ImportError(
                "\nDPMSolverSDEScheduler requires the torchsde library\nbut it was not found: `pip"
                " install torchsde`"
            ),
            "a package is missing: DPMSolverSDE.*pip install torchsde",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "out of memory: lower data.batch_size.*2 GiB",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"
            ),
            "out of memory: lower data.batch_size",
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/y"), "/x/y: no space is left"),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x/y"),
            "/x/y: Permission denied: give a place",
        ),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/x/y"), "/x/y: No such file"),
    ],
)
def test_what_a_machine_or_a_library_says_is_one_sentence(error, said):
    status, err = ended(error)
    assert status == 2 and re.match(f"error: {said}", err) and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("no x"),
        AssertionError(),
        RuntimeError("shapes do not match"),
        KeyError("x"),
        ModuleNotFoundError("No module", name="dreamblend.x"),
        ImportError("cannot import name 'x' from 'y'", name="y"),
        RuntimeError(
            "[enforce fail at gloo/transport/tcp/pair.cc:460] op.preamble.length <= op.nbytes. 8"
            " vs 4"
        ),  # no process was lost
    ],
)
def test_a_fault_says_so_and_where_its_traceback_is(error):
    status, err = ended(error)
    assert (
        status == 1
        and err.count("\n") == 1
        and type(error).__name__ in err
        and "fault of dreamblend or of a library" in err
    ), err
    kept = Path(re.search(r"is in (\S+)$", err)[1])
    assert "Traceback" in kept.read_text() and "in raises" in kept.read_text()
    kept.unlink()


def test_the_traceback_is_printed_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv(DEBUG, "1")
    status, err = ended(InputError("a sentence"))
    assert status == 2 and err.startswith("Traceback") and err.endswith("\nerror: a sentence\n")


@pytest.mark.parametrize(
    "error, lost",
    [
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by"
                " peer [127.0.0.1]:3"
            ),
            True,
        ),
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out"
                " waiting 1800000ms for recv operation"
            ),
            True,
        ),
        (torch.distributed.DistNetworkError("The client socket has failed"), True),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp, remote process has exited or there was a"
                " network error"
            ),
            True,
        ),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp, invalid usage: Duplicate GPU detected"
            ),
            False,
        ),
        (RuntimeError("ProcessGroupGloo: Invalid scalar type"), False),
        (RuntimeError("no gloom"), False),
        (ValueError("gloo timed out"), False),
    ],
)
def test_only_a_lost_connection_is_a_lost_process(error, lost):
    assert is_lost_process(error) == lost
    if lost:
        status, err = ended(error)
        assert (
            status == 1 and "another process of this run was lost" in err and str(error)[:60] in err
        )
