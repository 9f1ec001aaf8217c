"""Lightning callbacks."""

from callbacks.averaging import WeightEMA
from callbacks.preview import Preview
from callbacks.probe import Probe
from callbacks.report import BlendReport
from callbacks.resume import ResumeState
from callbacks.snapshots import SnapshotCheckpoint
from callbacks.writer import BlendWriter

__all__ = [
    "BlendReport",
    "BlendWriter",
    "Preview",
    "Probe",
    "ResumeState",
    "SnapshotCheckpoint",
    "WeightEMA",
]
