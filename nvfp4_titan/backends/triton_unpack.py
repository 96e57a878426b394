"""Packed operands to what the emulated GEMM multiplies, and that GEMM's alpha.

Values are bf16 `lut[q] * S_b * 2**e`, alpha the product of what e leaves of the two operands'
decode scales (triton_codes.gemm_exponent).
"""

import triton
import triton.language as tl

from .triton_codes import gemm_exponent, gemm_factor, gemm_factor_bits, unpack_codes
from .triton_layout import below, locate
from .triton_quantize import spread
from .triton_rounding import bits, e4m3_value, round_bits


@triton.jit
def _unpack_kernel(
    codes_ptr,
    scale_ptr,
    amax_ptr,
    offs_ptr,
    values_ptr,
    rows,
    K,
    num_groups,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
    PTX: tl.constexpr,
):
    """Unpack a tile of a row operand (K is its padded width), or of a column operand (COLUMNS)."""
    column_blocks = tl.cdiv(K, C)
    slot_block = tl.program_id(0) // column_blocks
    column = (tl.program_id(0) % column_blocks) * C
    columns = column + tl.arange(0, C)
    inside = columns < K
    group, block, start, end = locate(slot_block, offs_ptr, rows, num_groups, GROUPS)
    factor = gemm_factor(tl.load(amax_ptr + group, mask=group < num_groups, other=0.0))
    if COLUMNS:
        scale = tl.load(scale_ptr + slot_block.to(tl.int64) * K + columns, mask=inside, other=0)
        scaled = gemm_factor_bits(e4m3_value(scale.to(tl.int32)), factor)
        for i in tl.static_range(8):
            pointers = codes_ptr + (slot_block * 8 + i).to(tl.int64) * K + columns
            even, odd = unpack_codes(tl.load(pointers, mask=inside, other=0), scaled, PTX)
            pointers = values_ptr + (slot_block * 16 + 2 * i).to(tl.int64) * K + columns
            tl.store(pointers, even, mask=inside)
            tl.store(pointers + K, odd, mask=inside)
    else:
        blocks = column // 16 + tl.arange(0, C // 16)
        pairs = column // 2 + tl.arange(0, C // 2)
        for i in tl.static_range(16):
            row = start + block * 16 + i
            offset = row.to(tl.int64) * K
            exists = row < end
            pointers = scale_ptr + offset // 16 + blocks
            scale = tl.load(pointers, mask=below(blocks, K // 16, exists), other=0)
            scaled = gemm_factor_bits(e4m3_value(scale.to(tl.int32)), factor)
            pointers = codes_ptr + offset // 2 + pairs
            pair = tl.load(pointers, mask=below(pairs, K // 2, exists), other=0)
            even, odd = unpack_codes(pair, spread(scaled, C // 2, 8), PTX)
            values = tl.reshape(tl.join(even, odd), (C,))
            pointers = values_ptr + offset + columns
            tl.store(pointers, values, mask=below(columns, K, exists))


@triton.jit
def _alpha_kernel(a_amax_ptr, b_amax_ptr, alpha_ptr):
    """Write alpha and a zero (cuBLAS's beta)."""
    _, a = gemm_exponent(tl.load(a_amax_ptr))
    _, b = gemm_exponent(tl.load(b_amax_ptr))
    tl.store(alpha_ptr, a * b)
    tl.store(alpha_ptr + 1, 0.0)


@triton.jit
def cast(x, dtype: tl.constexpr, PTX: tl.constexpr):
    """fp32 to a GEMM's output dtype."""
    if PTX == 0 and dtype == tl.bfloat16:
        # The interpreter truncates.
        return (round_bits(bits(x)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _scale_kernel(acc_ptr, alpha_ptr, out_ptr, size, C: tl.constexpr, PTX: tl.constexpr):
    """Multiply by alpha, round once."""
    index = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    acc = tl.load(acc_ptr + index, mask=index < size)
    result = cast(acc * tl.load(alpha_ptr), out_ptr.dtype.element_ty, PTX)
    tl.store(out_ptr + index, result, mask=index < size)
