"""The self-contained HTML report of a blend's output folder."""

from .page import write_report

__all__ = ["write_report"]
