"""`fedkseed compare`: methods x seeds from one file, each with its learning rate from a grid and its shuffled control."""

from fedkseed.comparison.plan import Comparison, Entry, read_comparison
from fedkseed.comparison.report import HEADER, Report, write_report
from fedkseed.comparison.trials import carry_out

__all__ = ["HEADER", "Comparison", "Entry", "Report", "carry_out", "read_comparison", "write_report"]
