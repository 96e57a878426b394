"""Both uses of a tensor quantized in one read, for GEMMs that follow at once or kept packed.

Per use and element, an operand may be written as

    values   bf16 `lut[q] * S_b * 2**e`, what the emulated GEMM multiplies (triton_rounding.py)
    packed   two codes a byte, and an e4m3 scale per block

and a tile is read once for all of them. Row operands (contraction along columns): values (R, Kp),
codes (R, Kp / 2), scales (R, Kp / 16). Column operands (contraction along rows), tokens first:
values (P, K), codes (P / 2, K), scales (P / 16, K): the transpose of the oracle's operand.

The bits are the oracle's (numerics/quantize.py, numerics/grouped.py) whatever C is.
"""

import triton
import triton.language as tl

from .triton_amax import tile_amax
from .triton_layout import as_bf16, below, load_tile, locate
from .triton_rounding import (
    MAGNITUDE_BITS,
    bf16_mantissa,
    bits,
    block_scales,
    e2m1,
    gemm_bits,
    gemm_factor,
    nibble,
    philox,
    rht_columns,
    rht_rows,
    round_bf16,
    round_bits,
    tensor_scales,
)

COUNTERS = ["first_row", "first_column", "row_stream", "col_stream", "key_low", "key_high"]
"""Arguments whose values must not compile a kernel of their own."""


@triton.jit
def spread(blocks, SIZE: tl.constexpr):
    """(SIZE / 16,) to (SIZE,): each block's value on its 16 elements."""
    return tl.reshape(tl.broadcast_to(blocks[:, None], (SIZE // 16, 16)), (SIZE,))


@triton.jit
def amax_of_blocks(magnitude_bits, SIZE: tl.constexpr):
    """(SIZE,) int32 to the maxima of its blocks, (SIZE / 16,)."""
    return tl.max(tl.reshape(magnitude_bits, (SIZE // 16, 16)), axis=1)


@triton.jit
def row_random(row, block, mantissas, stream, key_low, key_high, SIZE: tl.constexpr):
    """A random byte, shifted left by 14, for each element of a row's blocks."""
    w0, w1, w2, w3 = philox(row, block, mantissas, stream, key_low, key_high)
    index = tl.arange(0, SIZE)
    # The same for the four columns of a thread, as the compiler sees.
    quarter = (index >> 2) & 3
    first = tl.where(quarter == 0, spread(w0, SIZE), spread(w1, SIZE))
    second = tl.where(quarter == 2, spread(w2, SIZE), spread(w3, SIZE))
    word = tl.where(quarter < 2, first, second)
    byte = (word >> ((index & 3) * 8).to(tl.uint32)) & 0xFF
    return (byte << 14).to(tl.int32, bitcast=True)


@triton.jit
def pack_rows(nibbles, SIZE: tl.constexpr):
    """(SIZE,) int32 nibbles to (SIZE / 2,) bytes, the even element low."""
    low, high = tl.split(tl.reshape(nibbles, (SIZE // 2, 2)))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def quantize_rows(
    tile,
    amax,
    codes_ptr,
    scale_ptr,
    values_ptr,
    first_row,
    end,
    counter_row,
    counter_block,
    stream,
    key_low,
    key_high,
    column,
    padded_columns,
    SQUARE: tl.constexpr,
    SR: tl.constexpr,
    RHT: tl.constexpr,
    PACKED: tl.constexpr,
    VALUES: tl.constexpr,
    C: tl.constexpr,
    PTX: tl.constexpr,
):
    """Quantize a tile along its columns and store it.

    Args:
        tile: Tuple of 16 (C,) fp32 tensors; with RHT holding bf16 values.
        amax: fp32 scalar, of the tensor that the tile belongs to.
        codes_ptr: uint8, with PACKED.
        scale_ptr: uint8, with PACKED.
        values_ptr: int16, with VALUES.
        first_row: Row of the tile's first.
        end: End of the group's rows.
        counter_row: First row in SR counters.
        counter_block: First column in SR counters, in blocks.
        stream: SR stream.
        key_low: Low half of the SR key.
        key_high: High half.
        column: First column of the tile.
        padded_columns: Kp.
        SQUARE: 16x16 blocks.
        SR: Stochastic rounding.
        RHT: Transform first.
        PACKED: Write codes and scales.
        VALUES: Write values.
        C: Columns of the tile.
        PTX: See triton_rounding.
    """
    scales = tensor_scales(amax)
    factor = gemm_factor(amax)
    columns = column + tl.arange(0, C)
    blocks = column // 16 + tl.arange(0, C // 16)
    pairs = column // 2 + tl.arange(0, C // 2)
    if RHT:
        transformed = ()
        for i in tl.static_range(16):
            transformed = transformed + (round_bf16(rht_rows(tile[i], C), PTX),)
        tile = transformed
    if SQUARE:
        block_amax = amax_of_blocks(tile_amax(tile), C)
        code, value, block_encode = block_scales(block_amax, scales, PTX)
    for i in tl.static_range(16):
        row = first_row + i
        offset = row.to(tl.int64) * padded_columns
        exists = row < end
        if not SQUARE:
            block_amax = amax_of_blocks(bits(tile[i]) & MAGNITUDE_BITS, C)
            code, value, block_encode = block_scales(block_amax, scales, PTX)
        random = 0
        if SR:
            mantissas = bf16_mantissa(block_amax) | (bf16_mantissa(bits(amax)) << 7)
            block = counter_block + tl.arange(0, C // 16)
            random = row_random(counter_row + i, block, mantissas, stream, key_low, key_high, C)
        q, signed = e2m1(tile[i], spread(block_encode, C), random, SR, PTX)
        if VALUES:
            values = gemm_bits(q, signed, spread(value * factor, C))
            inside = below(columns, padded_columns, exists)
            tl.store(values_ptr + offset + columns, values, mask=inside)
        if PACKED:
            inside = below(pairs, padded_columns // 2, exists)
            packed = pack_rows(nibble(q, signed), C)
            tl.store(codes_ptr + offset // 2 + pairs, packed, mask=inside)
            inside = below(blocks, padded_columns // 16, exists)
            tl.store(scale_ptr + offset // 16 + blocks, code.to(tl.uint8), mask=inside)


@triton.jit
def quantize_columns(
    tile,
    amax,
    codes_ptr,
    scale_ptr,
    values_ptr,
    slot_block,
    counter_row,
    counter_block,
    stream,
    key_low,
    key_high,
    column,
    K,
    SQUARE: tl.constexpr,
    SR: tl.constexpr,
    RHT: tl.constexpr,
    PACKED: tl.constexpr,
    VALUES: tl.constexpr,
    C: tl.constexpr,
    PTX: tl.constexpr,
):
    """Quantize a tile along its rows and store it, tokens first; as `quantize_rows`.

    Args that differ:
        slot_block: Block of 16 slots that the tile is.
        counter_row: First column of the tile in SR counters, where it counts as the row.
        counter_block: Block of the tile in SR counters.
        K: Number of columns.
    """
    scales = tensor_scales(amax)
    columns = column + tl.arange(0, C)
    inside = columns < K
    if RHT:
        unrounded = rht_columns(tile)
        block_amax = round_bits(tile_amax(unrounded))
        tile = ()
        for i in tl.static_range(16):
            tile = tile + (round_bf16(unrounded[i], PTX),)
    else:
        block_amax = tile_amax(tile)
    if SQUARE:
        block_amax = spread(amax_of_blocks(block_amax, C), C)
    code, value, block_encode = block_scales(block_amax, scales, PTX)
    if SR:
        mantissas = bf16_mantissa(block_amax) | (bf16_mantissa(bits(amax)) << 7)
        row = counter_row + tl.arange(0, C)
        words = philox(row, counter_block, mantissas, stream, key_low, key_high)
    scaled = value * gemm_factor(amax)
    for i in tl.static_range(16):
        random = 0
        if SR:
            byte = (words[i // 4] >> (8 * (i % 4))) & 0xFF
            random = (byte << 14).to(tl.int32, bitcast=True)
        q, signed = e2m1(tile[i], block_encode, random, SR, PTX)
        if VALUES:
            pointers = values_ptr + (slot_block * 16 + i).to(tl.int64) * K + columns
            tl.store(pointers, gemm_bits(q, signed, scaled), mask=inside)
        if PACKED:
            if i % 2 == 0:
                even = nibble(q, signed)
            else:
                packed = (even | (nibble(q, signed) << 4)).to(tl.uint8)
                pointers = codes_ptr + (slot_block * 8 + i // 2).to(tl.int64) * K + columns
                tl.store(pointers, packed, mask=inside)
    if PACKED:
        pointers = scale_ptr + slot_block.to(tl.int64) * K + columns
        tl.store(pointers, code.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=COUNTERS)
def _quantize_kernel(
    x_ptr,
    stride,
    offs_ptr,
    amax_ptr,
    row_codes_ptr,
    row_scale_ptr,
    row_values_ptr,
    col_codes_ptr,
    col_scale_ptr,
    col_values_ptr,
    rows,
    K,
    num_groups,
    first_row,
    first_column,
    row_stream,
    col_stream,
    key_low,
    key_high,
    GROUPS: tl.constexpr,
    ROW: tl.constexpr,
    ROW_SQUARE: tl.constexpr,
    ROW_SR: tl.constexpr,
    ROW_RHT: tl.constexpr,
    ROW_PACKED: tl.constexpr,
    ROW_VALUES: tl.constexpr,
    COL: tl.constexpr,
    COL_SQUARE: tl.constexpr,
    COL_SR: tl.constexpr,
    COL_RHT: tl.constexpr,
    COL_PACKED: tl.constexpr,
    COL_VALUES: tl.constexpr,
    ROUND: tl.constexpr,
    C: tl.constexpr,
    PTX: tl.constexpr,
):
    # Programs run backwards: what the amax kernel read last is still in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    column_blocks = tl.cdiv(K, C)
    slot_block = program // column_blocks
    column = (program % column_blocks) * C
    columns = column + tl.arange(0, C)
    group, block, start, end = locate(slot_block, offs_ptr, rows, num_groups, GROUPS)
    tile = load_tile(x_ptr, stride, start + block * 16, end, columns, K)
    needed = group < num_groups
    if ROW:
        amax = tl.load(amax_ptr + group, mask=needed, other=0.0)
        quantize_rows(
            as_bf16(tile, ROUND and ROW_RHT),
            amax,
            row_codes_ptr,
            row_scale_ptr,
            row_values_ptr,
            start + block * 16,
            end,
            first_row + block * 16,
            first_column // 16 + column // 16,
            row_stream,
            key_low,
            key_high,
            column,
            tl.cdiv(K, 16) * 16,
            ROW_SQUARE,
            ROW_SR,
            ROW_RHT,
            ROW_PACKED,
            ROW_VALUES,
            C,
            PTX,
        )
    if COL:
        amax = tl.load(amax_ptr + num_groups + group, mask=needed, other=0.0)
        quantize_columns(
            as_bf16(tile, ROUND and COL_RHT),
            amax,
            col_codes_ptr,
            col_scale_ptr,
            col_values_ptr,
            slot_block,
            first_column + column,
            first_row // 16 + block,
            col_stream,
            key_low,
            key_high,
            column,
            K,
            COL_SQUARE,
            COL_SR,
            COL_RHT,
            COL_PACKED,
            COL_VALUES,
            C,
            PTX,
        )
