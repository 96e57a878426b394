"""The operands that the native GEMMs take: their shapes, and how the oracle's become them.

    codes    (.., R, Kp / 2) uint8, contraction last, Kp the contraction padded to 64 with zeros
    scales   blocked (numerics/layout.py), R padded to 128: one matrix, or one per expert
    groups   row operands: dense rows, whose scales start a row of tiles per group;
             column operands: groups padded to 64 slots (64 of zeros for an empty one), and one
             blocked matrix of scales per group, one after the other

64 elements are four block scales, what one word of the blocked layout holds; torch asks for 32.

Source: torch's `aten/src/ATen/native/cuda/GroupedBlas.cpp` (checks of shapes) and FBGEMM's
`f4f4bf16_grouped`, set_grouped_gemm_args_kernel (where a group's operands start).
"""

from dataclasses import replace

import torch

from ..formats import BLOCK
from ..numerics import QuantizedOperand, from_blocked, to_blocked
from ..numerics.grouped import blocked_rows, padded_ends, padded_rows, plain_token_scale
from ..numerics.layout import TILE_ROWS, blocked_shape

PAD = 64
"""Elements that a contraction, and a group of it, is padded to."""


def padded_size(size: int) -> int:
    """A contraction's size padded for the GEMMs."""
    return -(-size // PAD) * PAD


def slot_ends(offs: torch.Tensor) -> torch.Tensor:
    """(E,) int32 ends of the groups of a column operand, in slots."""
    return padded_ends(offs, PAD, least=PAD)


def operand_shapes(
    shape: torch.Size, groups: int | None, columns: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of an operand's codes and blocked scales.

    Args:
        shape: (M, K) of a tensor, or (E, N, K) of experts.
        groups: E for tokens in groups, else None.
        columns: Whether the contraction runs along the dim before the last.
    """
    *outer, rows, size = shape
    if columns:
        rows, size = size, rows
    contraction = padded_size(size)
    if columns and groups is not None:
        contraction = padded_rows(size, groups, PAD)
    scale_rows, scale_columns = blocked_shape(rows, contraction // BLOCK)
    if not columns and groups is not None:
        scale_rows += TILE_ROWS * groups
    return (*outer, rows, contraction // 2), (*outer, scale_rows * scale_columns)


def _padded(t: torch.Tensor, columns: int) -> torch.Tensor:
    """2D bytes with zeros up to `columns`; copies only where some are missing."""
    missing = columns - t.shape[1]
    return torch.nn.functional.pad(t, (0, missing)) if missing else t


def from_oracle(
    codes: torch.Tensor, scale: torch.Tensor, offs: torch.Tensor | None, columns: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of the oracle in the native layout.

    Args:
        codes: (R, Kp / 2) or (E, R, Kp / 2), as numerics has them.
        scale: Block scales, likewise; or already blocked.
        offs: Group ends of tokens.
        columns: Whether it is a column operand.
    """
    if codes.dim() == 3:
        pairs = [from_oracle(*pair, None, columns) for pair in zip(codes, scale, strict=True)]
        return tuple(torch.stack(part) for part in zip(*pairs, strict=True))
    size = padded_size(2 * codes.shape[1])
    if scale.dim() < codes.dim():
        return codes, scale
    raw = scale.view(torch.uint8)
    if offs is None:
        blocked = to_blocked(_padded(raw, size // BLOCK))
        return _padded(codes, size // 2), blocked.view(scale.dtype)
    if columns:
        return _padded_groups(codes, raw, offs, scale.dtype)
    rows = blocked_shape(codes.shape[0], 1)[0] + TILE_ROWS * offs.shape[0]
    apart = raw.new_zeros((rows, size // BLOCK))
    apart[blocked_rows(offs, codes.shape[0]), : raw.shape[1]] = raw
    return _padded(codes, size // 2), to_blocked(apart).view(scale.dtype)


def _padded_groups(
    codes: torch.Tensor, scale: torch.Tensor, offs: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A column operand of groups padded to 16 slots as one of groups padded to 64."""
    groups = offs.shape[0]
    rows, total = codes.shape[0], 2 * codes.shape[1]
    slots = padded_rows(total - BLOCK * groups, groups, PAD)
    new_codes = codes.new_zeros((rows, slots // 2))
    padded = blocked_shape(rows, 1)[0]
    new_scale = scale.new_zeros(padded * slots // BLOCK)
    start = new_start = 0
    ends = zip(padded_ends(offs, BLOCK).tolist(), slot_ends(offs).tolist(), strict=True)
    for end, new_end in ends:
        size = end - start
        new_codes[:, new_start // 2 : (new_start + size) // 2] = codes[:, start // 2 : end // 2]
        part = _padded(scale[:, start // BLOCK : end // BLOCK], (new_end - new_start) // BLOCK)
        begin = padded * new_start // BLOCK
        new_scale[begin : begin + padded * part.shape[1]] = to_blocked(part)
        start, new_start = end, new_end
    return new_codes, new_scale.view(dtype)


def plain_operand(
    operand: QuantizedOperand, offs: torch.Tensor | None, columns: bool
) -> QuantizedOperand:
    """A packed operand as the oracle has it, whatever layout its backend keeps; to look into it.

    The inverse of `from_oracle`. With groups of columns it waits for the device.

    Args:
        operand: With codes.
        offs: Group ends of tokens.
        columns: Whether it is a column operand.
    """
    codes, scale = operand.codes, operand.block_scale
    if scale.dim() == codes.dim():
        return operand
    if offs is None:
        scale = operand.plain_scale
    elif columns:
        return replace(operand, **_plain_groups(operand, offs))
    else:
        scale = plain_token_scale(operand, offs)
    blocks = -(-operand.K // BLOCK)
    return replace(
        operand, codes=codes[..., : blocks * BLOCK // 2], block_scale=scale[..., :blocks]
    )


def _plain_groups(operand: QuantizedOperand, offs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inverse of `_padded_groups`."""
    rows, slots = operand.codes.shape[0], padded_rows(operand.K, offs.shape[0], BLOCK)
    codes = operand.codes.new_zeros((rows, slots // 2))
    scale = torch.zeros((rows, slots // BLOCK), dtype=torch.uint8, device=codes.device)
    start = kept_start = 0
    ends = zip(padded_ends(offs, BLOCK).tolist(), slot_ends(offs).tolist(), strict=True)
    for end, kept_end in ends:
        pair = operand.codes, operand.block_scale.view(torch.uint8)
        group_codes, group_scale = group_of_columns(*pair, kept_start, kept_end)
        codes[:, start // 2 : end // 2] = group_codes[:, : (end - start) // 2]
        scale[:, start // BLOCK : end // BLOCK] = group_scale[:, : (end - start) // BLOCK]
        start, kept_start = end, kept_end
    return {"codes": codes, "block_scale": scale.view(operand.block_scale.dtype)}


def group_of_columns(
    codes: torch.Tensor, scale: torch.Tensor, start: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and plain scales of the slots from start to end of a column operand in groups."""
    rows = codes.shape[0]
    padded, columns = blocked_shape(rows, (end - start) // BLOCK)
    begin = padded * start // BLOCK
    part = scale.reshape(-1)[begin : begin + padded * columns]
    return codes[:, start // 2 : end // 2], from_blocked(part, rows, columns)
