"""From photos to snapshots."""
