"""Quantize kernels that write what the native GEMMs take: packed codes and blocked scales.

Tiles, rounding and bits are those of triton_quantize.py; what differs is the output. Both operands
lie contraction last, so a column operand is written transposed: the 16 rows of a tile are one
8-byte word per column. Layout: native_layout.py.

Four elements that follow each other along a contraction are packed at once, by PTX:

    100 and more   cvt.rn.satfinite.e2m1x2    the oracle's codes: nearest, ties to even, saturating
    below          the portable form
    HARDWARE_SR    cvt.rs.satfinite.e2m1x4    sm_100a and sm_103a alone

The hardware rounds stochastically with the same Philox words, but not as the oracle does: which
bits of a word serve which element, and how many, is the instruction's. It is a pure function of the
same things, unbiased or not as the hardware has it, and differs from the oracle's codes.

Source: PTX ISA, cvt: of {a, b, e, f} the first becomes the highest nibble.
"""

import triton
import triton.language as tl

from .triton_amax import tile_amax
from .triton_codes import e2m1
from .triton_layout import below, group_bounds, load_tile, padded, pick, tile_as_bf16
from .triton_quantize import COUNTERS, amax_of_blocks, spread
from .triton_rounding import (
    bits,
    block_scales,
    load_key,
    number,
    random_words,
    rht_columns,
    rht_rows,
    round_bf16,
    round_bits,
    tensor_scales,
    to_fp32,
)


@triton.jit
def place(slot_block, offs_ptr, rows, num_groups, GROUPS: tl.constexpr):
    """Where a block of 16 slots lies, groups padded to 64 slots.

    Args:
        slot_block: int32 scalar.
        offs_ptr: Group ends, with GROUPS > 0.
        rows: Rows of each group, with GROUPS == 0.
        num_groups: Number of groups.
        GROUPS: num_groups rounded up to a power of two, for tokens; 0 for equal groups.

    Returns:
        Group (num_groups or more: nothing needs the block), block in the group, first row and end
        of the group, blocks of the group and of all before it, first row of the group's scales.
    """
    if GROUPS == 0:
        blocks = (rows + 63) // 64 * 4
        group = slot_block // blocks
        tiles = group * ((rows + 127) // 128 * 128)
        block = slot_block - group * blocks
        return group, block, group * rows, (group + 1) * rows, blocks, group * blocks, tiles
    else:
        starts, ends = group_bounds(offs_ptr, num_groups, 0, GROUPS)
        exists = tl.arange(0, GROUPS) < num_groups
        sizes, _ = padded(ends - starts, 64)
        sizes = tl.where(exists, tl.maximum(sizes, 64), 0)
        slot_ends = tl.cumsum(sizes, axis=0)
        slot = slot_block * 16
        group = tl.sum((slot_ends <= slot).to(tl.int32), axis=0)
        blocks = pick(sizes, group, GROUPS) // 16
        before = pick(slot_ends - sizes, group, GROUPS) // 16
        tile_sizes, tile_ends = padded(ends - starts, 128)
        tiles = pick(tile_ends - tile_sizes, group, GROUPS)
        start, end = pick(starts, group, GROUPS), pick(ends, group, GROUPS)
        return group, slot_block - before, start, end, blocks, before, tiles


@triton.jit
def blocked_offset(row, block, width):
    """Where the blocked layout keeps the scale of a row and a block of columns.

    Args:
        row: int32.
        block: int32, broadcasts with row.
        width: Blocks of a row, a multiple of 4.
    """
    tile = ((row // 128).to(tl.int64) * (width // 4) + block // 4) * 512
    return tile + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4


@triton.jit
def codes_of_four(
    x0,
    x1,
    x2,
    x3,
    encode,
    word,
    SR: tl.constexpr,
    HARDWARE_SR: tl.constexpr,
    PTX: tl.constexpr,
):
    """Codes of four elements of a contraction in the low 16 bits of int32, the first lowest.

    Args:
        x0: fp32; x1, x2, x3 likewise.
        x1: See x0.
        x2: See x0.
        x3: See x0.
        encode: Their encode scale.
        word: uint32 random bits, with SR.
        SR: Stochastic rounding.
        HARDWARE_SR: By the hardware.
        PTX: See the module.
    """
    if PTX >= 100 and SR and HARDWARE_SR:
        return tl.inline_asm_elementwise(
            "{.reg .b16 t; cvt.rs.satfinite.e2m1x4.f32 t, {$4, $3, $2, $1}, $5; "
            "cvt.u32.u16 $0, t;}",
            "=r,f,f,f,f,r",
            [x0 * encode, x1 * encode, x2 * encode, x3 * encode, word],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    elif PTX >= 100 and not SR:
        return tl.inline_asm_elementwise(
            "{.reg .b8 l, h; .reg .b16 t; cvt.rn.satfinite.e2m1x2.f32 l, $2, $1; "
            "cvt.rn.satfinite.e2m1x2.f32 h, $4, $3; mov.b16 t, {l, h}; cvt.u32.u16 $0, t;}",
            "=r,f,f,f,f",
            [x0 * encode, x1 * encode, x2 * encode, x3 * encode],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        x = (x0, x1, x2, x3)
        packed = 0
        for i in tl.static_range(4):
            lanes = e2m1(x[i], encode, word, i, SR, True, PTX).to(tl.int32)
            packed = packed | ((((lanes >> 6) & 7) | ((lanes >> 12) & 8)) << (4 * i))
        return packed


@triton.jit
def quarters(blocks, SIZE: tl.constexpr):
    """(SIZE / 16,) to (SIZE / 4,): each block's value on its quarters."""
    return tl.reshape(tl.broadcast_to(blocks[:, None], (SIZE // 16, 4)), (SIZE // 4,))


@triton.jit
def load_row(x_ptr, stride, row, end, columns, K, ROUND: tl.constexpr):
    """A row of a tile again, as fp32; rounded to bf16 with ROUND."""
    pointers = x_ptr + row.to(tl.int64) * stride + columns
    x = to_fp32(tl.load(pointers, mask=below(columns, K, row < end), other=0.0))
    if ROUND:
        x = number(round_bits(bits(x)))
    return x


@triton.jit
def write_rows(
    x_ptr,
    stride,
    K,
    tile,
    amax,
    scales,
    codes_ptr,
    scale_ptr,
    first_row,
    end,
    scale_row,
    counters,
    column,
    width,
    SQUARE: tl.constexpr,
    SR: tl.constexpr,
    RHT: tl.constexpr,
    ROUND: tl.constexpr,
    HARDWARE_SR: tl.constexpr,
    C: tl.constexpr,
    PTX: tl.constexpr,
):
    """Quantize a tile along its columns and store it; as triton_quantize.quantize_rows.

    Rows are read again, one at a time: with all 16 unrolled, compilers interleave them and run out
    of registers (triton 3.6: 253 of 255, and spills).

    Args that differ:
        x_ptr: The input; stride, K: of it.
        stride: See x_ptr.
        K: See x_ptr.
        tile: The tile, read with SQUARE alone.
        scales: tensor_scales(amax).
        codes_ptr: int16, (R, Kp / 4).
        scale_ptr: uint8, blocked.
        scale_row: Row of the tile's first in the scales.
        counters: Row and block of the tile's first in SR counters, stream, the SR key.
        width: Kp / 16.
    """
    blocks = column // 16 + tl.arange(0, C // 16)
    fours = column // 4 + tl.arange(0, C // 4)
    columns = column + tl.arange(0, C)
    if SQUARE:
        if RHT:
            transformed = ()
            for i in tl.static_range(16):
                transformed = transformed + (round_bf16(rht_rows(tile[i], C), PTX),)
            tile = transformed
        block_amax = tl.max(tl.reshape(tile_amax(tile), (C // 16, 16)), axis=1)
        code, _, encode = block_scales(block_amax, scales, True, PTX)
    for i in range(16):
        row = first_row + i
        exists = row < end
        x = load_row(x_ptr, stride, row, end, columns, K, ROUND and RHT)
        if RHT:
            x = round_bf16(rht_rows(x, C), PTX)
        if not SQUARE:
            block_amax = amax_of_blocks(x, C)
            code, _, encode = block_scales(block_amax, scales, True, PTX)
        word = 0
        if SR:
            row_counter, first_block, stream, key = counters
            position = row_counter + i, first_block + tl.arange(0, C // 16)
            w = random_words(*position, block_amax, amax, stream, key)
            quarter = tl.arange(0, C // 4) & 3
            low = tl.where(quarter == 0, quarters(w[0], C), quarters(w[1], C))
            high = tl.where(quarter == 2, quarters(w[2], C), quarters(w[3], C))
            word = tl.where(quarter < 2, low, high)
        even, odd = tl.split(tl.reshape(x, (C // 4, 2, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        packed = codes_of_four(x0, x1, x2, x3, quarters(encode, C), word, SR, HARDWARE_SR, PTX)
        pointers = codes_ptr + row.to(tl.int64) * (width * 4) + fours
        tl.store(pointers, packed.to(tl.int16), mask=below(fours, width * 4, exists))
        pointers = scale_ptr + blocked_offset(scale_row + i, blocks, width)
        tl.store(pointers, code.to(tl.uint8), mask=below(blocks, width, exists))


@triton.jit
def write_columns(
    tile,
    amax,
    scales,
    codes_ptr,
    scale_ptr,
    pitch,
    slot_block,
    block,
    width,
    counters,
    column,
    K,
    SQUARE: tl.constexpr,
    SR: tl.constexpr,
    RHT: tl.constexpr,
    HARDWARE_SR: tl.constexpr,
    C: tl.constexpr,
    PTX: tl.constexpr,
):
    """Quantize a tile along its rows and store it transposed; as write_rows.

    Args that differ:
        codes_ptr: int64, (K, P / 16), of the tile's expert.
        scale_ptr: uint8, blocked, those of the tile's group.
        pitch: P / 16.
        slot_block: Block of 16 slots in codes.
        block: Block in the group.
        width: Blocks of the group.
        K: Number of columns.
    """
    columns = column + tl.arange(0, C)
    inside = below(columns, K, width > 0)
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
    code, _, encode = block_scales(block_amax, scales, True, PTX)
    words = (0, 0, 0, 0)
    if SR:
        row_counter, block_counter, stream, key = counters
        row = row_counter + tl.arange(0, C)
        words = random_words(row, block_counter, block_amax, amax, stream, key)
    packed = ()
    for i in tl.static_range(4):
        four = codes_of_four(
            tile[4 * i],
            tile[4 * i + 1],
            tile[4 * i + 2],
            tile[4 * i + 3],
            encode,
            words[i],
            SR,
            HARDWARE_SR,
            PTX,
        )
        packed = packed + (four,)
    low = (packed[0] | (packed[1] << 16)).to(tl.int64) & 0xFFFFFFFF
    high = (packed[2] | (packed[3] << 16)).to(tl.int64) << 32
    tl.store(codes_ptr + columns.to(tl.int64) * pitch + slot_block, low | high, mask=inside)
    pointers = scale_ptr + blocked_offset(columns, block, width)
    tl.store(pointers, code.to(tl.uint8), mask=inside)


@triton.jit
def tile_of_program(column_blocks):
    """Slot block and column block of this program: the four blocks of 64 slots at a time.

    Their column codes share sectors of 32 bytes, and their rows' scales words.
    """
    # Backwards: what the amax kernel read last is still in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    rest = program % (4 * column_blocks)
    return program // (4 * column_blocks) * 4 + rest % 4, rest // 4


@triton.jit(do_not_specialize=COUNTERS)
def _native_quantize_kernel(
    x_ptr,
    stride,
    offs_ptr,
    amax_ptr,
    row_codes_ptr,
    row_scale_ptr,
    col_codes_ptr,
    col_scale_ptr,
    rows,
    K,
    num_groups,
    first_row,
    first_column,
    row_stream,
    col_stream,
    key_ptr,
    GROUPS: tl.constexpr,
    ROW: tl.constexpr,
    ROW_SQUARE: tl.constexpr,
    ROW_SR: tl.constexpr,
    ROW_RHT: tl.constexpr,
    COL: tl.constexpr,
    COL_SQUARE: tl.constexpr,
    COL_SR: tl.constexpr,
    COL_RHT: tl.constexpr,
    ROUND: tl.constexpr,
    HARDWARE_SR: tl.constexpr,
    C: tl.constexpr,
    PTX: tl.constexpr,
):
    width = (K + 63) // 64 * 4
    column_blocks = tl.cdiv(width * 16, C)
    slot_block, column_block = tile_of_program(column_blocks)
    column = column_block * C
    columns = column + tl.arange(0, C)
    group, block, start, end, blocks, before, tiles = place(
        slot_block, offs_ptr, rows, num_groups, GROUPS
    )
    needed = group < num_groups
    # Before the tile is loaded: divisions call subroutines, around which a tile would be spilled.
    if ROW:
        row_amax = tl.load(amax_ptr + group, mask=needed, other=0.0)
        row_scales = tensor_scales(row_amax)
    if COL:
        col_amax = tl.load(amax_ptr + num_groups + group, mask=needed, other=0.0)
        col_scales = tensor_scales(col_amax)
    tile = load_tile(x_ptr, stride, start + block * 16, end, columns, K, False)
    if ROW:
        write_rows(
            x_ptr,
            stride,
            K,
            tile_as_bf16(tile, ROUND and ROW_RHT),
            row_amax,
            row_scales,
            row_codes_ptr,
            row_scale_ptr,
            start + block * 16,
            end,
            tiles + block * 16,
            (
                first_row + block * 16,
                first_column // 16 + column // 16,
                row_stream,
                load_key(key_ptr, ROW_SR),
            ),
            column,
            width,
            ROW_SQUARE,
            ROW_SR,
            ROW_RHT,
            ROUND,
            HARDWARE_SR,
            C,
            PTX,
        )
    if COL:
        padded_columns = (K + 127) // 128 * 128
        if GROUPS == 0:
            pitch = blocks
            codes = col_codes_ptr + group.to(tl.int64) * K * pitch
            code_block = block
        else:
            pitch = tl.num_programs(0) // column_blocks
            codes = col_codes_ptr
            code_block = slot_block
        write_columns(
            tile_as_bf16(tile, ROUND and COL_RHT),
            col_amax,
            col_scales,
            codes,
            col_scale_ptr + before.to(tl.int64) * padded_columns,
            pitch,
            code_block,
            block,
            tl.where(needed, blocks, 0),
            (first_column + column, first_row // 16 + block, col_stream, load_key(key_ptr, COL_SR)),
            column,
            K,
            COL_SQUARE,
            COL_SR,
            COL_RHT,
            HARDWARE_SR,
            C,
            PTX,
        )
