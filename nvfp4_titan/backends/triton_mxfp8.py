"""MXFP8 in the Triton kernels: scales, codes, and operands of emulated GEMMs.

The bits are the oracle's (numerics/mxfp8.py). An operand of a GEMM is `code * 2**(s - 127)` itself:
4 significant bits times a power of two, which bf16 holds exactly down to 2**-126 (below, both round
to its subnormal numbers). There is no scale per tensor, so that nothing is left for alpha, and no
amax to take first: a tensor is read once.

Values come from rounding on the grid in fp32, not from decoding the codes: ptxas 12.8 and 12.9
miscompile f32 -> e4m3 -> f32 where the e4m3 is stored too.

PTX is as in triton_rounding.py.
"""

import triton
import triton.language as tl

from .triton_codes import SIGN_BIT
from .triton_rounding import (
    EXPONENT_BITS,
    SCALE_MAX,
    bits,
    e4m3_finite,
    e4m3_rtne,
    number,
    round_bits,
)


@triton.jit
def mxfp8_scales(amax_bits, FORMAT: tl.constexpr):
    """Scales of blocks.

    Args:
        amax_bits: int32, bits of the blocks' amaxes.
        FORMAT: MXFP8 or MXFP8_FLOOR.

    Returns:
        s (int32), and what encodes, 2**(127 - s) (fp32; see numerics/mxfp8.py for s = 0).
    """
    if FORMAT.scale_rounding == "up":
        # 448 is 1.75 * 2**8: an amax of a larger mantissa than 1.75 needs the next power. The
        # quotient of the oracle is rounded, which shows at one number: just above 448 * 2**-127 it
        # is 2**-127.
        exponent = tl.maximum(((amax_bits + 0x1FFFFF) >> 23) - 8, 0)
        exponent = tl.where(amax_bits == 0x04600001, 0, exponent)
        exponent = tl.where(amax_bits == EXPONENT_BITS, 254, exponent)
        at_zero: tl.constexpr = 1.0
    else:
        exponent = tl.maximum((amax_bits >> 23) - 8, 0)
        at_zero: tl.constexpr = 8.507059173023462e37  # 2**126
    exponent = tl.where(amax_bits > EXPONENT_BITS, 255, exponent)
    field = tl.maximum(254 - exponent, 0) << 23
    encode = tl.where(exponent == 0, at_zero, number(tl.where(field == 0, 1 << 22, field)))
    return exponent, encode


@triton.jit
def mxfp8_decode(exponent):
    """2**(s - 127) of scales s (int32), fp32; NaN for 255."""
    decode = number(tl.where(exponent == 0, 1 << 22, exponent << 23))
    return tl.where(exponent == 255, float("nan"), decode)


@triton.jit
def bf16_bits(x, PTX: tl.constexpr):
    """bf16 bits (int16) of fp32 numbers, rounded to nearest even."""
    if PTX >= 80:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;",
            "=r,f,f",
            [x],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    return (round_bits(bits(x)) >> 16).to(tl.int16)


@triton.jit
def e4m3_values(x, encode, decode, PTX: tl.constexpr):
    """GEMM operands of x: bf16 bits (int16).

    Args:
        x: fp32.
        encode: fp32 of x's shape, from `mxfp8_scales`.
        decode: fp32 of x's shape, from `mxfp8_decode`.
        PTX: See the module.
    """
    scaled = x * encode
    a = tl.minimum(tl.abs(scaled), SCALE_MAX)
    # 8 times the step, which is 2**-9 below 2**-6. An addend of 2**23 steps rounds to whole steps,
    # ties to even; the products are exact, so fused or not is the same.
    base = number(bits(tl.maximum(a, 0.015625)) & EXPONENT_BITS)
    nearest = tl.fma(base, -1048576.0, tl.fma(base, 1048576.0, a))
    return bf16_bits(number(bits(nearest) | (bits(scaled) & SIGN_BIT)) * decode, PTX)


@triton.jit
def e4m3_codes(x, encode, PTX: tl.constexpr):
    """Codes (uint8) of x; arguments as `e4m3_values`'."""
    scaled = x * encode
    if PTX >= 89:
        codes = tl.inline_asm_elementwise(
            "{.reg .b16 t; .reg .b32 u; cvt.rn.satfinite.e4m3x2.f32 t, $2, $1; "
            "cvt.u32.u16 u, t; prmt.b32 $0, u, 0, 0x4140;}",
            "=r,f,f",
            [scaled],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
        return codes.to(tl.uint8)
    code = e4m3_rtne(tl.abs(scaled), PTX)
    return (code | ((bits(scaled) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def unpack_e4m3(codes, decode, PTX: tl.constexpr):
    """GEMM operands (bf16 bits, int16) of codes (uint8) and decode scales of their shape."""
    code = codes.to(tl.int32)
    magnitude = e4m3_finite(code & 0x7F)
    sign = (code & 0x80) << 24
    return bf16_bits(number(bits(magnitude) | sign) * decode, PTX)
