"""Lightning callbacks."""

from callbacks.snapshots import SnapshotCheckpoint
from callbacks.writer import BlendWriter

__all__ = ["BlendWriter", "SnapshotCheckpoint"]
