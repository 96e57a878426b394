"""Packed operands to what the emulated GEMM multiplies, and that GEMM's alpha.

Values are what triton_quantize.py says, alpha the product of what they leave of the two operands'
decode scales (triton_codes.gemm_exponent; 1 for MXFP8).
"""

import triton
import triton.language as tl

from .triton_codes import gemm_exponent, gemm_factor, gemm_factor_bits, unpack_codes
from .triton_layout import below, locate
from .triton_mxfp8 import mxfp8_decode, unpack_e4m3
from .triton_quantize import load_amax
from .triton_rounding import bits, e4m3_value, number, round_bits
from .triton_targets import spread


@triton.jit
def remainder(amax, FORMAT: tl.constexpr):
    """What GEMM values leave of an operand's scale per tensor for alpha, fp32.

    Args:
        amax: From `load_amax`.
        FORMAT: BlockFormat.
    """
    if FORMAT.codes_per_byte == 1:
        return 1.0
    else:
        _, rest = gemm_exponent(amax, FORMAT.encode_max)
        return rest


@triton.jit
def cast(x, dtype: tl.constexpr, PTX: tl.constexpr):
    """fp32 to a GEMM's output dtype."""
    if PTX == 0 and dtype == tl.bfloat16:
        # The interpreter truncates.
        return (round_bits(bits(x)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def store_values(pointers, values, amax, mask, FORMAT: tl.constexpr, PTX: tl.constexpr):
    """Store GEMM values (int16), or x_hat, which they are times `remainder`, in other dtypes."""
    if pointers.dtype.element_ty == tl.int16:
        tl.store(pointers, values, mask=mask)
    else:
        x = number(values.to(tl.int32) << 16) * remainder(amax, FORMAT)
        tl.store(pointers, cast(x, pointers.dtype.element_ty, PTX), mask=mask)


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
    FORMAT: tl.constexpr,
    COLUMNS: tl.constexpr,
    C: tl.constexpr,
    PTX: tl.constexpr,
):
    """Unpack a tile of a row operand (K is its padded width), or of a column operand (COLUMNS)."""
    BLOCK: tl.constexpr = FORMAT.block
    A_BYTE: tl.constexpr = FORMAT.codes_per_byte
    ROWS: tl.constexpr = BLOCK if COLUMNS else 16
    column_blocks = tl.cdiv(K, C)
    slot_block = tl.program_id(0) // column_blocks
    column = (tl.program_id(0) % column_blocks) * C
    columns = column + tl.arange(0, C)
    inside = columns < K
    group, block, start, end = locate(slot_block, offs_ptr, rows, num_groups, GROUPS, ROWS)
    amax = load_amax(amax_ptr, group, group < num_groups, FORMAT)
    if COLUMNS:
        pointers = scale_ptr + slot_block.to(tl.int64) * K + columns
        scale = tl.load(pointers, mask=inside, other=0).to(tl.int32)
        factor = unpack_factor(scale, amax, FORMAT)
        for i in tl.static_range(BLOCK // A_BYTE):
            pointers = codes_ptr + (slot_block * (BLOCK // A_BYTE) + i).to(tl.int64) * K + columns
            codes = tl.load(pointers, mask=inside, other=0)
            pointers = values_ptr + (slot_block * BLOCK + A_BYTE * i).to(tl.int64) * K + columns
            if A_BYTE == 1:
                tl.store(pointers, unpack_e4m3(codes, factor, PTX), mask=inside)
            else:
                even, odd = unpack_codes(codes, factor, PTX)
                tl.store(pointers, even, mask=inside)
                tl.store(pointers + K, odd, mask=inside)
    else:
        blocks = column // BLOCK + tl.arange(0, C // BLOCK)
        bytes_ = column // A_BYTE + tl.arange(0, C // A_BYTE)
        for i in tl.static_range(16):
            row = start + block * 16 + i
            offset = row.to(tl.int64) * K
            exists = row < end
            pointers = scale_ptr + offset // BLOCK + blocks
            scale = tl.load(pointers, mask=below(blocks, K // BLOCK, exists), other=0)
            factor = unpack_factor(scale.to(tl.int32), amax, FORMAT)
            factor = spread(factor, C // A_BYTE, BLOCK // A_BYTE)
            pointers = codes_ptr + offset // A_BYTE + bytes_
            codes = tl.load(pointers, mask=below(bytes_, K // A_BYTE, exists), other=0)
            if A_BYTE == 1:
                values = unpack_e4m3(codes, factor, PTX)
            else:
                even, odd = unpack_codes(codes, factor, PTX)
                values = tl.reshape(tl.join(even, odd), (C,))
            pointers = values_ptr + offset + columns
            store_values(pointers, values, amax, below(columns, K, exists), FORMAT, PTX)


@triton.jit
def unpack_factor(scale, amax, FORMAT: tl.constexpr):
    """What codes are unpacked with, of block scales (int32)."""
    if FORMAT.codes_per_byte == 1:
        return mxfp8_decode(scale)
    else:
        return gemm_factor_bits(e4m3_value(scale), gemm_factor(amax, FORMAT.encode_max))


@triton.jit
def _alpha_kernel(
    a_amax_ptr, b_amax_ptr, alpha_ptr, A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr
):
    """Write alpha and a zero (cuBLAS's beta)."""
    a = remainder(load_amax(a_amax_ptr, 0, True, A_FORMAT), A_FORMAT)
    b = remainder(load_amax(b_amax_ptr, 0, True, B_FORMAT), B_FORMAT)
    tl.store(alpha_ptr, a * b)
    tl.store(alpha_ptr + 1, 0.0)


@triton.jit
def _scale_kernel(acc_ptr, alpha_ptr, out_ptr, size, C: tl.constexpr, PTX: tl.constexpr):
    """Multiply by alpha, round once."""
    index = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    acc = tl.load(acc_ptr + index, mask=index < size)
    result = cast(acc * tl.load(alpha_ptr), out_ptr.dtype.element_ty, PTX)
    tl.store(out_ptr + index, result, mask=index < size)
