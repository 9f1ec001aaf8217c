"""From a pair of snapshots and prompts to images."""
