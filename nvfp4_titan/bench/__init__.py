"""Speed: what scripts/bench_*.py measure, and the rows they write."""

from .rows import BenchRow, Environment, print_table, ratios, write
from .timing import measure, require_gpu

__all__ = [
    "BenchRow",
    "Environment",
    "measure",
    "print_table",
    "ratios",
    "require_gpu",
    "write",
]
