"""What a backend is: a frozen record of the operations that the autograd function calls.

A backend is right when its codes and scales equal the oracle's. All operations are functional and
opaque to torch.compile; none takes a layer's name, so that q, k, v share one quantized input.

With `offs` ((E,) int32 cumulative group ends) an operation is grouped: row operands are (M, ...)
with one amax per group, weights (E, N, ...) with one per expert, and operands whose contraction
runs over tokens are padded group by group (numerics/grouped.py). offs stays on its device and is
not read.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from ..formats import NVFP4
from ..numerics import QuantizedOperand
from ..recipe import GEMMS, OperandFormat

Operands = tuple[QuantizedOperand | None, QuantizedOperand | None]


def stream(gemm: str, side: str) -> int:
    """Number of a GEMM's operand in SR counters.

    Args:
        gemm: "fprop", "dgrad" or "wgrad".
        side: "left" or "right".
    """
    return 2 * GEMMS.index(gemm) + ("left", "right").index(side)


@dataclass(frozen=True)
class OperandUse:
    """One use of a tensor in a GEMM.

    Attributes:
        format: How it is quantized.
        stream: Its SR stream.
        packed: Whether codes and block scales are wanted: to keep, or to look at.
        values: Whether a GEMM follows at once. A backend that multiplies something else than codes
            then writes that, and may leave out what `packed` does not ask for; others ignore both.
    """

    format: OperandFormat
    stream: int
    packed: bool = True
    values: bool = False


def streams_and_key(
    rows: OperandUse | None, cols: OperandUse | None, key: torch.Tensor | None
) -> tuple[list[int], torch.Tensor | None]:
    """SR streams of two uses, 0 for None, and the layer's key if one of them needs it.

    Without the key, calls on one tensor are the same call: compilers merge them.
    """
    uses = (rows, cols)
    keyed = any(use and use.format.rounding == "sr" for use in uses)
    return [use.stream if use else 0 for use in uses], key if keyed else None


def key_on(key: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """An SR key where kernels of a device can read it; a copy made for that is kept."""
    return key if key is None or key.device == device else _key_copy(int(key), device)


@lru_cache(maxsize=4096)
def _key_copy(key: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(key, dtype=torch.int64, device=device)


def any_scaled(*uses: OperandUse | None) -> bool:
    """Whether any use has a scale per tensor, and so needs an amax."""
    return any(use and use.format.format.tensor_scale for use in uses)


class Unavailable(Protocol):
    """Tells whether a backend runs here."""

    def __call__(self, device: str | None = None) -> str | None:
        """None where it can run, else the reason why not.

        Args:
            device: Type of the device that holds the tensors; None: the machine's best.
        """


class Quantize(Protocol):
    """Quantizes one tensor for up to two GEMMs in one go."""

    def __call__(
        self,
        t: torch.Tensor,
        rows: OperandUse | None,
        cols: OperandUse | None,
        key: torch.Tensor | None = None,
        offs: torch.Tensor | None = None,
        amax: torch.Tensor | None = None,
        offset: tuple[int, int] = (0, 0),
    ) -> Operands:
        """Quantize t for the given uses.

        Args:
            t: (M, K) activations, gradients or weights; (E, N, K) expert weights.
            rows: Use of t with the contraction along K (its last dim), or None.
            cols: Use of t.T, with the contraction along the dim before, or None.
            key: int64 scalar, the layer's SR key.
            offs: Group ends, for grouped activations and gradients.
            amax: None, or fp32 amaxes of the two uses, reduced over ranks that share t: (2,), or
                (2, E) where t is grouped. Not read for formats without a scale per tensor.
            offset: Global (row, column) of t's first element (of each expert's), where t is a
                shard.
        """


class Amax(Protocol):
    """Amaxes alone, to be reduced over ranks before `Quantize`."""

    def __call__(
        self,
        t: torch.Tensor,
        rows: OperandUse | None,
        cols: OperandUse | None,
        offs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """fp32 (2,), or (2, E) where t is grouped: amaxes of the two uses.

        0 where a use is None, or its format has no scale per tensor.
        """


class MatMul(Protocol):
    """The fprop and dgrad GEMMs."""

    def __call__(
        self,
        a: QuantizedOperand,
        b: QuantizedOperand,
        columns: int,
        out_dtype: torch.dtype,
        b_transposed: bool = False,
        offs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(M, columns): a @ b.T of two operands of any two `formats`, with the contraction last.

        With `b_transposed`: a @ b, where b was quantized along its last dim in blocks that serve
        both. With `offs` b is (E, ...), and each group multiplies its own; rows of no group give 0.
        """


class WeightGrad(Protocol):
    """The wgrad GEMM."""

    def __call__(
        self,
        dy: QuantizedOperand,
        x: QuantizedOperand,
        out_dtype: torch.dtype,
        offs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(N, K): dy @ x.T of two operands with tokens last; (E, N, K) per group with offs."""


class Dequantize(Protocol):
    """What an operand with the contraction along its last dim stands for."""

    def __call__(
        self,
        operand: QuantizedOperand,
        dtype: torch.dtype,
        offs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(..., K) x_hat of `dtype`; with offs of tokens in groups, where rows of none are 0."""


class WeightShape(Protocol):
    """Reads a GEMM's size off a call of its op."""

    def __call__(self, *args, **kwargs) -> tuple[int, int]:
        """(K, N), the weight's shape as aten.mm takes it, of the op's arguments."""


@dataclass(frozen=True)
class GemmOp:
    """The custom op behind ungrouped `MatMul`: what selective checkpointing knows it by.

    Attributes:
        op: Its name with namespace (an OpOverload does not pickle).
        weight_shape: Reads (K, N) off its arguments.
    """

    op: str
    weight_shape: WeightShape


@dataclass(frozen=True)
class Backend:
    """Operations of a backend; the protocols above say what each takes and returns.

    `formats` are the names of the element formats that it quantizes and multiplies. Kernels read
    an SR key in memory (`key_on_device`), which CUDA graphs can hold; else a key that is on the CPU
    is read without waiting for anything.
    """

    name: str
    unavailable: Unavailable
    quantize: Quantize
    amax: Amax
    mm: MatMul
    wgrad: WeightGrad
    dequantize: Dequantize
    gemm: GemmOp
    formats: frozenset[str] = frozenset({NVFP4.name})
    key_on_device: bool = False
