"""The oracle: NVFP4 numerics in plain PyTorch on any device."""

from .hadamard import rht
from .keys import sr_key
from .layout import from_blocked, to_blocked
from .quantize import QuantizedOperand, dequantize, quantize

__all__ = [
    "QuantizedOperand",
    "dequantize",
    "from_blocked",
    "quantize",
    "rht",
    "sr_key",
    "to_blocked",
]
