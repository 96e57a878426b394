"""Both uses of a tensor quantized in one read, for GEMMs that follow at once or kept packed.

Per use and element, an operand may be written as

    values   bf16 `lut[q] * S_b * 2**e`, what the emulated GEMM multiplies (triton_codes.py)
    packed   two codes a byte, and an e4m3 scale per block

and a tile is read from memory once for all of them. Row operands (contraction along columns):
values (R, Kp), codes (R, Kp / 2), scales (R, Kp / 16). Column operands (contraction along rows),
tokens first: values (P, K), codes (P / 2, K), scales (P / 16, K): the transpose of the oracle's
operand.

The bits are the oracle's (numerics/quantize.py, numerics/grouped.py) whatever C is.
"""

import triton
import triton.language as tl

from .triton_amax import larger, tile_amax
from .triton_codes import e2m1, gemm_bits, gemm_factor, gemm_factor_bits, pack_codes
from .triton_layout import (
    all_or,
    as_bf16,
    flat_index,
    load_flat,
    load_tile,
    locate,
    tile_as_bf16,
)
from .triton_rounding import (
    MAGNITUDE_BITS,
    bits,
    block_scales,
    random_words,
    rht_columns,
    rht_rows,
    round_bf16,
    round_bits,
    tensor_scales,
)

COUNTERS = ["first_row", "first_column", "row_stream", "col_stream", "key_low", "key_high"]
"""Arguments whose values must not compile a kernel of their own."""


@triton.jit
def spread(blocks, SIZE: tl.constexpr, COUNT: tl.constexpr = 16):
    """(SIZE / COUNT,) to (SIZE,): each value COUNT times."""
    return tl.reshape(tl.broadcast_to(blocks[:, None], (SIZE // COUNT, COUNT)), (SIZE,))


@triton.jit
def amax_of_blocks(x, SIZE: tl.constexpr):
    """(SIZE,) fp32 to the bits of its blocks' maximal magnitudes, (SIZE / 16,) int32."""
    amax = tl.reduce(tl.reshape(tl.abs(x), (SIZE // 16, 16)), 1, larger)
    return bits(amax) & MAGNITUDE_BITS


@triton.jit
def amax_of_squares(block_amax, C: tl.constexpr):
    """Amaxes of a flat tile's blocks, (C,) int32, to those of its 16x16 squares, likewise."""
    squares = tl.max(tl.reshape(block_amax, (16, C // 16)), axis=0)
    return tl.reshape(tl.broadcast_to(squares[None, :], (16, C // 16)), (C,))


@triton.jit
def words_of_elements(words, SIZE: tl.constexpr):
    """Four words (SIZE / 16,) of each block to the word of each element, (SIZE,): four share one.

    By halves of a block, which is what a thread holds.
    """
    w0, w1, w2, w3 = words
    HALVES: tl.constexpr = SIZE // 8
    upper = (tl.arange(0, HALVES) & 1) == 1
    low = tl.where(upper, spread(w2, HALVES, 2), spread(w0, HALVES, 2))
    high = tl.where(upper, spread(w3, HALVES, 2), spread(w1, HALVES, 2))
    in_low = (tl.arange(0, 8) < 4)[None, :]
    return tl.reshape(tl.where(in_low, low[:, None], high[:, None]), (SIZE,))


@triton.jit
def quantize_rows(
    x,
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
    WHOLE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Quantize a tile along its columns and store it.

    Args:
        x: Flat tile, (16 * C,) fp32; with RHT holding bf16 values.
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
        WHOLE: See triton_layout.load_tile.
        PTX: See triton_rounding.
    """
    SIZE: tl.constexpr = 16 * C
    if RHT:
        x = round_bf16(rht_rows(x, SIZE), PTX)
    block_amax = amax_of_blocks(x, SIZE)
    if SQUARE:
        block_amax = amax_of_squares(block_amax, C)
    code, value, encode = block_scales(block_amax, tensor_scales(amax), PACKED, PTX)
    row, block = flat_index(C // 16)
    word, byte = 0, 0
    if SR:
        position = counter_row + row, counter_block + block
        words = random_words(*position, block_amax, amax, stream, key_low, key_high)
        word, byte = words_of_elements(words, SIZE), tl.arange(0, SIZE) & 3
    lanes = e2m1(x, spread(encode, SIZE), word, byte, SR, PACKED, PTX)
    rows = end - first_row
    start = first_row.to(tl.int64) * padded_columns + column
    if VALUES:
        factor = spread(gemm_factor_bits(value, gemm_factor(amax)), SIZE)
        row_of, column_of = flat_index(C)
        inside = all_or((row_of < rows) & (column_of < padded_columns - column), WHOLE)
        pointers = values_ptr + start + (row_of * padded_columns + column_of)
        tl.store(pointers, gemm_bits(lanes, factor, PTX), mask=inside)
    if PACKED:
        even, odd = tl.split(tl.reshape(lanes, (SIZE // 2, 2)))
        row_of, column_of = flat_index(C // 2)
        inside = all_or((row_of < rows) & (column_of < (padded_columns - column) // 2), WHOLE)
        pointers = codes_ptr + start // 2 + (row_of * (padded_columns // 2) + column_of)
        tl.store(pointers, pack_codes(even, odd, PTX), mask=inside)
        inside = all_or((row < rows) & (block < (padded_columns - column) // 16), WHOLE)
        pointers = scale_ptr + start // 16 + (row * (padded_columns // 16) + block)
        tl.store(pointers, code.to(tl.uint8), mask=inside)


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
    WHOLE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Quantize a tile along its rows and store it, tokens first; as `quantize_rows`.

    Args that differ:
        slot_block: Block of 16 slots that the tile is.
        counter_row: First column of the tile in SR counters, where it counts as the row.
        counter_block: Block of the tile in SR counters.
        K: Number of columns.
    """
    columns = column + tl.arange(0, C)
    inside = all_or(columns < K, WHOLE)
    if RHT:
        unrounded = rht_columns(tile)
        block_amax = round_bits(tile_amax(unrounded))
        tile = ()
        for i in tl.static_range(16):
            tile = tile + (round_bf16(unrounded[i], PTX),)
    else:
        block_amax = tile_amax(tile)
    if SQUARE:
        block_amax = spread(tl.max(tl.reshape(block_amax, (C // 16, 16)), axis=1), C)
    code, value, encode = block_scales(block_amax, tensor_scales(amax), PACKED, PTX)
    words = (0, 0, 0, 0)
    if SR:
        row = counter_row + tl.arange(0, C)
        words = random_words(row, counter_block, block_amax, amax, stream, key_low, key_high)
    factor = gemm_factor_bits(value, gemm_factor(amax))
    for i in tl.static_range(16):
        lanes = e2m1(tile[i], encode, words[i // 4], i % 4, SR, PACKED, PTX)
        if VALUES:
            pointers = values_ptr + (slot_block * 16 + i).to(tl.int64) * K + columns
            tl.store(pointers, gemm_bits(lanes, factor, PTX), mask=inside)
        if PACKED:
            if i % 2 == 0:
                even = lanes
            else:
                pointers = codes_ptr + (slot_block * 8 + i // 2).to(tl.int64) * K + columns
                tl.store(pointers, pack_codes(even, lanes, PTX), mask=inside)
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
    columns_in_all,
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
    WHOLE: tl.constexpr,
    WIDTH: tl.constexpr,
    PTX: tl.constexpr,
):
    # Known when compiled, addresses and divisions cost next to nothing.
    K = WIDTH if WHOLE else columns_in_all
    pitch = WIDTH if WHOLE else stride
    # Programs run backwards: what the amax kernel read last is still in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    column_blocks = tl.cdiv(K, C)
    slot_block = program // column_blocks
    column = (program % column_blocks) * C
    group, block, start, end = locate(slot_block, offs_ptr, rows, num_groups, GROUPS)
    needed = group < num_groups
    if ROW:
        amax = tl.load(amax_ptr + group, mask=needed, other=0.0)
        x = load_flat(x_ptr, pitch, start + block * 16, end, column, K, C, WHOLE)
        quantize_rows(
            as_bf16(x, ROUND and ROW_RHT),
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
            WHOLE,
            PTX,
        )
    if COL:
        amax = tl.load(amax_ptr + num_groups + group, mask=needed, other=0.0)
        columns = column + tl.arange(0, C)
        tile = load_tile(x_ptr, pitch, start + block * 16, end, columns, K, WHOLE)
        quantize_columns(
            tile_as_bf16(tile, ROUND and COL_RHT),
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
            WHOLE,
            PTX,
        )
