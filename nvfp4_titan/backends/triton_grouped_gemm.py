"""Grouped GEMMs of experts, alpha applied per group in fp32 before the output cast.

    fprop, dgrad   (m, K) @ (K, N) -> (m, N) for the m rows of each group; rows of no group give 0
    wgrad          (N, p) @ (p, K) -> (N, K) for the p slots of each group

Operands are the bf16 values of triton_quantize.py, products are accumulated in fp32.

Not torch._grouped_mm: it has no alpha and rounds its sums to bf16. Scaling afterwards would round
twice (2.3e-3 relative Frobenius where one rounding gives 1.6e-3, of a bar of 3e-3), read and write
the output once more (19% of the forward at 16 experts, M=16384, K=2048, N=1408), and could not give
the fp32 gradients that an fp32 weight asks for.

A multiprocessor holds one program (its sums take all registers), so nothing hides what a program
does before and after its loop. Programs therefore stay and take tile after tile: where groups begin
is worked out once, the next tile's loads are issued while the last one's stores are on their way.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ..formats import BlockFormat
from .triton_call import Launch, Plans, cdiv, next_power_of_2
from .triton_launch import ptx_level
from .triton_layout import group_bounds, padded, pick
from .triton_quantize import load_amax
from .triton_rounding import number
from .triton_unpack import cast, remainder


@triton.jit
def operand(pointers, mask, WHOLE: tl.constexpr, PTX: tl.constexpr):
    """A tile of an operand as tl.dot takes it: bf16, or fp32 from int16 bits (interpreter).

    Without its mask where tiles are WHOLE: half of the loop's instructions are for masks.
    """
    x = tl.load(pointers) if WHOLE else tl.load(pointers, mask=mask, other=0)
    if PTX == 0:
        return number(x.to(tl.int32) << 16)
    else:
        return x


@triton.jit
def group_alpha(
    a_amax_ptr, b_amax_ptr, group, exists, A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr
):
    """Alpha of a group; any number for no group, whose sums are 0."""
    a = remainder(load_amax(a_amax_ptr, group, exists, A_FORMAT), A_FORMAT)
    b = remainder(load_amax(b_amax_ptr, group, exists, B_FORMAT), B_FORMAT)
    return a * b


@triton.jit
def _grouped_mm_kernel(
    a_ptr,
    b_ptr,
    y_ptr,
    a_amax_ptr,
    b_amax_ptr,
    offs_ptr,
    rows,
    columns,
    inner,
    num_groups,
    stride_a,
    stride_b,
    stride_expert,
    A_FORMAT: tl.constexpr,
    B_FORMAT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PTX: tl.constexpr,
):
    """WHOLE: inner is a multiple of BK, and columns one of BN where b is not transposed."""
    column_tiles = tl.cdiv(columns, BN)
    starts, ends = group_bounds(offs_ptr, num_groups, rows, GROUPS)
    sizes, tile_ends = padded(ends - starts, BM)
    tiles = tl.max(tile_ends, axis=0) // BM * column_tiles
    k = tl.arange(0, BK)
    wide_stride = tl.full((), stride_b, tl.int64)
    for program in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile = program // column_tiles
        group = tl.sum((tile_ends <= tile * BM).to(tl.int32), axis=0)
        first = tile * BM - pick(tile_ends - sizes, group, GROUPS) + pick(starts, group, GROUPS)
        end = pick(ends, group, GROUPS)
        exists = group < num_groups
        m = first + tl.arange(0, BM)
        n = (program % column_tiles) * BN + tl.arange(0, BN)
        # What rows and columns beyond the end give is not stored: they are clamped where that is
        # cheaper than a mask. (Along the dim that lies together it would hide that it does.)
        a_places = (tl.minimum(m, rows - 1).to(tl.int64) * stride_a)[:, None] + k[None, :]
        b_base = b_ptr + tl.where(exists, group, 0).to(tl.int64) * stride_expert
        if TRANSPOSED:
            b_rows = tl.minimum(n, columns - 1).to(tl.int64) * stride_b
            b_places = k[:, None] + b_rows[None, :]
        else:
            b_places = k[:, None] * stride_b + n[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, tl.where(exists, inner, 0), BK):
            left = inner - start
            # Addresses from a scalar that moves: pointers that move are an addition each.
            a = operand(a_ptr + start + a_places, k[None, :] < left, WHOLE, PTX)
            b_mask = k[:, None] < left
            if not TRANSPOSED:
                b_mask = b_mask & (n[None, :] < columns)
            b_step = start if TRANSPOSED else start * wide_stride
            b = operand(b_base + b_step + b_places, b_mask, WHOLE, PTX)
            # (BM, BK) @ (BK, BN) -> (BM, BN)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        acc = acc * group_alpha(a_amax_ptr, b_amax_ptr, group, exists, A_FORMAT, B_FORMAT)
        y_pointers = y_ptr + m.to(tl.int64)[:, None] * columns + n[None, :]
        inside = (m[:, None] < end) & (n[None, :] < columns)
        tl.store(y_pointers, cast(acc, y_ptr.dtype.element_ty, PTX), mask=inside)


@triton.jit
def _grouped_wgrad_kernel(
    dy_ptr,
    x_ptr,
    dw_ptr,
    dy_amax_ptr,
    x_amax_ptr,
    offs_ptr,
    N,
    K,
    num_groups,
    A_FORMAT: tl.constexpr,
    B_FORMAT: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PTX: tl.constexpr,
):
    """WHOLE: N is a multiple of BM and K one of BN."""
    row_tiles, column_tiles = tl.cdiv(N, BM), tl.cdiv(K, BN)
    starts, ends = group_bounds(offs_ptr, num_groups, 0, GROUPS)
    sizes, slot_ends = padded(ends - starts, A_FORMAT.block)
    tiles = num_groups * row_tiles * column_tiles
    k = tl.arange(0, BK)
    wide_n, wide_k = tl.full((), N, tl.int64), tl.full((), K, tl.int64)
    for program in range(tl.program_id(0), tiles, tl.num_programs(0)):
        group = program // (row_tiles * column_tiles)
        tile = program % (row_tiles * column_tiles)
        end = pick(slot_ends, group, GROUPS)
        first = end - pick(sizes, group, GROUPS)
        m = (tile // column_tiles) * BM + tl.arange(0, BM)
        n = (tile % column_tiles) * BN + tl.arange(0, BN)
        dy_places, x_places = k[:, None] * N + m[None, :], k[:, None] * K + n[None, :]
        m_inside, n_inside = m[None, :] < N, n[None, :] < K
        acc = tl.zeros((BM, BN), tl.float32)
        last = first + (end - first) // BK * BK
        for start in range(first, last, BK):
            dy = operand(dy_ptr + start * wide_n + dy_places, m_inside, WHOLE, PTX)
            x = operand(x_ptr + start * wide_k + x_places, n_inside, WHOLE, PTX)
            # (BM, BK) @ (BK, BN) -> (BM, BN)
            acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
        if last < end:
            # Both masked: a NaN of the next group must not meet a zero.
            mine = (last + k < end)[:, None]
            dy = operand(dy_ptr + last * wide_n + dy_places, mine & m_inside, False, PTX)
            x = operand(x_ptr + last * wide_k + x_places, mine & n_inside, False, PTX)
            acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
        acc = acc * group_alpha(dy_amax_ptr, x_amax_ptr, group, True, A_FORMAT, B_FORMAT)
        rows = group.to(tl.int64) * N + m
        inside = (m[:, None] < N) & (n[None, :] < K)
        dw_pointers = dw_ptr + rows[:, None] * K + n[None, :]
        tl.store(dw_pointers, cast(acc, dw_ptr.dtype.element_ty, PTX), mask=inside)


@dataclass(frozen=True)
class GemmTile:
    """Tile of a grouped GEMM and how it is run."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    programs: int = 1
    """Programs that a multiprocessor holds."""

    def constants(self, device: torch.device) -> dict[str, int]:
        """What its kernels end their constants with."""
        return {"BM": self.BM, "BN": self.BN, "BK": self.BK, "PTX": ptx_level(device)}

    def options(self) -> dict[str, int]:
        """How it is launched."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


_GEMMS = Plans()
# Three programs, so that each takes several tiles.
INTERPRETED = GemmTile(32, 32, 32, 1, 1, 3)
AMPERE = GemmTile(128, 128, 32, 8, 4, 2)
HOPPER = GemmTile(128, 256, 64, 8, 3)


def gemm_tile(device: torch.device) -> GemmTile:
    """The tile for a device."""
    if ptx_level(device) == 0:
        return INTERPRETED
    # By shared memory: 228 KiB on sm_90 and sm_100, less on others.
    return HOPPER if torch.cuda.get_device_capability(device)[0] in (9, 10) else AMPERE


@cache
def _programs(device: torch.device, tile: GemmTile) -> int:
    """Programs that a device holds at once."""
    if ptx_level(device) == 0:
        return tile.programs
    return tile.programs * torch.cuda.get_device_properties(device).multi_processor_count


def _format_constants(formats: tuple[BlockFormat, BlockFormat]) -> dict[str, BlockFormat]:
    return {"A_FORMAT": formats[0], "B_FORMAT": formats[1]}


def _dot_input(values: torch.Tensor) -> torch.Tensor:
    """Operand as the kernels take it: the interpreter multiplies no bf16."""
    return values.view(torch.int16) if ptx_level(values.device) == 0 else values


def grouped_mm_triton(
    a: torch.Tensor,
    b: torch.Tensor,
    a_amax: torch.Tensor | None,
    b_amax: torch.Tensor | None,
    offs: torch.Tensor,
    b_transposed: bool,
    columns: int,
    out_dtype: torch.dtype,
    formats: tuple[BlockFormat, BlockFormat],
) -> torch.Tensor:
    """Multiply each group's rows by its expert.

    Args:
        a: (M, >= inner) bf16 values, contiguous.
        b: (E, inner, >= columns) bf16 values, contiguous; (E, columns, inner) with b_transposed.
        a_amax: (E,) fp32; None for a format without a scale per tensor.
        b_amax: Likewise.
        offs: (E,) int32 group ends.
        b_transposed: See b.
        columns: Columns of the result.
        out_dtype: Result's dtype.
        formats: Of a and b.

    Returns:
        (M, columns).
    """
    rows, groups = a.shape[0], offs.shape[0]
    y = torch.empty((rows, columns), dtype=out_dtype, device=a.device)
    if not y.numel():
        return y
    inner = b.shape[2 if b_transposed else 1]
    kind = (a.shape, b.shape, b_transposed, columns, out_dtype, formats, a.device)
    gemm = _GEMMS.get(kind)
    if gemm is None:
        tile = gemm_tile(a.device)
        # Every group, and the rows of none, may end in an incomplete tile.
        tiles = (cdiv(rows, tile.BM) + groups) * cdiv(columns, tile.BN)
        whole = inner % tile.BK == 0 and (b_transposed or columns % tile.BN == 0)
        constants = {
            **_format_constants(formats),
            "TRANSPOSED": b_transposed,
            "WHOLE": whole,
            "GROUPS": next_power_of_2(groups + 1),
            **tile.constants(a.device),
        }
        strides = (a.shape[1], b.shape[2], b.shape[1] * b.shape[2])
        sizes = (rows, columns, inner, groups, *strides)
        programs = min(tiles, _programs(a.device, tile))
        gemm = _GEMMS.make(
            kind,
            lambda: Launch(_grouped_mm_kernel, programs, constants, sizes, **tile.options()),
        )
    gemm(_dot_input(a), _dot_input(b), y, a_amax, b_amax, offs, *gemm.sizes)
    return y


def grouped_wgrad_triton(
    dy: torch.Tensor,
    x: torch.Tensor,
    dy_amax: torch.Tensor | None,
    x_amax: torch.Tensor | None,
    offs: torch.Tensor,
    out_dtype: torch.dtype,
    formats: tuple[BlockFormat, BlockFormat],
) -> torch.Tensor:
    """Weight gradient of each expert.

    Args:
        dy: (P, N) bf16 values by slots (numerics/grouped.py), contiguous.
        x: (P, K) bf16 values, likewise.
        dy_amax: (E,) fp32; None for a format without a scale per tensor.
        x_amax: Likewise.
        offs: (E,) int32 group ends.
        out_dtype: Result's dtype.
        formats: Of dy and x.

    Returns:
        (E, N, K), zeros for empty groups.
    """
    groups, n, k = offs.shape[0], dy.shape[1], x.shape[1]
    dw = torch.empty((groups, n, k), dtype=out_dtype, device=dy.device)
    kind = (n, k, groups, out_dtype, formats, dy.device)
    gemm = _GEMMS.get(kind)
    if gemm is None:
        tile = gemm_tile(dy.device)
        constants = {
            **_format_constants(formats),
            "WHOLE": n % tile.BM == 0 and k % tile.BN == 0,
            "GROUPS": next_power_of_2(groups),
            **tile.constants(dy.device),
        }
        tiles = groups * cdiv(n, tile.BM) * cdiv(k, tile.BN)
        programs = min(tiles, _programs(dy.device, tile))
        gemm = _GEMMS.make(
            kind,
            lambda: Launch(
                _grouped_wgrad_kernel, programs, constants, (n, k, groups), **tile.options()
            ),
        )
    gemm(_dot_input(dy), _dot_input(x), dw, dy_amax, x_amax, offs, *gemm.sizes)
    return dw
