"""Kernels beside the native GEMMs: w's operand transposed for dgrad, rows of no group cleared."""

import triton
import triton.language as tl

from .native_quantize import blocked_offset, place, tile_of_program
from .triton_layout import below
from .triton_quantize import spread


@triton.jit
def _transpose_kernel(
    codes_ptr,
    scale_ptr,
    out_codes_ptr,
    out_scale_ptr,
    rows,
    K,
    num_groups,
    C: tl.constexpr,
):
    """Transpose an operand in square blocks, RTNE and without RHT: its codes serve both dims.

    Args:
        codes_ptr: uint8, (E * rows, Kp / 2).
        scale_ptr: uint8, blocked, one matrix per expert.
        out_codes_ptr: int64, (E * K, P / 16).
        out_scale_ptr: uint8, blocked, likewise.
        rows: Rows of an expert.
        K: Columns.
        num_groups: E.
        C: Columns of a tile.
    """
    width = (K + 63) // 64 * 4
    column_blocks = tl.cdiv(width * 16, C)
    slot_block, column_block = tile_of_program(column_blocks)
    group, block, start, end, blocks, before, tiles = place(slot_block, None, rows, num_groups, 0)
    column = column_block * C
    pairs = column // 2 + tl.arange(0, C // 2)
    words = ()
    for half in tl.static_range(2):
        even = tl.zeros((C // 2,), tl.int32)
        odd = tl.zeros((C // 2,), tl.int32)
        for i in tl.static_range(8):
            row = start + block * 16 + half * 8 + i
            pointers = codes_ptr + row.to(tl.int64) * (width * 8) + pairs
            pair = tl.load(pointers, mask=below(pairs, width * 8, row < end), other=0).to(tl.int32)
            even = even | ((pair & 15) << (4 * i))
            odd = odd | ((pair >> 4) << (4 * i))
        words = words + (even, odd)
    base = out_codes_ptr + group.to(tl.int64) * K * blocks + block
    for i in tl.static_range(2):
        word = (words[i].to(tl.int64) & 0xFFFFFFFF) | (words[2 + i].to(tl.int64) << 32)
        columns = 2 * pairs + i
        tl.store(base + columns.to(tl.int64) * blocks, word, mask=columns < K)
    k = column // 16 + tl.arange(0, C // 16)
    exists = start + block * 16 < end
    pointers = scale_ptr + blocked_offset(tiles + block * 16, k, width)
    scale = tl.load(pointers, mask=below(k, width, exists), other=0)
    columns = column + tl.arange(0, C)
    padded_columns = (K + 127) // 128 * 128
    pointers = out_scale_ptr + before.to(tl.int64) * padded_columns
    pointers += blocked_offset(columns, block, blocks)
    tl.store(pointers, spread(scale, C), mask=columns < K)


@triton.jit
def _clear_tail_kernel(y_ptr, offs_ptr, columns, num_groups, C: tl.constexpr):
    """Zero the rows of no group, a part of a row a program; of other rows nothing is touched."""
    parts = tl.cdiv(columns, C)
    row = tl.program_id(0) // parts
    if row < tl.load(offs_ptr + num_groups - 1):
        return
    index = tl.program_id(0) % parts * C + tl.arange(0, C)
    zero = tl.zeros((C,), y_ptr.dtype.element_ty)
    tl.store(y_ptr + row.to(tl.int64) * columns + index, zero, mask=index < columns)
