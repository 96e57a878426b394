"""Both uses of a tensor quantized in one read, for GEMMs that follow at once or kept packed.

Per use and element, an operand may be written as

    values   what the emulated GEMM multiplies, bf16: NVFP4's `lut[q] * S_b * 2**e`
             (triton_codes.py), MXFP8's `code * scale` (triton_mxfp8.py)
    packed   codes, and a scale per block

and a tile is read from memory once for all of them, whatever the formats of the two uses. Row
operands (contraction along columns): values (R, Kp), codes (R, Kp / 2), scales (R, Kp / 16). Column
operands (contraction along rows), tokens first: values (P, K), codes (P / 2, K), scales
(P / 16, K): the transpose of the oracle's operand. MXFP8 has a code a byte and blocks of 32: a tile
then has 32 rows where blocks run along them.

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
from .triton_mxfp8 import e4m3_codes, e4m3_values, mxfp8_decode, mxfp8_scales
from .triton_rounding import (
    MAGNITUDE_BITS,
    bits,
    load_key,
    random_words,
    rht_columns,
    rht_rows,
    round_bf16,
    round_bits,
    tensor_scales,
)
from .triton_targets import scales_of_columns, scales_of_rows, spread

COUNTERS = ["first_row", "first_column", "row_stream", "col_stream"]
"""Arguments whose values must not compile a kernel of their own."""


@triton.jit
def amax_of_blocks(x, SIZE: tl.constexpr, BLOCK: tl.constexpr = 16):
    """(SIZE,) fp32 to the bits of its blocks' maximal magnitudes, (SIZE / BLOCK,) int32."""
    amax = tl.reduce(tl.reshape(tl.abs(x), (SIZE // BLOCK, BLOCK)), 1, larger)
    return bits(amax) & MAGNITUDE_BITS


@triton.jit
def amax_of_squares(block_amax, BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Amaxes of a flat tile's blocks, (ROWS * BLOCKS,) int32, to those of its squares, likewise."""
    rows = tl.reshape(block_amax, (ROWS // BLOCK, BLOCK, BLOCKS))
    squares = tl.reshape(tl.max(rows, axis=1), (ROWS // BLOCK, 1, BLOCKS))
    squares = tl.broadcast_to(squares, (ROWS // BLOCK, BLOCK, BLOCKS))
    return tl.reshape(squares, (ROWS * BLOCKS,))


@triton.jit
def load_amax(amax_ptr, group, needed, FORMAT: tl.constexpr):
    """Amax of a group, fp32; of NVFP4 in a single level of scales what makes the other scale 1."""
    if FORMAT.tensor_scale:
        return tl.load(amax_ptr + group, mask=needed, other=0.0)
    elif FORMAT.codes_per_byte == 2:
        return tl.full((), FORMAT.encode_max, tl.float32)
    else:
        return 0.0  # MXFP8 does not read it


@triton.jit
def counted_amax(amax, FORMAT: tl.constexpr):
    """What SR counters take for the tensor's amax: 0 where there is no scale per tensor."""
    if FORMAT.tensor_scale:
        return amax
    else:
        return tl.zeros((), tl.float32)


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
    key,
    column,
    padded_columns,
    FORMAT: tl.constexpr,
    SQUARE: tl.constexpr,
    SR: tl.constexpr,
    RHT: tl.constexpr,
    PACKED: tl.constexpr,
    VALUES: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Quantize a tile along its columns and store it.

    Args:
        x: Flat tile, (ROWS * C,) fp32; with RHT holding bf16 values.
        amax: fp32 scalar, of the tensor that the tile belongs to, from `load_amax`.
        codes_ptr: uint8, with PACKED.
        scale_ptr: uint8, with PACKED.
        values_ptr: int16, with VALUES.
        first_row: Row of the tile's first.
        end: End of the group's rows.
        counter_row: First row in SR counters.
        counter_block: First column in SR counters, in blocks.
        stream: SR stream.
        key: SR key, from `load_key`.
        column: First column of the tile.
        padded_columns: Kp.
        FORMAT: BlockFormat.
        SQUARE: Square blocks.
        SR: Stochastic rounding.
        RHT: Transform first.
        PACKED: Write codes and scales.
        VALUES: Write values.
        C: Columns of the tile.
        ROWS: Rows of the tile.
        WHOLE: See triton_layout.load_tile.
        PTX: See triton_rounding.
    """
    SIZE: tl.constexpr = ROWS * C
    BLOCK: tl.constexpr = FORMAT.block
    A_BYTE: tl.constexpr = FORMAT.codes_per_byte
    if RHT:
        x = round_bf16(rht_rows(x, SIZE), PTX)
    block_amax = amax_of_blocks(x, SIZE, BLOCK)
    if SQUARE:
        block_amax = amax_of_squares(block_amax, C // BLOCK, ROWS, BLOCK)
    row, block = flat_index(C // BLOCK, ROWS)
    if A_BYTE == 1:
        code, encode = mxfp8_scales(block_amax, FORMAT)
    else:
        scales = tensor_scales(amax, FORMAT.encode_max)
        code, value, encode = scales_of_rows(
            x, block_amax, scales, FORMAT, SQUARE, PACKED, C, ROWS, PTX
        )
        word, byte = 0, 0
        if SR:
            position = counter_row + row, counter_block + block
            counted = counted_amax(amax, FORMAT)
            words = random_words(*position, block_amax, counted, stream, key)
            word, byte = words_of_elements(words, SIZE), tl.arange(0, SIZE) & 3
        lanes = e2m1(x, spread(encode, SIZE), word, byte, SR, PACKED, PTX)
    rows = end - first_row
    start = first_row.to(tl.int64) * padded_columns + column
    if VALUES:
        if A_BYTE == 1:
            decode = spread(mxfp8_decode(code), SIZE, BLOCK)
            values = e4m3_values(x, spread(encode, SIZE, BLOCK), decode, PTX)
        else:
            factor = gemm_factor_bits(value, gemm_factor(amax, FORMAT.encode_max))
            values = gemm_bits(lanes, spread(factor, SIZE), PTX)
        row_of, column_of = flat_index(C, ROWS)
        inside = all_or((row_of < rows) & (column_of < padded_columns - column), WHOLE)
        pointers = values_ptr + start + (row_of * padded_columns + column_of)
        tl.store(pointers, values, mask=inside)
    if PACKED:
        if A_BYTE == 1:
            packed = e4m3_codes(x, spread(encode, SIZE, BLOCK), PTX)
        else:
            even, odd = tl.split(tl.reshape(lanes, (SIZE // 2, 2)))
            packed = pack_codes(even, odd, PTX)
        row_of, column_of = flat_index(C // A_BYTE, ROWS)
        width = padded_columns // A_BYTE
        inside = all_or((row_of < rows) & (column_of < width - column // A_BYTE), WHOLE)
        pointers = codes_ptr + start // A_BYTE + (row_of * width + column_of)
        tl.store(pointers, packed, mask=inside)
        width = padded_columns // BLOCK
        inside = all_or((row < rows) & (block < width - column // BLOCK), WHOLE)
        pointers = scale_ptr + start // BLOCK + (row * width + block)
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
    key,
    column,
    K,
    FORMAT: tl.constexpr,
    SQUARE: tl.constexpr,
    SR: tl.constexpr,
    RHT: tl.constexpr,
    PACKED: tl.constexpr,
    VALUES: tl.constexpr,
    C: tl.constexpr,
    WHOLE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Quantize a tile along its rows, one block of them, and store it, tokens first.

    As `quantize_rows`. Args that differ:
        tile: Tuple of FORMAT.block tensors (C,) fp32.
        slot_block: Block of slots that the tile is.
        counter_row: First column of the tile in SR counters, where it counts as the row.
        counter_block: Block of the tile in SR counters.
        K: Number of columns.
    """
    BLOCK: tl.constexpr = FORMAT.block
    A_BYTE: tl.constexpr = FORMAT.codes_per_byte
    columns = column + tl.arange(0, C)
    inside = all_or(columns < K, WHOLE)
    if RHT:
        unrounded = rht_columns(tile)
        block_amax = round_bits(tile_amax(unrounded))
        tile = ()
        for i in tl.static_range(16):
            tile = tile + (round_bf16(unrounded[i], PTX),)
    else:
        block_amax = tile_amax(tile, BLOCK)
    if SQUARE:
        squares = tl.max(tl.reshape(block_amax, (C // BLOCK, BLOCK)), axis=1)
        block_amax = spread(squares, C, BLOCK)
    if A_BYTE == 1:
        code, encode = mxfp8_scales(block_amax, FORMAT)
        decode = mxfp8_decode(code)
    else:
        scales = tensor_scales(amax, FORMAT.encode_max)
        code, value, encode = scales_of_columns(
            tile, block_amax, scales, FORMAT, SQUARE, PACKED, C, PTX
        )
        words = (0, 0, 0, 0)
        if SR:
            position = counter_row + tl.arange(0, C), counter_block
            counted = counted_amax(amax, FORMAT)
            words = random_words(*position, block_amax, counted, stream, key)
        factor = gemm_factor_bits(value, gemm_factor(amax, FORMAT.encode_max))
    start = slot_block.to(tl.int64) * K
    # One address in 64 bits each; what is not written has no pointer.
    if VALUES:
        values_start = values_ptr + start * BLOCK + columns
    if PACKED:
        codes_start = codes_ptr + start * (BLOCK // A_BYTE) + columns
    for i in tl.static_range(BLOCK):
        if A_BYTE == 2:
            lanes = e2m1(tile[i], encode, words[i // 4], i % 4, SR, PACKED, PTX)
        if VALUES:
            if A_BYTE == 1:
                values = e4m3_values(tile[i], encode, decode, PTX)
            else:
                values = gemm_bits(lanes, factor, PTX)
            tl.store(values_start + i * K, values, mask=inside)
        if PACKED:
            if A_BYTE == 2 and i % 2 == 0:
                even = lanes
            else:
                if A_BYTE == 1:
                    packed = e4m3_codes(tile[i], encode, PTX)
                else:
                    packed = pack_codes(even, lanes, PTX)
                tl.store(codes_start + (i // A_BYTE) * K, packed, mask=inside)
    if PACKED:
        tl.store(scale_ptr + start + columns, code.to(tl.uint8), mask=inside)


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
    key_ptr,
    GROUPS: tl.constexpr,
    ROW: tl.constexpr,
    ROW_FORMAT: tl.constexpr,
    ROW_SQUARE: tl.constexpr,
    ROW_SR: tl.constexpr,
    ROW_RHT: tl.constexpr,
    ROW_PACKED: tl.constexpr,
    ROW_VALUES: tl.constexpr,
    COL: tl.constexpr,
    COL_FORMAT: tl.constexpr,
    COL_SQUARE: tl.constexpr,
    COL_SR: tl.constexpr,
    COL_RHT: tl.constexpr,
    COL_PACKED: tl.constexpr,
    COL_VALUES: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
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
    group, block, start, end = locate(slot_block, offs_ptr, rows, num_groups, GROUPS, ROWS)
    needed = group < num_groups
    if ROW:
        key = load_key(key_ptr, ROW_SR)
        amax = load_amax(amax_ptr, group, needed, ROW_FORMAT)
        x = load_flat(x_ptr, pitch, start + block * ROWS, end, column, K, C, WHOLE, ROWS)
        quantize_rows(
            as_bf16(x, ROUND and ROW_RHT),
            amax,
            row_codes_ptr,
            row_scale_ptr,
            row_values_ptr,
            start + block * ROWS,
            end,
            first_row + block * ROWS,
            first_column // 16 + column // 16,
            row_stream,
            key,
            column,
            tl.cdiv(K, ROW_FORMAT.block) * ROW_FORMAT.block,
            ROW_FORMAT,
            ROW_SQUARE,
            ROW_SR,
            ROW_RHT,
            ROW_PACKED,
            ROW_VALUES,
            C,
            ROWS,
            WHOLE,
            PTX,
        )
    if COL:
        key = load_key(key_ptr, COL_SR)
        amax = load_amax(amax_ptr, num_groups + group, needed, COL_FORMAT)
        columns = column + tl.arange(0, C)
        tile = load_tile(x_ptr, pitch, start + block * ROWS, end, columns, K, WHOLE, ROWS)
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
            key,
            column,
            K,
            COL_FORMAT,
            COL_SQUARE,
            COL_SR,
            COL_RHT,
            COL_PACKED,
            COL_VALUES,
            C,
            WHOLE,
            PTX,
        )
