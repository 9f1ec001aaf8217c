"""Two processes and one folder: the second is refused before it touches anything; shards of a blend
share.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import blend_words, command, contents, fit, fit_words

import blend
import train
from dreamblend.errors import InputError
from dreamblend.storage.files import hold
from dreamblend.tuning import LoRA

ROOT = Path(__file__).resolve().parents[2]


def elsewhere(folder: Path, *share: int) -> subprocess.Popen:
    """Another process that holds a folder until it is killed."""
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from"
        " dreamblend.storage.files import hold\n"
    )
    code += (
        f"held = hold(Path({str(folder)!r}), *{share}); print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    return other


def ended(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_folder_is_held_by_one_and_freed_by_its_death(tmp_path):
    other = elsewhere(tmp_path)
    try:
        with pytest.raises(
            InputError, match="another process is writing into .*choose another --out"
        ):
            hold(tmp_path)
        for share in ((0, 3), (2, 3)):
            with pytest.raises(InputError, match="another process"):
                hold(tmp_path, *share)
    finally:
        ended(other)
    with hold(tmp_path):
        pass
    with hold(tmp_path, 1, 3), hold(tmp_path, 2, 3), hold(tmp_path, 0, 3):
        for share in ((1, 3), (0, 1), (1, 2), (0, 13)):
            with pytest.raises(InputError, match="another process"):
                hold(tmp_path, *share)
    with hold(tmp_path, 0, 2):
        pass


def test_a_second_training_is_refused_and_touches_nothing(tiny_base, mug_photos, tmp_path):
    """Not even what the first one has half written."""
    (tmp_path / "snapshots/.step-000001.part-1").mkdir(parents=True)
    (tmp_path / "snapshots/.step-000001.part-1/weights").write_text("half")
    (tmp_path / "config.yaml").write_text("the first one's")
    line = fit_words(tiny_base, mug_photos, tmp_path)
    with open(tmp_path / ".lock", "w") as other:  # as another process would
        fcntl.flock(other, fcntl.LOCK_EX)
        before = contents(tmp_path)
        status, _, err = command(train.main, *line)
        assert (
            status == 2
            and "another process is writing into" in err
            and contents(tmp_path) == before
        ), err
        with pytest.raises(InputError, match="another process"):
            fit(tiny_base, mug_photos, tmp_path, steps=[1])
        assert contents(tmp_path) == before
    fit(tiny_base, mug_photos, tmp_path, steps=[1])
    assert os.listdir(tmp_path / "snapshots") == ["step-000001"]


def test_a_second_blend_is_refused_and_another_shard_is_not(tiny_base, mug_photos, tmp_path):
    fit(tiny_base, mug_photos, tmp_path / "run", LoRA(rank=2), steps=[1, 2])
    out = tmp_path / "out"
    line = blend_words(
        tmp_path / "run",
        out,
        "--seeds",
        0,
        "--model.num_inference_steps",
        1,
        prompts=["a sks mug", "sks"],
    )
    out.mkdir()
    other = elsewhere(out, 0, 2)
    try:
        part = out / "images" / "x" / f".0-late.png.part-{other.pid}"
        part.parent.mkdir(parents=True)
        part.write_text("half")
        before = contents(out)
        for shard in ("0/1", "0/2", "1/3"):
            status, _, err = command(blend.main, *line, "--data.shard", shard)
            assert status == 2 and "another process is writing into" in err, err
        assert {k: v for k, v in contents(out).items() if ".lock" not in k} == {
            k: v for k, v in before.items() if ".lock" not in k
        }
        status, _, err = command(blend.main, *line, "--data.shard", "1/2")
        assert status == 0 and part.exists(), err
    finally:
        ended(other)
    assert (
        command(blend.main, *line)[0] == 0
        and len((out / "results.jsonl").read_text().splitlines()) == 6
    )
