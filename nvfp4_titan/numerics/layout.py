"""Block-scale layout that the native block-scaled GEMMs take (SWIZZLE_32_4_4).

Scales of a (rows, K / 16) matrix are padded to (128, 4) tiles; each tile of 512 is stored as
32 x 4 x 4, so that one 16-byte load feeds one tensor-core row group. Tiles of a row of tiles follow
each other, so that matrices of whole tiles' rows, one below the other, are one matrix.

Source: cuBLAS documentation, "1D block scaling factors layout".
"""

import torch

TILE_ROWS, TILE_COLUMNS = 128, 4


def blocked_shape(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of block scales padded to whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS


def to_blocked(scale: torch.Tensor) -> torch.Tensor:
    """Swizzle block scales for a native GEMM.

    Args:
        scale: (rows, columns), one byte per element (float8_e4m3fn or uint8); any sizes.

    Returns:
        1D tensor of roundup(rows, 128) * roundup(columns, 4) elements, same dtype, zero padded.
    """
    rows, columns = scale.shape
    padded_rows, padded_columns = blocked_shape(rows, columns)
    padded = torch.zeros(padded_rows, padded_columns, dtype=torch.uint8, device=scale.device)
    padded[:rows, :columns] = scale.view(torch.uint8)
    tiles = padded.view(
        padded_rows // TILE_ROWS, 4, 32, padded_columns // TILE_COLUMNS, TILE_COLUMNS
    )
    # (tile row, row // 32, row % 32, tile column, column) -> (.., row % 32, row // 32, column)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scale.dtype)


def from_blocked(blocked: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Inverse of `to_blocked`: back to (rows, columns), padding dropped."""
    padded_rows, padded_columns = blocked_shape(rows, columns)
    tile_columns = padded_columns // TILE_COLUMNS
    tiles = blocked.view(torch.uint8)[: padded_rows * padded_columns]
    tiles = tiles.view(padded_rows // TILE_ROWS, tile_columns, 32, 4, TILE_COLUMNS)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_columns)
    return plain[:rows, :columns].contiguous().view(blocked.dtype)
