"""Element and scale rounding: E2M1 by RTNE and SR, E4M3 by RTNE, and packing of codes.

Both E2M1 roundings use one observation: with a = |x| in [0, 6], the position on the grid
(0, .5, 1, 1.5, 2, 3, 4, 6), counted in codes, is min(2a, a + 2, a/2 + 4). Steps are powers of two,
so each of the three is exact where it is the smallest, and rounding is monotone, so the minimum may
be taken after rounding. Ties go to the even code, which is the even mantissa.

SR goes up iff floor(256 f) + r >= 256 for a random byte r, f being the position between two grid
points: by truncation on purpose (an fp32 `a + u*step` can round across a grid point), so
P(up) = floor(256 f)/256 exactly, a bias toward zero below step/256.

Checked against NVIDIA's host conversions (cuda_fp4.h, cuda_fp8.h) in tests/.
"""

import torch

from ..formats import NVFP4


def e2m1_rtne(a: torch.Tensor) -> torch.Tensor:
    """Round magnitudes to E2M1 codes, nearest, ties to even.

    Args:
        a: fp32, any shape, in [0, 6] (NaN gives an arbitrary code).

    Returns:
        uint8 codes 0..7, same shape.
    """
    code = (a * 2).round_()
    # The steps of 1 and 2, folded in one at a time so that one scratch buffer serves both.
    scratch = a.round()
    torch.minimum(code, scratch.add_(2), out=code)
    torch.mul(a, 0.5, out=scratch)
    torch.minimum(code, scratch.round_().add_(4), out=code)
    return code.to(torch.uint8)


def e2m1_sr(a: torch.Tensor, random_byte: torch.Tensor) -> torch.Tensor:
    """Round magnitudes to E2M1 codes stochastically.

    Args:
        a: fp32, any shape, in [0, 6] (NaN gives an arbitrary code).
        random_byte: int16, same shape, uniform in [0, 255].

    Returns:
        uint8 codes 0..7, same shape.
    """
    # Positions in 1/256 of a code: floor(512a), floor(256a) + 512, floor(128a) + 1024.
    position = (a * 512).to(torch.int16)
    other = (position >> 1).add_(512)
    position_wide = position >> 2
    torch.minimum(position, other, out=position)
    torch.minimum(position, position_wide.add_(1024), out=position)
    return position.add_(random_byte).bitwise_right_shift_(8).to(torch.uint8)


def e4m3_rtne(scale: torch.Tensor) -> torch.Tensor:
    """Round non-negative fp32 to float8_e4m3fn, nearest even, saturating at 448; NaN stays NaN.

    Clamped first: torch 2.11 casts what overflows to NaN, torch 2.13 saturates.
    """
    return scale.clamp(max=NVFP4.scale_max).to(torch.float8_e4m3fn)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Pack E2M1 codes two to a byte, the even element in the low nibble.

    Args:
        codes: (..., K) uint8 in 0..15, contiguous, K % 2 == 0.

    Returns:
        (..., K / 2) uint8.
    """
    pair = codes.view(torch.int16)  # low byte: even element
    return (pair | (pair >> 4)).bitwise_and_(0xFF).to(torch.uint8)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack_codes`: (..., K / 2) uint8 to (..., K) uint8."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def _code_pairs(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(256, 2) values of the two codes in every byte.

    Computed on the device: a table copied there would make the host wait, and one kept there would
    be a cache to keep right.
    """
    byte = torch.arange(256, device=device)
    code = torch.stack((byte & 0xF, byte >> 4), dim=-1)
    magnitude = code & 7
    # In quarters: subnormals 0 and 0.5, then (2 + mantissa) * 2**exponent.
    quarters = torch.where(magnitude < 2, magnitude * 2, (2 + (magnitude & 1)) << (magnitude >> 1))
    return (torch.where(code < 8, quarters, -quarters) / 4).to(dtype)


def decode_codes(packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of packed E2M1 codes: (..., K / 2) uint8 to (..., K) of `dtype` (exact in bf16)."""
    table = _code_pairs(packed.device, dtype)
    pairs = table.index_select(0, packed.reshape(-1).to(torch.int32))
    return pairs.view(*packed.shape[:-1], packed.shape[-1] * 2)
