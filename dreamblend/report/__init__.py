"""The self-contained HTML reports: of a blend's output folder, and of a benchmark's."""

from .comparison import write_comparison
from .page import write_report

__all__ = ["write_comparison", "write_report"]
