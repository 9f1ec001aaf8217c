"""The short form of `python -m tests.robustness.faults`, on a tiny model."""

from __future__ import annotations

import random

import pytest

from tests.robustness import faults


@pytest.mark.heavy
def test_kills_full_disks_flipped_bits_and_lost_processes_leave_nothing_wrong(tiny_base, tmp_path):
    rows, wrong = faults.suite(tmp_path, str(tiny_base), kills=2, disks=1, flips=60, losses=1)
    assert not wrong and all(row["trials"] == row["as it should be"] for row in rows)
    assert {row["kind"]: row["trials"] for row in rows} == {
        "kill -9 in training": 2,
        "kill -9 in blending": 2,
        "full disk in training": 1,
        "full disk in blending": 1,
        "flipped bit": 60,
        "lost process": 1,
    }


def test_the_suite_sees_what_is_wrong(tiny_base, tmp_path, monkeypatch):
    """Snapshots that are not written in one go, and a check that sees no bit."""
    monkeypatch.setattr(faults.snapshots, "read", lambda path: path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x/weights").write_bytes(b"abc")
    with pytest.raises(faults.Wrong, match="is flipped, and nothing is said"):
        faults.flipped(tmp_path / "x", random.Random(0))
    work = faults.train_work(str(tiny_base), tmp_path)
    with pytest.raises(faults.Wrong, match="not what an undisturbed run writes"):
        (tmp_path / "out/snapshots/step-000001").mkdir(parents=True)
        (tmp_path / "out/snapshots/step-000001/x.safetensors").write_bytes(b"half")
        faults.again(
            work,
            tmp_path / "out",
            tmp_path / "log",
            {"snapshots/step-000001/x.safetensors": b"whole"},
        )
