"""The oracle behind custom ops: plain (ungrouped) operands and GEMMs.

The GEMM multiplies `code * block_scale`, exact in bf16 and fp32, accumulates in fp32 and applies
alpha = (amax_a / 2688) * (amax_b / 2688) in fp32 before the output cast: the NVFP4 GEMM up to the
order of accumulation. On a CPU the operands are fp32 (bf16 is slow there), on a GPU bf16. Formats
without a scale per tensor have no alpha; where the output is bf16 their operands are bf16 on a CPU
too, so that an MXFP8 GEMM is bit for bit torchao's emulated one.

Formats travel as strings (`OperandFormat.parse`); "" stands for a use that nobody asked for.
"""

import torch

from ..formats import BLOCK, NVFP4, BlockFormat
from ..numerics import QuantizedOperand
from ..numerics import dequantize as dequantize_plain
from ..numerics import quantize as quantize_plain
from ..numerics.grouped import dequantize_tokens
from ..numerics.quantize import (
    block_amaxes,
    global_scale,
    prepare,
    scaled_values,
    tensor_amax,
)
from ..recipe import FORMATS, OperandFormat

FIVE_TENSORS = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes and scales of the row use, of the column use, and the amaxes of both."""

FLT_MIN = torch.finfo(torch.float32).tiny
FLT_MAX = torch.finfo(torch.float32).max


def no_operand(t: torch.Tensor) -> list[torch.Tensor]:
    """Codes and scales of a use that nobody asked for."""
    return [t.new_empty(0, dtype=dtype) for dtype in (torch.uint8, torch.float8_e4m3fn)]


def fake_operand(t: torch.Tensor, spec: str, *shape: int) -> list[torch.Tensor]:
    """New codes and scales of an operand whose logical shape is (..., K); none for a spec of ""."""
    if not spec:
        return no_operand(t)
    *outer, size = shape
    fmt = OperandFormat.parse(spec).format
    blocks = (size + fmt.block - 1) // fmt.block
    return [
        t.new_empty((*outer, blocks * fmt.block // fmt.codes_per_byte), dtype=fmt.code_dtype),
        t.new_empty((*outer, blocks), dtype=fmt.scale_dtype),
    ]


@torch.library.custom_op("nvfp4_titan::reference_amax", mutates_args=())
def amax(t: torch.Tensor, rows: str, cols: str) -> torch.Tensor:
    """Amaxes (2,) of the two uses of t (M, K)."""
    amaxes = t.new_zeros(2, dtype=torch.float32)
    for i, spec in enumerate((rows, cols)):
        fmt = OperandFormat.parse(spec) if spec else None
        if fmt and fmt.format.tensor_scale:
            size = fmt.format.block
            prepared = prepare(t, rht=fmt.rht, transpose=i == 1, block=size)
            amaxes[i] = tensor_amax(block_amaxes(prepared, fmt.block[0], size))
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
    amaxes = t.new_zeros(2, dtype=torch.float32) if amax is None else amax.clone()
    results = []
    for i, (spec, part) in enumerate(((rows, t), (cols, t.T))):
        if not spec or not t.numel():
            results += fake_operand(t, spec, *part.shape)
            continue
        fmt = OperandFormat.parse(spec)
        first_row, first_column = offset if i == 0 else reversed(offset)
        operand = quantize_plain(
            part,
            format=fmt.format,
            block=fmt.block,
            rounding=fmt.rounding,
            rht=fmt.rht,
            amax=None if amax is None else amax[i],
            seed=int(key) if fmt.rounding == "sr" else None,
            stream=streams[i],
            first_row=first_row,
            first_block=first_column // BLOCK,
        )
        results += [operand.codes, operand.block_scale]
        if operand.amax is not None:
            amaxes[i] = operand.amax
    return (*results, amaxes)


@quantize.register_fake
def _(t, rows, cols, streams, key, amax, offset):
    row_use, col_use = fake_operand(t, rows, *t.shape), fake_operand(t, cols, *t.shape[::-1])
    return (*row_use, *col_use, t.new_empty(2, dtype=torch.float32))


@torch.library.custom_op("nvfp4_titan::reference_dequantize", mutates_args=())
def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    amax: torch.Tensor | None,
    offs: torch.Tensor | None,
    size: int,
    dtype: torch.dtype,
    format: str,
) -> torch.Tensor:
    """x_hat (..., size) of a row operand; with offs of tokens in groups."""
    operand = QuantizedOperand(codes, scale, amax, size, FORMATS[format])
    if offs is None:
        return dequantize_plain(operand, dtype).contiguous()
    return dequantize_tokens(operand, offs, dtype).contiguous()


@dequantize.register_fake
def _(codes, scale, amax, offs, size, dtype, format):
    return codes.new_empty((*codes.shape[:-1], size), dtype=dtype)


@torch.library.custom_op("nvfp4_titan::reference_mm", mutates_args=())
def mm(
    a_codes: torch.Tensor,
    a_scale: torch.Tensor,
    a_amax: torch.Tensor | None,
    b_codes: torch.Tensor,
    b_scale: torch.Tensor,
    b_amax: torch.Tensor | None,
    formats: str,
    columns: int,
    out_dtype: torch.dtype,
    b_transposed: bool,
) -> torch.Tensor:
    """(M, K) @ (N, K).T -> (M, N), or (M, K) @ (K, N) with b_transposed."""
    a, b = gemm_values((a_codes, b_codes), (a_scale, b_scale), formats, out_dtype)
    b = b[:, :columns] if b_transposed else b.T
    return multiply(a, b, a_amax, b_amax, formats, out_dtype)


@mm.register_fake
def _(
    a_codes, a_scale, a_amax, b_codes, b_scale, b_amax, formats, columns, out_dtype, b_transposed
):  # fmt: skip
    return a_codes.new_empty((a_codes.shape[0], columns), dtype=out_dtype)


def operand_formats(formats: str) -> list[BlockFormat]:
    """Formats of a GEMM's two operands from "format,format", as the ops take them."""
    return [FORMATS[name] for name in formats.split(",")]


def gemm_values(
    codes: tuple[torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor, torch.Tensor],
    formats: str,
    out_dtype: torch.dtype,
) -> list[torch.Tensor]:
    """`code * block_scale` of both operands in the dtype that this device multiplies."""
    fmts = operand_formats(formats)
    on_cpu = codes[0].device.type == "cpu"
    wide = on_cpu and (out_dtype != torch.bfloat16 or any(fmt.tensor_scale for fmt in fmts))
    dtype = torch.float32 if wide else torch.bfloat16
    operands = zip(codes, scales, fmts, strict=True)
    return [scaled_values(code, scale, dtype, fmt) for code, scale, fmt in operands]


def multiply(
    a: torch.Tensor,
    b: torch.Tensor,
    a_amax: torch.Tensor | None,
    b_amax: torch.Tensor | None,
    formats: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply scaled values (M, K padded) @ (K, N) and apply alpha; (M, N) of `out_dtype`.

    Args:
        a: From `gemm_values`; its padding along K is zeros, which b may lack.
        b: (K, N), from `gemm_values`.
        a_amax: fp32 scalar; None for a format without a scale per tensor.
        b_amax: As a_amax.
        formats: "format,format" of the two operands.
        out_dtype: Result's dtype.
    """
    a = a[:, : b.shape[0]]
    with torch.autocast(a.device.type, enabled=False):
        if a_amax is None and b_amax is None and a.dtype == out_dtype:
            return a @ b
        acc = a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)
    return apply_alpha(acc, a_amax, b_amax, *operand_formats(formats)).to(out_dtype)


def apply_alpha(
    acc: torch.Tensor,
    a_amax: torch.Tensor | None,
    b_amax: torch.Tensor | None,
    a_format: BlockFormat = NVFP4,
    b_format: BlockFormat = NVFP4,
) -> torch.Tensor:
    """Scale by alpha = (a_amax / 2688) * (b_amax / 2688), in place, without losing range.

    2688 is the formats' `encode_max`; the factor of a format without a scale per tensor is 1.

    Where the product of the two overflows they are applied one after the other, the smaller first;
    where it is subnormal, the larger first (both factors are then far from overflowing acc).

    Args:
        acc: fp32.
        a_amax: fp32 scalar or None.
        b_amax: fp32 scalar or None.
        a_format: Format that a_amax belongs to.
        b_format: Format that b_amax belongs to.
    """
    if a_amax is None and b_amax is None:
        return acc
    a, b = (
        acc.new_ones(()) if amax is None else global_scale(amax, fmt)
        for amax, fmt in ((a_amax, a_format), (b_amax, b_format))
    )
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
