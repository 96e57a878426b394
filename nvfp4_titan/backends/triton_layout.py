"""Where the Triton kernels' tiles lie, and how they are loaded.

A tile is 16 rows of C columns, or 32 of half as many for blocks of 32. For an operand that
contracts over tokens it is held as a tuple of 16 (32) tensors of C elements: what runs along rows
(RHT, amax, packing, random bytes) is then elementwise, without a shuffle or a transpose, and the
operand is written as it lies, tokens first, which cuBLAS takes. For an operand that contracts along
columns the tile is loaded once more, out of the L1 cache, as one flat tensor: a thread then holds
half a block, and two share a block's scales and random words (in the tuple, four threads would each
work them out).

One numbering serves all inputs. Rows are cut into groups: one for a plain tensor, E of equal size
for experts (E, N, K) seen as (E * N, K), E that end at `offs` for tokens. Each group is padded to
blocks of 16 rows (numerics/grouped.py); a program works on one block, a *slot block*, so no block
crosses a group. Column operands are laid out by slots, row operands by rows.
"""

import triton
import triton.language as tl

from .triton_rounding import bits, number, round_bits, to_fp32


@triton.jit
def group_bounds(offs_ptr, num_groups, tail, GROUPS: tl.constexpr):
    """Starts and ends of the groups of tokens, (GROUPS,) int32 each.

    Args:
        offs_ptr: Group ends.
        num_groups: Number of groups; from here on, groups are empty but for the first, the tail.
        tail: End of the tail; offs[-1] or less for none.
        GROUPS: Power of two, at least num_groups (with a tail, more).
    """
    index = tl.arange(0, GROUPS)
    last = tl.load(offs_ptr + num_groups - 1)
    tail = tl.maximum(last, tail)
    ends = tl.load(offs_ptr + index, mask=index < num_groups, other=0)
    starts = tl.load(offs_ptr + index - 1, mask=(index > 0) & (index <= num_groups), other=0)
    return (
        tl.where(index <= num_groups, starts, tail),
        tl.where(index < num_groups, ends, tail),
    )


@triton.jit
def pick(values, index, GROUPS: tl.constexpr):
    """values[index] of (GROUPS,) int32, 0 beyond."""
    return tl.sum(tl.where(tl.arange(0, GROUPS) == index, values, 0), axis=0)


@triton.jit
def padded(sizes, BLOCK: tl.constexpr):
    """Sizes rounded up to blocks, and where blocks of each group end."""
    rounded = (sizes + (BLOCK - 1)) // BLOCK * BLOCK
    return rounded, tl.cumsum(rounded, axis=0)


@triton.jit
def locate(slot_block, offs_ptr, rows, num_groups, GROUPS: tl.constexpr, BLOCK: tl.constexpr = 16):
    """What a slot block holds: group, block in the group, first row of the group, its end.

    Args:
        slot_block: int32 scalar.
        offs_ptr: Group ends, with GROUPS > 0.
        rows: Rows of each group, with GROUPS < 2.
        num_groups: Number of groups.
        GROUPS: For tokens num_groups rounded up to a power of two, at least 2; 0 for equal groups;
            1 for one group of all rows.
        BLOCK: Slots of a slot block.

    Returns:
        Four int32 scalars; the group is num_groups or more for slots that nothing needs.
    """
    if GROUPS == 1:
        return 0, slot_block, 0, rows
    elif GROUPS == 0:
        per_group = (rows + (BLOCK - 1)) // BLOCK
        group = slot_block // per_group
        return group, slot_block - group * per_group, group * rows, (group + 1) * rows
    else:
        starts, ends = group_bounds(offs_ptr, num_groups, 0, GROUPS)
        sizes, slot_ends = padded(ends - starts, BLOCK)
        slot = slot_block * BLOCK
        group = tl.sum((slot_ends <= slot).to(tl.int32), axis=0)
        block = (slot - pick(slot_ends - sizes, group, GROUPS)) // BLOCK
        return group, block, pick(starts, group, GROUPS), pick(ends, group, GROUPS)


@triton.jit
def below(index, limit, exists):
    """Mask of (n,) indices below a limit, empty unless the scalar `exists`."""
    # Not `(index < limit) & exists`: the interpreter has no boolean scalar beside a tensor.
    return index < tl.where(exists, limit, 0)


@triton.jit
def all_or(mask, WHOLE: tl.constexpr):
    """True for every element where tiles are whole, which spares the masks; else a mask."""
    return tl.full(mask.shape, 1, tl.int1) if WHOLE else mask


@triton.jit
def load_tile(
    x_ptr, stride, first_row, end, columns, K, WHOLE: tl.constexpr, ROWS: tl.constexpr = 16
):
    """A tile as ROWS fp32 tensors; zeros outside.

    Args:
        x_ptr: fp32, bf16 or fp16.
        stride: Elements from a row to the next.
        first_row: Row of the tile's first.
        end: End of the group's rows.
        columns: (C,) int32.
        K: Number of columns.
        WHOLE: Whether every tile is ROWS rows of columns that exist.
        ROWS: Rows of the tile.
    """
    tile = ()
    # One address in 64 bits: what follows it is known when compiled, where tiles are whole.
    pointers = x_ptr + first_row.to(tl.int64) * stride + columns
    for i in tl.static_range(ROWS):
        inside = all_or(below(columns, K, first_row + i < end), WHOLE)
        x = tl.load(pointers + i * stride, mask=inside, other=0.0)
        tile = tile + (to_fp32(x),)
    return tile


@triton.jit
def flat_index(C: tl.constexpr, ROWS: tl.constexpr):
    """Row and column in the tile of a flat tile's elements, (ROWS * C,) int32 each."""
    index = tl.arange(0, ROWS * C)
    return index // C, index % C


@triton.jit
def load_flat(
    x_ptr,
    stride,
    first_row,
    end,
    column,
    K,
    C: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A tile as (ROWS * C,) fp32; arguments as `load_tile`'s, `column` the tile's first."""
    row, offset = flat_index(C, ROWS)
    pointers = x_ptr + first_row.to(tl.int64) * stride + column + (row * stride + offset)
    inside = all_or((row < end - first_row) & (offset < K - column), WHOLE)
    return to_fp32(tl.load(pointers, mask=inside, other=0.0))


@triton.jit
def as_bf16(x, ROUND: tl.constexpr):
    """fp32 rounded to bf16, as the RHT takes it; ROUND is false where it already is."""
    if ROUND:
        return number(round_bits(bits(x)))
    else:
        return x


@triton.jit
def tile_as_bf16(tile, ROUND: tl.constexpr):
    """`as_bf16` of a tuple of 16."""
    if ROUND:
        rounded = ()
        for i in tl.static_range(16):
            rounded = rounded + (as_bf16(tile[i], ROUND),)
        return rounded
    else:
        return tile
