"""The commands, one module each. Only the one that is asked for is imported."""
