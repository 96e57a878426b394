"""Comparing finished runs: what TensorBoard recorded, against a control."""

from .runs import Run, compare, read_run

__all__ = ["Run", "compare", "read_run"]
