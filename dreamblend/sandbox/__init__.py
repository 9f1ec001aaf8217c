"""A small world with its own base and judges, to try everything in minutes."""
