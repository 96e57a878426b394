"""Amaxes of a tensor's two uses in one read.

As int32 maxima of the bits of |x|: they order as the numbers do, an atomic maximum does not depend
on the order of programs, and NaN is the largest, so that it stays. Rounding is monotone: the amax
of RHT values rounded to bf16 is the rounded amax.
"""

import triton
import triton.language as tl

from .triton_layout import load_tile, locate, tile_as_bf16
from .triton_rounding import MAGNITUDE_BITS, bits, rht_columns, rht_rows, round_bits


@triton.jit
def larger(a, b):
    """The larger of two numbers; NaN where one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile_amax(tile, ROWS: tl.constexpr = 16):
    """(C,) int32 bits of the maximal magnitude over ROWS fp32 tensors."""
    amax = tl.abs(tile[0])
    for i in tl.static_range(1, ROWS):
        amax = larger(amax, tl.abs(tile[i]))
    # Again, since a NaN may come with a sign.
    return bits(amax) & MAGNITUDE_BITS


@triton.jit
def _amax_kernel(
    x_ptr,
    stride,
    offs_ptr,
    amax_ptr,
    rows,
    columns_in_all,
    num_groups,
    GROUPS: tl.constexpr,
    ROW: tl.constexpr,
    ROW_RHT: tl.constexpr,
    COL: tl.constexpr,
    COL_RHT: tl.constexpr,
    ROUND: tl.constexpr,
    C: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # Known when compiled, addresses and divisions cost next to nothing.
    K = WIDTH if WHOLE else columns_in_all
    pitch = WIDTH if WHOLE else stride
    column_blocks = tl.cdiv(K, C)
    slot_block = tl.program_id(0) // column_blocks
    columns = (tl.program_id(0) % column_blocks) * C + tl.arange(0, C)
    group, block, start, end = locate(slot_block, offs_ptr, rows, num_groups, GROUPS)
    tile = load_tile(x_ptr, pitch, start + block * 16, end, columns, K, WHOLE)
    needed = group < num_groups
    if (ROW and not ROW_RHT) or (COL and not COL_RHT):
        plain = tl.max(tile_amax(tile), axis=0)
        if ROW and not ROW_RHT:
            tl.atomic_max(amax_ptr + group, plain, mask=needed, sem="relaxed")
        if COL and not COL_RHT:
            tl.atomic_max(amax_ptr + num_groups + group, plain, mask=needed, sem="relaxed")
    if ROW_RHT or COL_RHT:
        tile = tile_as_bf16(tile, ROUND)
    if ROW_RHT:
        amax = tl.full((C,), 0, tl.int32)
        for i in tl.static_range(16):
            amax = tl.maximum(amax, bits(rht_rows(tile[i], C)) & MAGNITUDE_BITS)
        amax = round_bits(tl.max(amax, axis=0))
        tl.atomic_max(amax_ptr + group, amax, mask=needed, sem="relaxed")
    if COL_RHT:
        amax = round_bits(tl.max(tile_amax(rht_columns(tile)), axis=0))
        tl.atomic_max(amax_ptr + num_groups + group, amax, mask=needed, sem="relaxed")
