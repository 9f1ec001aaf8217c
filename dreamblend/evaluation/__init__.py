"""Scores of what a blend drew."""
