"""Which two snapshots of a run to blend, by measurement."""
