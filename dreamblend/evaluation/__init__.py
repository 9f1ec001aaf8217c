"""Fidelity, diversity, copying and collapse of what was drawn: `encoders` -> `metrics`, by a named
protocol of `protocols`; `scores` of a blend.
"""
