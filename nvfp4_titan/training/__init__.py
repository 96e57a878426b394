"""Training: autograd functions, modules and conversion of models."""

from .convert import convert
from .grouped import grouped_mm
from .linear import NVFP4Linear, key_tensor, linear
from .report import Entry, Report
from .weights import (
    invalidate_weights,
    keep_no_codes,
    refresh_weights,
    track_weights,
    untrack_weights,
)

__all__ = [
    "Entry",
    "NVFP4Linear",
    "Report",
    "convert",
    "grouped_mm",
    "invalidate_weights",
    "keep_no_codes",
    "key_tensor",
    "linear",
    "refresh_weights",
    "track_weights",
    "untrack_weights",
]
