"""Quantizing for grouped GEMMs: every group (expert) as if its tokens stood alone.

Tokens of group g are the rows offs[g-1] .. offs[g]; rows after the last group are padding that no
result depends on. Each group has its own amax, and SR is keyed by the position inside the group, so
that an expert's bits depend on its own tokens and not on its neighbours, its rank or its number.

For wgrad the contraction runs over tokens: each group is padded with zeros to whole blocks of 16
(MXFP8: 32), in one buffer of a size that depends on shapes alone, so that no block, and no Hadamard
transform, crosses a group. Everything is computed on the device of `offs`, without reading it.
"""

from dataclasses import dataclass

import torch

from ..formats import BLOCK
from ..recipe import OperandFormat
from .layout import TILE_ROWS, blocked_shape, from_blocked
from .quantize import (
    QuantizedOperand,
    block_amaxes,
    prepare,
    quantize_blocks,
    random_bytes,
    scaled_values,
)


@dataclass(frozen=True)
class GroupLayout:
    """Where the rows of M tokens in E groups lie, plain and padded to blocks.

    Attributes:
        row_group: (M,) int64 group of each row; E for the padding after the last group.
        row_in_group: (M,) int64 position of each row in its group.
        slot_row: (P,) int64 row that each padded slot holds; M for none.
        block_group: (P / block,) int64 group of each block of slots; E for none.
        block_in_group: (P / block,) int64 position of each block in its group.
    """

    row_group: torch.Tensor
    row_in_group: torch.Tensor
    slot_row: torch.Tensor
    block_group: torch.Tensor
    block_in_group: torch.Tensor


def padded_rows(rows: int, groups: int, block: int = BLOCK) -> int:
    """Slots that hold any split of `rows` into `groups`, each padded to whole blocks."""
    return (rows + block - 1) // block * block + block * groups


def group_layout(offs: torch.Tensor, rows: int, block: int = BLOCK) -> GroupLayout:
    """Layout of `rows` tokens in groups that end at `offs`.

    Args:
        offs: (E,) int32 cumulative group ends, non-decreasing, at most `rows`.
        rows: M.
        block: Size of the format's blocks.
    """
    groups, device = offs.shape[0], offs.device
    ends = offs.to(torch.int64)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    sizes = (ends - starts + block - 1) // block * block
    padded_ends = sizes.cumsum(0)
    # One more group, E, for what belongs to none.
    starts = torch.cat((starts, ends[-1:]))
    padded_starts = torch.cat((padded_ends - sizes, padded_ends[-1:]))
    row = torch.arange(rows, device=device)
    row_group = torch.searchsorted(ends, row, right=True)
    slot = torch.arange(padded_rows(rows, groups, block), device=device)
    slot_group = torch.searchsorted(padded_ends, slot, right=True)
    in_group = slot - padded_starts[slot_group]
    size = torch.cat((ends, ends[-1:])) - starts
    slot_row = torch.where(in_group < size[slot_group], starts[slot_group] + in_group, rows)
    return GroupLayout(
        row_group=row_group,
        row_in_group=row - starts[row_group],
        slot_row=slot_row,
        block_group=slot_group[::block],
        block_in_group=in_group[::block] // block,
    )


def padded_ends(offs: torch.Tensor, block: int, least: int = 0) -> torch.Tensor:
    """(E,) int32 ends of groups padded to whole blocks, and to `least` slots where they are less.

    Args:
        offs: (E,) int32 cumulative group ends.
        block: Slots of a block.
        least: 0, or whole blocks that every group has.
    """
    sizes = torch.diff(offs, prepend=offs.new_zeros(1))
    sizes = ((sizes + block - 1) // block * block).clamp(min=least)
    return sizes.cumsum(0, dtype=torch.int32)


def blocked_rows(offs: torch.Tensor, rows: int) -> torch.Tensor:
    """(M,) int64: where the native layout keeps the scales of each row of M tokens in groups.

    Each group's rows begin a row of tiles (numerics/layout.py); rows of no group follow the last.
    """
    ends = torch.cat((offs, offs.new_full((1,), rows)))
    starts = torch.cat((offs.new_zeros(1), offs))
    padded = padded_ends(ends, TILE_ROWS)
    padded_starts = torch.cat((offs.new_zeros(1), padded[:-1]))
    row = torch.arange(rows, device=offs.device)
    group = torch.searchsorted(ends.to(torch.int64), row, right=True)
    return row - starts[group] + padded_starts[group]


def quantize_tokens(
    t: torch.Tensor,
    layout: GroupLayout,
    groups: int,
    fmt: OperandFormat,
    key: int,
    stream: int,
    transpose: bool,
    amax: torch.Tensor | None = None,
    first_column: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize activations or gradients group by group.

    Args:
        t: (M, K) floating.
        layout: `group_layout` of the groups.
        groups: E.
        fmt: Format, in blocks of one row; for `transpose` the layout must be of its block size.
        key: SR key (used with rounding "sr").
        stream: SR stream.
        transpose: False for the contraction along K; True along tokens, padded group by group.
        amax: (E,) fp32 to use in place of the groups' own, as reduced over ranks that share t.
        first_column: Global index of t's first column, where t is a shard.

    Returns:
        codes, block_scale (M, Kp / block) or (K, P / block), amax (E,) fp32.
    """
    prepared, block_amax, group = _prepare_tokens(t, layout, fmt, transpose)
    if amax is None:
        amax = _group_amax(block_amax, group, groups, transpose)
    spread = None
    if fmt.format.tensor_scale:
        # Rows of no group: nothing depends on their scale.
        spread = torch.cat((amax, amax.new_ones(1)))[group].unsqueeze(0 if transpose else 1)
    random_byte = None
    if fmt.rounding == "sr":
        rows, blocks = block_amax.shape
        if transpose:
            row = torch.arange(first_column, first_column + rows, device=t.device)
            block = layout.block_in_group
        else:
            first_block = first_column // fmt.format.block
            row = layout.row_in_group
            block = torch.arange(first_block, first_block + blocks, device=t.device)
        random_byte = random_bytes(key, stream, spread, block_amax, row, block)
    codes, scale = quantize_blocks(prepared, block_amax, spread, random_byte, fmt)
    return codes, scale, amax


def token_amaxes(
    t: torch.Tensor, layout: GroupLayout, groups: int, fmt: OperandFormat, transpose: bool
) -> torch.Tensor:
    """Amax (E,) fp32 of each group's operand; see `quantize_tokens`."""
    _, block_amax, group = _prepare_tokens(t, layout, fmt, transpose)
    return _group_amax(block_amax, group, groups, transpose)


def _prepare_tokens(
    t: torch.Tensor, layout: GroupLayout, fmt: OperandFormat, transpose: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A prepared operand, its block amaxes, and the group of its rows (blocks if transposed)."""
    if transpose:
        # A row of zeros at the end is what slots of no row hold.
        t = torch.cat((t, t.new_zeros(1, t.shape[1])))[layout.slot_row]
    size = fmt.format.block
    prepared = prepare(t, rht=fmt.rht, transpose=transpose, block=size)
    group = layout.block_group if transpose else layout.row_group
    return prepared, block_amaxes(prepared, block=size), group


def quantize_experts(
    w: torch.Tensor,
    fmt: OperandFormat,
    key: int,
    stream: int,
    transpose: bool,
    amax: torch.Tensor | None = None,
    offset: tuple[int, int] = (0, 0),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize expert weights, each with its own amax and its own blocks.

    Args:
        w: (E, N, K) floating.
        fmt: Format.
        key: SR key (used with rounding "sr").
        stream: SR stream.
        transpose: False for the contraction along K, True along N.
        amax: (E,) fp32 to use in place of the experts' own, as reduced over ranks that share w.
        offset: Global (row, column) of an expert's first element, where w is a shard.

    Returns:
        codes, block_scale (E, N, Kp / block), amax (E,) fp32; N and K swapped with `transpose`.
    """
    prepared, block_amax, shape, rows = _prepare_experts(w, fmt, transpose)
    amax = block_amax.view(shape).amax((1, 2)) if amax is None else amax
    spread = None
    if fmt.format.tensor_scale:
        spread = amax.repeat_interleave(shape[1]).unsqueeze(1)
    random_byte = None
    if fmt.rounding == "sr":
        first_row, first_column = reversed(offset) if transpose else offset
        row = torch.arange(first_row, first_row + shape[1], device=w.device).repeat(shape[0])
        blocks, first_block = block_amax.shape[1], first_column // fmt.format.block
        block = torch.arange(first_block, first_block + blocks, device=w.device)
        random_byte = random_bytes(key, stream, spread, block_amax, row, block)
    codes, scale = quantize_blocks(prepared, block_amax, spread, random_byte, fmt)
    codes, scale = codes.view(shape)[:, :rows], scale.view(shape)[:, :rows]
    return codes.contiguous(), scale.contiguous(), amax


def expert_amaxes(w: torch.Tensor, fmt: OperandFormat, transpose: bool) -> torch.Tensor:
    """Amax (E,) fp32 of each expert's operand; see `quantize_experts`."""
    _, block_amax, shape, _ = _prepare_experts(w, fmt, transpose)
    return block_amax.view(shape).amax((1, 2))


def _prepare_experts(
    w: torch.Tensor, fmt: OperandFormat, transpose: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, int], int]:
    """A prepared operand of all experts in one matrix, its block amaxes, its 3D shape, its rows."""
    if transpose:
        w = w.transpose(1, 2)
    experts, rows, columns = w.shape
    # Square blocks must not reach into the next expert.
    missing = -rows % fmt.block[0]
    flat = torch.nn.functional.pad(w, (0, 0, 0, missing)).reshape(-1, columns)
    size = fmt.format.block
    prepared = prepare(flat, rht=fmt.rht, block=size)
    block_amax = block_amaxes(prepared, fmt.block[0], size)
    return prepared, block_amax, (experts, rows + missing, -1), rows


def dequantize_tokens(
    operand: QuantizedOperand, offs: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """x_hat of activations or gradients that were quantized group by group along K.

    Args:
        operand: (M, K), with an amax per group.
        offs: (E,) int32 cumulative group ends.
        dtype: Result's dtype; computed in fp32.

    Returns:
        (M, K) of `dtype`; rows of no group are 0.
    """
    values = scaled_values(operand.codes, plain_token_scale(operand, offs), fmt=operand.format)
    rows = torch.arange(values.shape[0], device=offs.device)
    group = torch.searchsorted(offs.to(torch.int64), rows, right=True)
    scale = operand.global_scale
    scale = torch.ones_like(offs, dtype=torch.float32) if scale is None else scale
    scale = torch.cat((scale, scale.new_zeros(1)))[group].unsqueeze(1)
    # where, not a product with 0: padding may hold NaN.
    values = torch.where(group.unsqueeze(1) < offs.shape[0], values * scale, 0.0)
    return values[:, : operand.K].to(dtype)


def plain_token_scale(operand: QuantizedOperand, offs: torch.Tensor) -> torch.Tensor:
    """(M, Kp / block) scales of tokens in groups, whatever layout they are kept in."""
    if operand.block_scale.dim() == operand.codes.dim():
        return operand.block_scale
    row = blocked_rows(offs, operand.codes.shape[0])
    columns = operand.codes.shape[1] * operand.format.codes_per_byte // operand.format.block
    rows = operand.block_scale.numel() // blocked_shape(1, columns)[1]
    plain = from_blocked(operand.block_scale, rows, columns).view(torch.uint8)
    return plain[row].view(operand.block_scale.dtype)


def _group_amax(
    block_amax: torch.Tensor, group: torch.Tensor, groups: int, transpose: bool
) -> torch.Tensor:
    """Amax (groups,) of block amaxes (R, B) by their rows' (their blocks') group; NaN stays."""
    part_amax = block_amax.amax(0 if transpose else 1)
    # One more for what belongs to no group.
    amax = part_amax.new_zeros(groups + 1).scatter_reduce_(0, group, part_amax, "amax")
    # Whether scatter_reduce's amax propagates NaN differs between devices; a sum always does.
    special = torch.where(part_amax.isfinite(), 0.0, part_amax)
    return (amax + torch.zeros_like(amax).scatter_add_(0, group, special))[:groups]
