"""The self-contained HTML reports: of a blend's output folder, and of a benchmark's."""

from dreamblend.report.comparison import beside, write_comparison
from dreamblend.report.page import write_report

__all__ = ["beside", "write_comparison", "write_report"]
