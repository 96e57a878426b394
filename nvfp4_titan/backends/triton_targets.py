"""Scales of NVFP4 blocks in the Triton kernels, four over six included.

A format with two targets tries both per block and keeps the one with the smaller squared error, as
the oracle does (numerics/nvfp4.py): errors in units of 1 / s_enc, summed by halving, every product
and sum rounded to fp32. A sum of two has no order: Triton may take them from two threads.
"""

import triton
import triton.language as tl

from .triton_codes import e2m1_nearest
from .triton_rounding import ELEMENT_MAX, block_scales


@triton.jit
def spread(blocks, SIZE: tl.constexpr, COUNT: tl.constexpr = 16):
    """(SIZE / COUNT,) to (SIZE,): each value COUNT times."""
    return tl.reshape(tl.broadcast_to(blocks[:, None], (SIZE // COUNT, COUNT)), (SIZE,))


@triton.jit
def squared_error(x, value, encode, tensor_encode):
    """(lut[q] * S_b - x * s_enc)**2 of each element."""
    a = tl.minimum(tl.abs(x * encode), ELEMENT_MAX)
    # Of magnitudes: the signs agree.
    error = e2m1_nearest(a) * value - tl.abs(x) * tensor_encode
    return error * error


@triton.jit
def halving_sum(x, OUTER: tl.constexpr, INNER: tl.constexpr):
    """(OUTER, 16, INNER), flat, summed over the 16 by halving: (OUTER * INNER,)."""
    for stage in tl.static_range(4):
        x = tl.sum(tl.reshape(x, (OUTER, 2, (8 >> stage) * INNER)), axis=1)
    return tl.reshape(x, (OUTER * INNER,))


@triton.jit
def block_errors(x, value, encode, tensor_encode, SIZE: tl.constexpr):
    """Errors (SIZE / 16,) of the blocks of a flat tile (SIZE,)."""
    errors = squared_error(x, spread(value, SIZE), spread(encode, SIZE), tensor_encode)
    return halving_sum(errors, SIZE // 16, 1)


@triton.jit
def column_errors(tile, value, encode, tensor_encode):
    """Errors (C,) of the blocks of a tile of 16 tensors."""
    t = ()
    for i in tl.static_range(16):
        t = t + (squared_error(tile[i], value, encode, tensor_encode),)
    for stage in tl.static_range(4):
        n = ()
        for i in tl.static_range(8 >> stage):
            n = n + (t[i] + t[i + (8 >> stage)],)
        t = n
    return t[0]


@triton.jit
def better(other_scales, scales, other_error, error):
    """Codes, decode and encode scales of the target with the smaller error; the first's in a tie.

    A NaN is not smaller: the first target's scale carries it.
    """
    code, value, encode = scales
    other_code, other_value, other_encode = other_scales
    chosen = other_error < error
    return (
        tl.where(chosen, other_code, code),
        tl.where(chosen, other_value, value),
        tl.where(chosen, other_encode, encode),
    )


@triton.jit
def scales_of_rows(
    x,
    amax_bits,
    scales,
    FORMAT: tl.constexpr,
    SQUARE: tl.constexpr,
    ZEROS: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    PTX: tl.constexpr,
):
    """`triton_rounding.block_scales` of a flat tile's blocks along its columns.

    Args:
        x: (ROWS * C,) fp32.
        amax_bits: (ROWS * C / 16,) int32.
        scales: From `tensor_scales`.
        FORMAT: An NVFP4 format.
        SQUARE: 16x16 blocks.
        ZEROS: See `block_scales`.
        C: Columns of the tile.
        ROWS: Its rows.
        PTX: See triton_rounding.
    """
    first = block_scales(amax_bits, scales, ZEROS, PTX, FORMAT.block_targets[0])
    if len(FORMAT.block_targets) == 1:
        return first
    else:
        other = block_scales(amax_bits, scales, ZEROS, PTX, FORMAT.block_targets[1])
        error = block_errors(x, first[1], first[2], scales[0], ROWS * C)
        other_error = block_errors(x, other[1], other[2], scales[0], ROWS * C)
        if SQUARE:
            error = squares_of_rows(error, C // 16, ROWS)
            other_error = squares_of_rows(other_error, C // 16, ROWS)
        return better(other, first, other_error, error)


@triton.jit
def squares_of_rows(errors, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """Errors of a flat tile's blocks (ROWS * BLOCKS,) to those of its squares, repeated."""
    squares = tl.reshape(halving_sum(errors, ROWS // 16, BLOCKS), (ROWS // 16, 1, BLOCKS))
    squares = tl.broadcast_to(squares, (ROWS // 16, 16, BLOCKS))
    return tl.reshape(squares, (ROWS * BLOCKS,))


@triton.jit
def scales_of_columns(
    tile,
    amax_bits,
    scales,
    FORMAT: tl.constexpr,
    SQUARE: tl.constexpr,
    ZEROS: tl.constexpr,
    C: tl.constexpr,
    PTX: tl.constexpr,
):
    """As `scales_of_rows`, of blocks along the rows of a tile of 16 tensors: (C,) each."""
    first = block_scales(amax_bits, scales, ZEROS, PTX, FORMAT.block_targets[0])
    if len(FORMAT.block_targets) == 1:
        return first
    else:
        other = block_scales(amax_bits, scales, ZEROS, PTX, FORMAT.block_targets[1])
        error = column_errors(tile, first[1], first[2], scales[0])
        other_error = column_errors(tile, other[1], other[2], scales[0])
        if SQUARE:
            error = spread(halving_sum(error, C // 16, 1), C)
            other_error = spread(halving_sum(other_error, C // 16, 1), C)
        return better(other, first, other_error, error)
