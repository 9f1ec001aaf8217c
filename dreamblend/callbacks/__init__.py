"""Lightning callbacks."""

from dreamblend.callbacks.averaging import WeightEMA
from dreamblend.callbacks.preview import Preview
from dreamblend.callbacks.probe import Probe
from dreamblend.callbacks.report import BlendReport
from dreamblend.callbacks.resume import ResumeState
from dreamblend.callbacks.snapshots import SnapshotCheckpoint
from dreamblend.callbacks.writer import BlendWriter

__all__ = [
    "BlendReport",
    "BlendWriter",
    "Preview",
    "Probe",
    "ResumeState",
    "SnapshotCheckpoint",
    "WeightEMA",
]
