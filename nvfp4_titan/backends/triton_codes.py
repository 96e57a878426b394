"""E2M1 codes in the Triton kernels: rounding to them, packing, and operands of emulated GEMMs.

E2M1 codes travel as *lanes*: int16 `sign << 15 | code << 6`, which are the bits of a bf16 number
that is the code's value times 2**-126 (both formats keep their mantissa below their exponent, and
subnormals below that). A GEMM operand is then one bf16 multiplication away, and two lanes fill a
register: the PTX forms work on two elements at a time. In the same way `code << 22` are the bits of
an fp32 number, and

    SR = (bits(a * 2**-126 truncated) + (r << 14)) cut to the code's bits

where the bits below the code's are the position between two grid points, in 1/2**22.

PTX is as in triton_rounding.py.
"""

import triton
import triton.language as tl

from .triton_rounding import ELEMENT_MAX, ENCODE_MAX, EXPONENT_BITS, bits, number

SIGN_BIT = tl.constexpr(-0x80000000)
CODE_BITS = tl.constexpr(7 << 22)

# Powers of two that GEMM operands are multiplied by: below, the fp32 factor of a block overflows;
# above, nothing is gained. See gemm_exponent.
MIN_EXPONENT, MAX_EXPONENT = tl.constexpr(-100), tl.constexpr(-8)


# Lanes to the nearest of two products. Adding 1.5 * 2**23 steps rounds to whole steps, ties to
# even, whatever the sign; of 1, 2 or 4, the step is half. What became zero has lost its sign.
_RTNE = """{.reg .f32 a<2>, m<2>, r<2>; .reg .b32 p, s, c;
    mul.rn.f32 a0, $1, $3;  mul.rn.f32 a1, $2, $4;
    abs.f32 m0, a0;  abs.f32 m1, a1;
    max.f32 m0, m0, 0f3F800000;  max.f32 m1, m1, 0f3F800000;
    and.b32 m0, m0, 0x7F800000;  and.b32 m1, m1, 0x7F800000;
    fma.rn.f32 r0, m0, 0f4AC00000, a0;  fma.rn.f32 r1, m1, 0f4AC00000, a1;
    fma.rn.f32 r0, m0, 0fCAC00000, r0;  fma.rn.f32 r1, m1, 0fCAC00000, r1;
    cvt.rn.bf16x2.f32 p, r1, r0;
    mov.b32 c, 0x40C040C0;
    min.xorsign.abs.bf16x2 p, p, c;
    mov.b32 c, 0x00800080;  mov.b32 s, 0x80008000;
    fma.rn.bf16x2 p, p, c, s;
    """
RTNE = tl.constexpr(_RTNE + "mov.b32 $0, p;}")
RTNE_SIGNED = tl.constexpr(
    _RTNE + "prmt.b32 s, a0, a1, 0x7632;  lop3.b32 $0, s, p, 0x80008000, 0xE4;}"
)


@triton.jit
def e2m1_nearest(a):
    """Magnitudes a in [0, 6] rounded to E2M1, ties to even."""
    # 1, 2 or 4: twice the step. An addend of 2**23 steps rounds to whole steps, ties to even; the
    # products are exact, so fused or not is the same.
    base = number(bits(tl.maximum(a, 1.0)) & EXPONENT_BITS)
    rounded = tl.fma(base, 4194304.0, a)
    return tl.fma(base, -4194304.0, rounded)


@triton.jit
def e2m1_rtne(a):
    """`code << 22` of magnitudes a in [0, 6], nearest, ties to even."""
    return bits(e2m1_nearest(a) * 1.1754943508222875e-38)


@triton.jit
def e2m1_sr(a, random, PTX: tl.constexpr):
    """`code << 22` of magnitudes a in [0, 6], stochastically.

    Args:
        a: fp32.
        random: int32, a random byte shifted left by 14.
        PTX: See the module.
    """
    if PTX >= 80:
        # Truncated to multiples of 2**-149; what the byte is compared with are multiples of 2**-135
        # (below 2**-126) or lie in an exact product.
        position = bits(
            tl.inline_asm_elementwise(
                "mul.rz.f32 $0, $1, 0f00800000;",
                "=f,f",
                [a],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        )
    else:
        position = tl.where(a < 1, (a * 512).to(tl.int32) << 14, bits(a) - (126 << 23))
    return (position + random) & CODE_BITS


@triton.jit
def e2m1(x, encode, word, byte, SR: tl.constexpr, ZEROS: tl.constexpr, PTX: tl.constexpr):
    """Lanes of x * encode.

    Args:
        x: fp32.
        encode: fp32 of x's shape, encode scales.
        word: uint32 of x's shape, random bits; read with SR.
        byte: int32, which byte of the word is the element's, 0 to 3.
        SR: Stochastic rounding.
        ZEROS: Whether zeros keep their sign.
        PTX: See the module.
    """
    if SR and PTX >= 89:
        # The position in half precision: 2**-14 makes [0, 1) subnormal, so that the code's three
        # bits and nine of the position follow each other; truncation keeps the eight that count.
        return tl.inline_asm_elementwise(
            """{.reg .f32 a<2>; .reg .b32 h, r, s, t;
            mul.rn.f32 a0, $1, $3;  mul.rn.f32 a1, $2, $4;
            mul.rn.f32 a0, a0, 0f38800000;  mul.rn.f32 a1, a1, 0f38800000;
            cvt.rz.f16x2.f32 h, a1, a0;
            mov.b32 t, 0x0E000E00;
            min.xorsign.abs.f16x2 h, h, t;
            mad.lo.u32 s, $8, 256, $7;  add.u32 s, s, 1024;
            prmt.b32 r, $5, $6, s;  and.b32 r, r, 0x00FF00FF;
            mad.lo.u32 h, r, 2, h;
            shr.u32 t, h, 3;
            lop3.b32 t, t, h, 0x01C001C0, 0xE4;
            and.b32 $0, t, 0x81C081C0;}""",
            "=r,f,f,f,f,r,r,r,r",
            [x, encode, word, byte],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    if PTX >= 89:
        return tl.inline_asm_elementwise(
            RTNE_SIGNED if ZEROS else RTNE,
            "=r,f,f,f,f",
            [x, encode],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    scaled = x * encode
    magnitude = tl.minimum(tl.abs(scaled), ELEMENT_MAX)
    if SR:
        random = ((word >> (byte * 8)) & 0xFF).to(tl.int32, bitcast=True) << 14
        code = e2m1_sr(magnitude, random, PTX)
    else:
        code = e2m1_rtne(magnitude)
    return ((code | (bits(scaled) & SIGN_BIT)) >> 16).to(tl.int16)


@triton.jit
def pack_codes(even, odd, PTX: tl.constexpr):
    """Bytes (uint8) that hold two codes each, the even element's low, from lanes."""
    if PTX >= 89:
        return tl.inline_asm_elementwise(
            """{.reg .b32 e<2>, o<2>, t;
            shl.b32 e0, $1, 2;  shr.u32 t, $1, 4;  lop3.b32 e0, e0, t, 0x07000700, 0xE4;
            shl.b32 o0, $3, 6;  lop3.b32 o0, $3, o0, 0x80008000, 0xE4;
            lop3.b32 e0, o0, e0, 0xF000F000, 0xE4;
            shl.b32 e1, $2, 2;  shr.u32 t, $2, 4;  lop3.b32 e1, e1, t, 0x07000700, 0xE4;
            shl.b32 o1, $4, 6;  lop3.b32 o1, $4, o1, 0x80008000, 0xE4;
            lop3.b32 e1, o1, e1, 0xF000F000, 0xE4;
            prmt.b32 $0, e0, e1, 0x7531;}""",
            "=r,r,r,r,r",
            [even, odd],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    low, high = even.to(tl.int32), odd.to(tl.int32)
    low = ((low >> 6) & 7) | ((low >> 12) & 8)
    high = ((high >> 6) & 7) | ((high >> 12) & 8)
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def unpack_codes(codes, factor, PTX: tl.constexpr):
    """GEMM operands of packed codes.

    Args:
        codes: uint8, two codes each.
        factor: int16 of the same shape, from `gemm_factor_bits`.
        PTX: See the module.

    Returns:
        bf16 bits (int16) of the even (low) and of the odd (high) elements.
    """
    if PTX >= 89:
        return tl.inline_asm_elementwise(
            """{.reg .b32 p, t, u, z;
            mov.b32 z, 0x80008000;
            prmt.b32 p, $4, 0, 0x4140;
            shl.b32 t, p, 6;  shl.b32 u, p, 12;  lop3.b32 t, t, u, 0x01C001C0, 0xE4;
            and.b32 t, t, 0x81C081C0;  fma.rn.bf16x2 $0, t, $5, z;
            shl.b32 t, p, 2;  shl.b32 u, p, 8;  lop3.b32 t, t, u, 0x01C001C0, 0xE4;
            and.b32 t, t, 0x81C081C0;  fma.rn.bf16x2 $2, t, $5, z;
            prmt.b32 p, $4, 0, 0x4342;
            shl.b32 t, p, 6;  shl.b32 u, p, 12;  lop3.b32 t, t, u, 0x01C001C0, 0xE4;
            and.b32 t, t, 0x81C081C0;  fma.rn.bf16x2 $1, t, $6, z;
            shl.b32 t, p, 2;  shl.b32 u, p, 8;  lop3.b32 t, t, u, 0x01C001C0, 0xE4;
            and.b32 t, t, 0x81C081C0;  fma.rn.bf16x2 $3, t, $6, z;}""",
            "=&r,=&r,=&r,=&r,r,r,r",
            [codes, factor],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=4,
        )
    pair = codes.to(tl.int32)
    even = ((pair & 7) << 6) | ((pair & 8) << 12)
    odd = ((pair & 0x70) << 2) | ((pair & 0x80) << 8)
    even, odd = even.to(tl.int16), odd.to(tl.int16)
    return gemm_bits(even, factor, PTX), gemm_bits(odd, factor, PTX)


@triton.jit
def gemm_exponent(amax, MAX: tl.constexpr = ENCODE_MAX):
    """Exponent e of the power of two in GEMM operands, and what is left for alpha.

    Operands are `lut[q] * S_b * 2**e`, which bf16 holds exactly, with 2**e the power of two in the
    decode scale amax / MAX (clamped): sums are then of the size of the result, and alpha, the
    product of the two remainders, is far from overflow and underflow.

    Args:
        amax: fp32.
        MAX: encode_max of the operand's format.

    Returns:
        e (int32) and amax / MAX / 2**e (fp32, exact; NaN and Inf stay).
    """
    scale = tl.div_rn(amax, MAX)
    exponent = ((bits(scale) >> 23) & 0xFF) - 127
    exponent = tl.minimum(tl.maximum(exponent, MIN_EXPONENT), MAX_EXPONENT)
    return exponent, scale * number((127 - exponent) << 23)


@triton.jit
def gemm_factor(amax, MAX: tl.constexpr):
    """2**(126 + e): a block's S_b times this turns lanes into the GEMM operand."""
    exponent, _ = gemm_exponent(amax, MAX)
    return number((253 + exponent) << 23)


@triton.jit
def gemm_factor_bits(value, factor):
    """bf16 bits (int16) of S_b (fp32) times `gemm_factor`, exact."""
    return (bits(value * factor) >> 16).to(tl.int16)


@triton.jit
def gemm_bits(lanes, factor, PTX: tl.constexpr):
    """bf16 bits (int16) of GEMM operands.

    Args:
        lanes: int16.
        factor: int16 of the same shape, from `gemm_factor_bits`.
        PTX: See the module.
    """
    # At most 6 significant bits, and none subnormal: exact.
    if PTX >= 89:
        return tl.inline_asm_elementwise(
            "{.reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z;}",
            "=r,r,r",
            [lanes, factor],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    value = number(lanes.to(tl.int32) << 16) * number(factor.to(tl.int32) << 16)
    return (bits(value) >> 16).to(tl.int16)
