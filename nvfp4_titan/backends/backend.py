"""What a backend is: a frozen record of the operations that the autograd functions call.

A backend is right when its codes and scales equal the oracle's. All operations are functional and
opaque to torch.compile; none takes a layer's name, so that q, k, v share one quantized input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..numerics import QuantizedOperand
from ..recipe import OperandFormat

GEMMS = ("fprop", "dgrad", "wgrad")


def stream(gemm: str, side: str) -> int:
    """Number of a GEMM's operand in SR counters.

    Args:
        gemm: "fprop", "dgrad" or "wgrad".
        side: "left" or "right".
    """
    return 2 * GEMMS.index(gemm) + ("left", "right").index(side)


@dataclass(frozen=True)
class OperandUse:
    """One use of a tensor in a GEMM: its format and its SR stream."""

    format: OperandFormat
    stream: int


@dataclass(frozen=True)
class Backend:
    """Operations of a backend.

    Attributes:
        name: "reference", "triton" or "native".
        unavailable: () -> None where it can run here, else the reason.
        quantize: (t (M, K), rows, cols, key, amax, offset) -> (operand | None, operand | None).
            `rows` quantizes t with its contraction along K; `cols` quantizes t.T, contraction along
            M. Either use may be None. `amax` is None, or fp32 (2,): the amaxes of the two, reduced
            over the ranks that share t. `key` is an int64 CPU scalar (SR), `offset` the global
            (row, column) of t's first element.
        amax: (t, rows, cols) -> fp32 (2,), for reducing before `quantize`; 0 where a use is None.
        mm: (a, b, columns, out_dtype, b_transposed) -> (rows of a, columns). a @ b.T of two
            operands with the contraction last; with `b_transposed` a @ b, where b was quantized
            along its last dim in blocks that serve both.
    """

    name: str
    unavailable: Callable[[], str | None]
    quantize: Callable[
        [
            torch.Tensor,
            OperandUse | None,
            OperandUse | None,
            torch.Tensor | None,
            torch.Tensor | None,
            tuple[int, int],
        ],
        tuple[QuantizedOperand | None, QuantizedOperand | None],
    ]
    amax: Callable[[torch.Tensor, OperandUse | None, OperandUse | None], torch.Tensor]
    mm: Callable[[QuantizedOperand, QuantizedOperand, int, torch.dtype, bool], torch.Tensor]
