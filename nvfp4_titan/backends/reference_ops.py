"""The oracle behind custom ops: plain (ungrouped) operands and GEMMs.

The GEMM multiplies `lut[q] * S_b`, exact in bf16 and fp32, accumulates in fp32 and applies
alpha = (amax_a / 2688) * (amax_b / 2688) in fp32 before the output cast: the NVFP4 GEMM up to the
order of accumulation. On a CPU the operands are fp32 (bf16 is slow there), on a GPU bf16.

Formats travel as strings (`OperandFormat.parse`); "" stands for a use that nobody asked for.
"""

import torch

from ..formats import BLOCK
from ..numerics.philox import block_random_bytes
from ..numerics.quantize import (
    block_amaxes,
    block_indices,
    global_scale,
    prepare,
    quantize_blocks,
    scaled_values,
    tensor_amax,
)
from ..recipe import OperandFormat

FIVE_TENSORS = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes and scales of the row use, of the column use, and the amaxes of both."""

FLT_MIN = torch.finfo(torch.float32).tiny
FLT_MAX = torch.finfo(torch.float32).max


def no_operand(t: torch.Tensor) -> list[torch.Tensor]:
    """Codes and scales of a use that nobody asked for."""
    return [t.new_empty(0, dtype=dtype) for dtype in (torch.uint8, torch.float8_e4m3fn)]


def fake_operand(t: torch.Tensor, *shape: int) -> list[torch.Tensor]:
    """Codes and scales of an operand whose logical shape is (..., K)."""
    *outer, size = shape
    blocks = (size + BLOCK - 1) // BLOCK
    return [
        t.new_empty((*outer, blocks * BLOCK // 2), dtype=torch.uint8),
        t.new_empty((*outer, blocks), dtype=torch.float8_e4m3fn),
    ]


def _use(t: torch.Tensor, spec: str, transpose: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A prepared operand and its block amaxes."""
    fmt = OperandFormat.parse(spec)
    prepared = prepare(t, rht=fmt.rht, transpose=transpose)
    return prepared, block_amaxes(prepared, fmt.block[0])


@torch.library.custom_op("nvfp4_titan::reference_amax", mutates_args=())
def amax(t: torch.Tensor, rows: str, cols: str) -> torch.Tensor:
    """Amaxes (2,) of the two uses of t (M, K)."""
    amaxes = t.new_zeros(2, dtype=torch.float32)
    for i, spec in enumerate((rows, cols)):
        if spec:
            amaxes[i] = tensor_amax(_use(t, spec, transpose=i == 1)[1])
    return amaxes


@amax.register_fake
def _(t, rows, cols):
    return t.new_empty(2, dtype=torch.float32)


@torch.library.custom_op("nvfp4_titan::reference_quantize", mutates_args=())
def quantize(
    t: torch.Tensor,
    rows: str,
    cols: str,
    streams: list[int],
    key: torch.Tensor | None,
    amax: torch.Tensor | None,
    offset: list[int],
) -> FIVE_TENSORS:
    """Quantize t (M, K) along K (rows) and along M (cols)."""
    amaxes = t.new_zeros(2, dtype=torch.float32)
    results = []
    for i, spec in enumerate((rows, cols)):
        if not spec:
            results += no_operand(t)
            continue
        prepared, block_amax = _use(t, spec, transpose=i == 1)
        amaxes[i] = tensor_amax(block_amax) if amax is None else amax[i]
        random_byte = None
        if OperandFormat.parse(spec).rounding == "sr":
            first_row, first_column = offset if i == 0 else reversed(offset)
            row, column = block_indices(block_amax, first_row, first_column // BLOCK)
            random_byte = block_random_bytes(
                int(key), streams[i], amaxes[i], block_amax, row, column
            )
        results += quantize_blocks(prepared, block_amax, amaxes[i], random_byte)
    return (*results, amaxes)


@quantize.register_fake
def _(t, rows, cols, streams, key, amax, offset):
    row_use = fake_operand(t, *t.shape) if rows else no_operand(t)
    col_use = fake_operand(t, *t.shape[::-1]) if cols else no_operand(t)
    return (*row_use, *col_use, t.new_empty(2, dtype=torch.float32))


@torch.library.custom_op("nvfp4_titan::reference_mm", mutates_args=())
def mm(
    a_codes: torch.Tensor,
    a_scale: torch.Tensor,
    a_amax: torch.Tensor,
    b_codes: torch.Tensor,
    b_scale: torch.Tensor,
    b_amax: torch.Tensor,
    columns: int,
    out_dtype: torch.dtype,
    b_transposed: bool,
) -> torch.Tensor:
    """(M, K) @ (N, K).T -> (M, N), or (M, K) @ (K, N) with b_transposed."""
    a, b = gemm_values(a_codes, a_scale), gemm_values(b_codes, b_scale)
    b = b[:, :columns] if b_transposed else b.T
    return multiply(a, b, a_amax, b_amax).to(out_dtype)


@mm.register_fake
def _(a_codes, a_scale, a_amax, b_codes, b_scale, b_amax, columns, out_dtype, b_transposed):
    return a_codes.new_empty((a_codes.shape[0], columns), dtype=out_dtype)


def gemm_values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`lut[q] * S_b` in the dtype that this device multiplies."""
    dtype = torch.float32 if codes.device.type == "cpu" else torch.bfloat16
    return scaled_values(codes, scale, dtype)


def multiply(
    a: torch.Tensor, b: torch.Tensor, a_amax: torch.Tensor, b_amax: torch.Tensor
) -> torch.Tensor:
    """Multiply scaled values (M, K padded) @ (K, N) and apply alpha; (M, N) fp32.

    Args:
        a: From `gemm_values`; its padding along K is zeros, which b may lack.
        b: (K, N), from `gemm_values`.
        a_amax: fp32 scalar.
        b_amax: fp32 scalar.
    """
    a = a[:, : b.shape[0]]
    with torch.autocast(a.device.type, enabled=False):
        acc = a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)
    return apply_alpha(acc, a_amax, b_amax)


def apply_alpha(acc: torch.Tensor, a_amax: torch.Tensor, b_amax: torch.Tensor) -> torch.Tensor:
    """Scale by alpha = (a_amax / 2688) * (b_amax / 2688), in place, without losing range.

    Where the product of the two overflows they are applied one after the other, the smaller first;
    where it is subnormal, the larger first (both factors are then far from overflowing acc).

    Args:
        acc: fp32.
        a_amax: fp32 scalar.
        b_amax: fp32 scalar.
    """
    a, b = global_scale(a_amax), global_scale(b_amax)
    alpha = a * b
    whole = (alpha >= FLT_MIN) & (alpha <= FLT_MAX)
    small, large = torch.minimum(a, b), torch.maximum(a, b)
    overflows = alpha > FLT_MAX
    first = torch.where(whole, alpha, torch.where(overflows, small, large))
    second = torch.where(whole, torch.ones_like(alpha), torch.where(overflows, large, small))
    acc.mul_(first)
    # On a GPU asking would synchronise; a multiplication by 1 is exact.
    if acc.device.type != "cpu" or not bool(whole):
        acc.mul_(second)
    return acc
