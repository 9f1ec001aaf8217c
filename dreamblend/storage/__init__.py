"""What is on disk: photos, snapshots, and files that appear whole or not at all."""
