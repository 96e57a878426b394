"""Where the Triton kernels' tiles lie, and how they are loaded.

A tile is 16 rows of C columns, held as a tuple of 16 tensors of C elements: what runs along rows
(the RHT, amax, packing and random bytes of an operand that contracts over tokens) is then
elementwise, without a shuffle or a transpose, and such an operand is written as it lies, tokens
first, which cuBLAS takes.

One numbering serves all inputs. Rows are cut into groups: one for a plain tensor, E of equal size
for experts (E, N, K) seen as (E * N, K), E that end at `offs` for tokens. Each group is padded to
blocks of 16 rows (numerics/grouped.py); a program works on one block, a *slot block*, so no block
crosses a group. Column operands are laid out by slots, row operands by rows.
"""

import triton
import triton.language as tl

from .triton_rounding import bits, number, round_bits


@triton.jit
def find_group(position, ends, starts, GROUPS: tl.constexpr):
    """Group that holds a position: index, start.

    Args:
        position: int32 scalar.
        ends: (GROUPS,) int32 group ends, non-decreasing.
        starts: (GROUPS,) int32 group starts.
        GROUPS: Power of two.
    """
    group = tl.sum((ends <= position).to(tl.int32), axis=0)
    mine = tl.arange(0, GROUPS) == group
    return group, tl.sum(tl.where(mine, starts, 0), axis=0)


@triton.jit
def group_bounds(offs_ptr, num_groups, GROUPS: tl.constexpr):
    """Starts, ends and ends of the groups' padded slots, (GROUPS,) int32 each."""
    index = tl.arange(0, GROUPS)
    inside = index < num_groups
    # Beyond the last group: empty groups at its end.
    last = tl.load(offs_ptr + num_groups - 1)
    ends = tl.load(offs_ptr + index, mask=inside, other=0)
    ends = tl.where(inside, ends, last)
    starts = tl.load(offs_ptr + index - 1, mask=inside & (index > 0), other=0)
    starts = tl.where(inside, starts, last)
    return starts, ends, tl.cumsum((ends - starts + 15) // 16 * 16, axis=0)


@triton.jit
def locate(slot_block, offs_ptr, rows, num_groups, GROUPS: tl.constexpr):
    """What a slot block holds: group, block in the group, first row of the group, its end.

    Args:
        slot_block: int32 scalar.
        offs_ptr: Group ends, with GROUPS > 0.
        rows: Rows of each group, with GROUPS == 0.
        num_groups: Number of groups.
        GROUPS: num_groups rounded up to a power of two, for tokens; 0 for equal groups.

    Returns:
        Four int32 scalars; the group is num_groups or more for slots that nothing needs.
    """
    if GROUPS == 0:
        per_group = (rows + 15) // 16
        group = slot_block // per_group
        return group, slot_block - group * per_group, group * rows, (group + 1) * rows
    else:
        starts, ends, slot_ends = group_bounds(offs_ptr, num_groups, GROUPS)
        sizes = (ends - starts + 15) // 16 * 16
        slot = slot_block * 16
        group, slot_start = find_group(slot, slot_ends, slot_ends - sizes, GROUPS)
        mine = tl.arange(0, GROUPS) == group
        start = tl.sum(tl.where(mine, starts, 0), axis=0)
        end = tl.sum(tl.where(mine, ends, 0), axis=0)
        return group, (slot - slot_start) // 16, start, end


@triton.jit
def below(index, limit, exists):
    """Mask of (n,) indices below a limit, empty unless the scalar `exists`."""
    # Not `(index < limit) & exists`: the interpreter has no boolean scalar beside a tensor.
    return index < tl.where(exists, limit, 0)


@triton.jit
def load_tile(x_ptr, stride, first_row, end, columns, K):
    """A tile as 16 fp32 tensors; zeros outside.

    Args:
        x_ptr: fp32, bf16 or fp16.
        stride: Elements from a row to the next.
        first_row: Row of the tile's first.
        end: End of the group's rows.
        columns: (C,) int32.
        K: Number of columns.
    """
    tile = ()
    for i in tl.static_range(16):
        row = first_row + i
        pointers = x_ptr + row.to(tl.int64) * stride + columns
        x = tl.load(pointers, mask=below(columns, K, row < end), other=0.0)
        tile = tile + (x.to(tl.float32),)
    return tile


@triton.jit
def as_bf16(tile, ROUND: tl.constexpr):
    """A tile rounded to bf16, as the RHT takes it; ROUND is false where it already is."""
    if ROUND:
        rounded = ()
        for i in tl.static_range(16):
            rounded = rounded + (number(round_bits(bits(tile[i]))),)
        return rounded
    else:
        return tile
