"""The reference backend: the oracle behind custom ops, on any device.

The GEMM multiplies `lut[q] * S_b`, exact in bf16 and fp32, accumulates in fp32 and applies
alpha = (amax_a / 2688) * (amax_b / 2688) in fp32 before the output cast: the NVFP4 GEMM up to the
order of accumulation. On a CPU the operands are fp32 (bf16 is slow there), on a GPU bf16.
"""

import torch

from ..formats import BLOCK, NVFP4
from ..numerics import QuantizedOperand
from ..numerics.philox import block_random_bytes
from ..numerics.quantize import (
    block_amaxes,
    prepare,
    quantize_blocks,
    scaled_values,
    tensor_amax,
)
from ..recipe import OperandFormat
from .backend import Backend, OperandUse

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
FLT_MIN = torch.finfo(torch.float32).tiny
FLT_MAX = torch.finfo(torch.float32).max


def _use(t: torch.Tensor, spec: str, transpose: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A prepared operand and its block amaxes."""
    fmt = OperandFormat.parse(spec)
    prepared = prepare(t, rht=fmt.rht, transpose=transpose)
    return prepared, block_amaxes(prepared, fmt.block[0])


@torch.library.custom_op("nvfp4_titan::reference_amax", mutates_args=())
def _amax_op(t: torch.Tensor, rows: str, cols: str) -> torch.Tensor:
    amaxes = t.new_zeros(2, dtype=torch.float32)
    for i, spec in enumerate((rows, cols)):
        if spec:
            amaxes[i] = tensor_amax(_use(t, spec, transpose=i == 1)[1])
    return amaxes


@_amax_op.register_fake
def _(t, rows, cols):
    return t.new_empty(2, dtype=torch.float32)


@torch.library.custom_op("nvfp4_titan::reference_quantize", mutates_args=())
def _quantize_op(
    t: torch.Tensor,
    rows: str,
    cols: str,
    streams: list[int],
    key: torch.Tensor | None,
    amax: torch.Tensor | None,
    offset: list[int],
) -> Tensors:
    amaxes = t.new_zeros(2, dtype=torch.float32)
    results = []
    for i, spec in enumerate((rows, cols)):
        if not spec:
            results += [
                t.new_empty(0, dtype=torch.uint8),
                t.new_empty(0, dtype=torch.float8_e4m3fn),
            ]
            continue
        prepared, block_amax = _use(t, spec, transpose=i == 1)
        amaxes[i] = tensor_amax(block_amax) if amax is None else amax[i]
        random_byte = None
        if OperandFormat.parse(spec).rounding == "sr":
            first_row, first_column = offset if i == 0 else reversed(offset)
            random_byte = block_random_bytes(
                int(key), streams[i], amaxes[i], block_amax, first_row, first_column // BLOCK
            )
        results += quantize_blocks(prepared, block_amax, amaxes[i], random_byte)
    return (*results, amaxes)


@_quantize_op.register_fake
def _(t, rows, cols, streams, key, amax, offset):
    results = []
    for spec, (outer, contraction) in ((rows, t.shape), (cols, t.shape[::-1])):
        blocks = (contraction + BLOCK - 1) // BLOCK
        codes, scales = (outer, blocks * BLOCK // 2), (outer, blocks)
        results += [
            t.new_empty(codes if spec else 0, dtype=torch.uint8),
            t.new_empty(scales if spec else 0, dtype=torch.float8_e4m3fn),
        ]
    return (*results, t.new_empty(2, dtype=torch.float32))


@torch.library.custom_op("nvfp4_titan::reference_mm", mutates_args=())
def _mm_op(
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
    on_cpu = a_codes.device.type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    a = scaled_values(a_codes, a_scale, dtype)
    b = scaled_values(b_codes, b_scale, dtype)
    if b_transposed:
        # (M, K padded) @ (K, N padded); the padding of a's contraction is zeros.
        a = a[:, : b.shape[0]]
        b = b[:, :columns]
    else:
        b = b.T
    with torch.autocast(a.device.type, enabled=False):
        # (M, K) @ (K, N) -> (M, N), accumulated and returned in fp32
        acc = a @ b if on_cpu else torch.mm(a, b, out_dtype=torch.float32)
    return apply_alpha(acc, a_amax, b_amax).to(out_dtype)


@_mm_op.register_fake
def _(a_codes, a_scale, a_amax, b_codes, b_scale, b_amax, columns, out_dtype, b_transposed):
    return a_codes.new_empty((a_codes.shape[0], columns), dtype=out_dtype)


def apply_alpha(acc: torch.Tensor, a_amax: torch.Tensor, b_amax: torch.Tensor) -> torch.Tensor:
    """Scale by alpha = (a_amax / 2688) * (b_amax / 2688), in place, without losing range.

    Where the product of the two overflows or is subnormal they are applied one after the other, the
    smaller first.

    Args:
        acc: fp32.
        a_amax: fp32, broadcasts to acc.
        b_amax: fp32, broadcasts to acc.
    """
    a, b = a_amax / NVFP4.encode_max, b_amax / NVFP4.encode_max
    alpha = a * b
    whole = (alpha >= FLT_MIN) & (alpha <= FLT_MAX)
    first = torch.where(whole, alpha, torch.minimum(a, b))
    second = torch.where(whole, torch.ones_like(alpha), torch.maximum(a, b))
    acc.mul_(first)
    # On a GPU asking would synchronise; a multiplication by 1 is exact.
    if acc.device.type != "cpu" or not bool(whole.all()):
        acc.mul_(second)
    return acc


def _quantize(
    t: torch.Tensor,
    rows: OperandUse | None,
    cols: OperandUse | None,
    key: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    offset: tuple[int, int] = (0, 0),
) -> tuple[QuantizedOperand | None, QuantizedOperand | None]:
    specs = [str(use.format) if use else "" for use in (rows, cols)]
    streams = [use.stream if use else 0 for use in (rows, cols)]
    if not any(use and use.format.rounding == "sr" for use in (rows, cols)):
        # Without the layer's key, calls on one tensor are the same call: compilers merge them.
        key = None
    outputs = torch.ops.nvfp4_titan.reference_quantize(t, *specs, streams, key, amax, list(offset))
    amaxes = outputs[4]
    operands = (
        QuantizedOperand(outputs[0], outputs[1], amaxes[0], t.shape[1]),
        QuantizedOperand(outputs[2], outputs[3], amaxes[1], t.shape[0]),
    )
    return operands[0] if rows else None, operands[1] if cols else None


def _amax(t: torch.Tensor, rows: OperandUse | None, cols: OperandUse | None) -> torch.Tensor:
    specs = [str(use.format) if use else "" for use in (rows, cols)]
    return torch.ops.nvfp4_titan.reference_amax(t, *specs)


def _mm(
    a: QuantizedOperand,
    b: QuantizedOperand,
    columns: int,
    out_dtype: torch.dtype,
    b_transposed: bool = False,
) -> torch.Tensor:
    return torch.ops.nvfp4_titan.reference_mm(
        a.codes, a.block_scale, a.amax, b.codes, b.block_scale, b.amax,
        columns, out_dtype, b_transposed,
    )  # fmt: skip


REFERENCE = Backend(
    name="reference",
    unavailable=lambda: None,
    quantize=_quantize,
    amax=_amax,
    mm=_mm,
)
