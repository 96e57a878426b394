"""Fake quantization to integers in groups, in one kernel: what int8 and int4 QAT runs on a GPU.

    s = max(amax / largest, eps)     q = round(clamp(x / s, low, high))     y = q * s

Every result is rounded to x's dtype, as PyTorch does op by op; the codecs of nvfp4_titan.deploy
define the bits. A compiler that fuses these ops leaves such roundings out, and another integer
comes out of it: hence a kernel of ours, and an op that is opaque.
"""

import torch
import triton
import triton.language as tl

from .triton_call import cdiv, launch, next_power_of_2
from .triton_launch import ptx_level
from .triton_rounding import MAGNITUDE_BITS, bits, number, round_bf16, round_bits, to_fp32
from .triton_unpack import cast

_TILE, _WARPS = 4096, 4


@triton.jit
def _int_groups_kernel(
    x_ptr,
    y_ptr,
    rows,
    SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    EPS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ROUND: tl.constexpr,
    COUNT: tl.constexpr,
    C: tl.constexpr,
    PTX: tl.constexpr,
):
    """Round COUNT groups (rows of SIZE, C padded to a power of two) to integers and back."""
    row = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)[:, None]
    column = tl.arange(0, C)[None, :]
    inside = (row < rows) & (column < SIZE)
    index = row * SIZE + column
    x = to_fp32(tl.load(x_ptr + index, mask=inside, other=0.0))
    # As integers, so that a NaN is the largest.
    amax = number(tl.max(bits(x) & MAGNITUDE_BITS, axis=1))[:, None]
    scale = tl.div_rn(amax, tl.full((COUNT, 1), LARGEST, tl.float32))
    if ROUND:
        scale = number(round_bits(bits(scale)))
    scale = tl.where(scale < EPS, EPS, scale)
    q = tl.div_rn(x, tl.broadcast_to(scale, (COUNT, C)))
    if ROUND:
        q = round_bf16(q, PTX)
    q = tl.where(q < LOW, LOW, tl.where(q > HIGH, HIGH, q))
    # NaN has no integer; its scale is NaN. The sum rounds to an integer, ties to even.
    q = tl.where(q == q, q + 12582912.0, 12582912.0) - 12582912.0
    tl.store(y_ptr + index, cast(q * scale, y_ptr.dtype.element_ty, PTX), mask=inside)


def int_groups_triton(
    x: torch.Tensor, group: int, largest: float, eps: float, low: int, high: int
) -> torch.Tensor:
    """Round x to integers and back.

    Args:
        x: (..., K) bf16 or fp32, contiguous.
        group: Elements of a group; K is a multiple of it.
        largest: What amax is divided by.
        eps: Least scale.
        low: Least integer.
        high: Largest integer.

    Returns:
        As x.
    """
    y = torch.empty_like(x)
    if not x.numel():
        return y
    width = next_power_of_2(group)
    constants = {
        "SIZE": group,
        "LARGEST": largest,
        "EPS": eps,
        "LOW": float(low),
        "HIGH": float(high),
        "ROUND": x.dtype == torch.bfloat16,
        "COUNT": max(1, _TILE // width),
        "C": width,
        "PTX": ptx_level(x.device),
    }
    rows = x.numel() // group
    warps = max(_WARPS, min(16, width // 1024))
    programs = cdiv(rows, constants["COUNT"])
    launch(_int_groups_kernel, programs, (x, y, rows), constants, num_warps=warps)
    return y
