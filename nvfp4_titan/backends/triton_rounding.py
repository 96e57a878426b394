"""Arithmetic of the Triton kernels: scales, rounding, RHT and Philox, bit for bit the oracle's.

Every helper has a portable form (integers, additions, tl.div_rn) that runs in Triton's interpreter
and on any GPU. PTX, a constexpr, allows shorter forms: 0 none, 80 those of sm_80, 89 those of
sm_89. Each is equal by definition of its instructions, as its comment says.

E2M1 codes travel as *lanes*: int16 `sign << 15 | code << 6`, which are the bits of a bf16 number
that is the code's value times 2**-126 (both formats keep their mantissa below their exponent, and
subnormals below that). A GEMM operand is then one bf16 multiplication away, and two lanes fill a
register: the PTX forms work on two elements at a time. In the same way `code << 22` are the bits of
an fp32 number, and

    SR = (bits(a * 2**-126 truncated) + (r << 14)) cut to the code's bits

where the bits below the code's are the position between two grid points, in 1/2**22.

Kernels must be launched with enable_fp_fusion=False: a fused multiply-add rounds once where the
oracle rounds twice.
"""

import triton
import triton.language as tl

from ..formats import NVFP4, RHT_SIGNS

ENCODE_MAX = tl.constexpr(NVFP4.encode_max)
ELEMENT_MAX = tl.constexpr(NVFP4.element_max)
SCALE_MAX = tl.constexpr(NVFP4.scale_max)
FLT_MAX = tl.constexpr(3.4028234663852886e38)
NEGATIVE = tl.constexpr(sum(1 << i for i, sign in enumerate(RHT_SIGNS) if sign < 0))

EXPONENT_BITS = tl.constexpr(0x7F800000)
MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
SIGN_BIT = tl.constexpr(-0x80000000)
CODE_BITS = tl.constexpr(7 << 22)
NAN_SCALE = tl.constexpr(0x7F)
PHILOX_ROUNDS = tl.constexpr(7)

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
def bits(x):
    """The fp32 bits of x as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def number(b):
    """The fp32 number with int32 bits b."""
    return b.to(tl.float32, bitcast=True)


@triton.jit
def to_fp32(x):
    """A loaded number as fp32, exactly: the interpreter misreads subnormal bf16."""
    if x.dtype == tl.bfloat16:
        return number(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return x.to(tl.float32)


@triton.jit
def round_bits(b):
    """Bits of fp32 numbers rounded to bf16 (nearest, ties to even); NaN stays NaN.

    Source: adding half of what is cut off, less one where the kept part is even, carries as
    rounding does.
    """
    rounded = (b + 0x7FFF + ((b >> 16) & 1)) & -65536
    return tl.where((b & MAGNITUDE_BITS) > EXPONENT_BITS, b, rounded)


@triton.jit
def round_bf16(x, PTX: tl.constexpr):
    """fp32 rounded to bf16, as fp32."""
    if PTX >= 80:
        # Two at a time, unpacked at once: conversions one by one are four times slower.
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; "
            "and.b32 $1, t, 0xffff0000;}",
            "=f,=f,f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return number(round_bits(bits(x)))


@triton.jit
def e4m3_rtne(s, PTX: tl.constexpr):
    """Codes (int32) of non-negative fp32, nearest even, saturating at 448; NaN gives 0x7F."""
    if PTX >= 89:
        # One scale per conversion: ptxas 12.8 and 12.9 miscompile wider ones next to a decoding.
        return tl.inline_asm_elementwise(
            "{.reg .b16 t; cvt.rn.satfinite.e4m3x2.f32 t, 0f00000000, $1; cvt.u32.u16 $0, t;}",
            "=r,f",
            [s],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    b = bits(tl.minimum(s, SCALE_MAX))
    normal = ((b + 0x7FFFF + ((b >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 the step is 2**-9, that of fp32 numbers at 2**14.
    subnormal = bits(s + 16384.0) - 0x46800000
    code = tl.where(s < 0.015625, subnormal, normal)
    return tl.where(s != s, NAN_SCALE, code)


@triton.jit
def e4m3_finite(code):
    """fp32 values of e4m3 codes (int32) that are numbers."""
    # The bits of code << 20 are the value times 2**-120, subnormals included.
    return number(code << 20) * 1.329227995784916e36


@triton.jit
def e4m3_value(code):
    """fp32 values of e4m3 codes (int32); 0x7F is NaN."""
    return tl.where(code == NAN_SCALE, float("nan"), e4m3_finite(code))


@triton.jit
def reciprocal(x, lift, PTX: tl.constexpr):
    """1 / x, correctly rounded.

    Args:
        x: fp32.
        lift: fp32 power of two that brings x to between 2**-100 and 2**100.
        PTX: See the module.
    """
    if PTX >= 80:
        # What ptxas makes of rcp.rn.f32 where no exponent is extreme, without its branch (which
        # keeps one block from overlapping with the next). Powers of two commute with it.
        lifted = tl.inline_asm_elementwise(
            "{.reg .f32 r, e; rcp.approx.ftz.f32 r, $1; fma.rn.f32 e, $1, r, 0fBF800000; "
            "neg.f32 e, e; fma.rn.f32 $0, r, e, r;}",
            "=f,f",
            [x * lift],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return lifted * lift
    return tl.div_rn(1.0, x)


@triton.jit
def tensor_scales(amax):
    """Scales of a tensor (numerics/quantize.py) from its fp32 amax.

    Returns:
        s_enc, s_dec, and the power of two that brings s_dec to about 1.
    """
    encode = tl.div_rn(ENCODE_MAX, amax)
    encode = tl.where(encode > FLT_MAX, FLT_MAX, encode)
    encode = tl.where((amax == 0) | (encode == 0), 1.0, encode)
    decode = tl.div_rn(1.0, encode)
    # Clamped: s_dec is subnormal where s_enc is near FLT_MAX.
    lift = number((254 - tl.maximum((bits(decode) >> 23) & 0xFF, 1)) << 23)
    return encode, decode, lift


@triton.jit
def block_scales(amax_bits, scales, ZEROS: tl.constexpr, PTX: tl.constexpr):
    """Scales of blocks.

    Args:
        amax_bits: int32, bits of the blocks' amaxes.
        scales: From `tensor_scales`.
        ZEROS: Whether enc_b is 0 where S_b is; else it is any number, for codes that only count
            times S_b.
        PTX: See the module.

    Returns:
        e4m3 codes (int32), decode scales S_b (fp32), encode scales enc_b (fp32).
    """
    encode, decode, lift = scales
    scale = number(amax_bits) * (encode * (1 / 6))
    # An amax from outside may be finite where a block is not: saturating would hide it.
    if PTX >= 89:
        # By arithmetic, not by comparing: integer units are what these kernels wait for.
        scale = tl.fma(scale, 0.0, scale)
        code = e4m3_rtne(scale, PTX)
        value = tl.fma(scale, 0.0, e4m3_finite(code))
    else:
        scale = tl.where(amax_bits >= EXPONENT_BITS, float("nan"), scale)
        code = e4m3_rtne(scale, PTX)
        value = e4m3_value(code)
    block_encode = tl.minimum(reciprocal(value * decode, lift, PTX), FLT_MAX)
    if ZEROS:
        block_encode = tl.where(code == 0, 0.0, block_encode)
    return code, value, block_encode


@triton.jit
def e2m1_rtne(a):
    """`code << 22` of magnitudes a in [0, 6], nearest, ties to even."""
    # 1, 2 or 4: twice the step. An addend of 2**23 steps rounds to whole steps, ties to even; the
    # products are exact, so fused or not is the same.
    base = number(bits(tl.maximum(a, 1.0)) & EXPONENT_BITS)
    rounded = tl.fma(base, 4194304.0, a)
    return bits(tl.fma(base, -4194304.0, rounded) * 1.1754943508222875e-38)


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
def gemm_exponent(amax):
    """Exponent e of the power of two in GEMM operands, and what is left for alpha.

    Operands are `lut[q] * S_b * 2**e`, which bf16 holds exactly, with 2**e the power of two in the
    decode scale amax / 2688 (clamped): sums are then of the size of the result, and alpha, the
    product of the two remainders, is far from overflow and underflow.

    Args:
        amax: fp32.

    Returns:
        e (int32) and amax / 2688 / 2**e (fp32, exact; NaN and Inf stay).
    """
    scale = tl.div_rn(amax, ENCODE_MAX)
    exponent = ((bits(scale) >> 23) & 0xFF) - 127
    exponent = tl.minimum(tl.maximum(exponent, MIN_EXPONENT), MAX_EXPONENT)
    return exponent, scale * number((127 - exponent) << 23)


@triton.jit
def gemm_factor(amax):
    """2**(126 + e): a block's S_b times this turns lanes into the GEMM operand."""
    exponent, _ = gemm_exponent(amax)
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


@triton.jit
def signed_quarter(i: tl.constexpr):
    """The RHT's sign of element i, over the 4 that normalizes it."""
    if (NEGATIVE >> i) & 1:
        return -0.25
    else:
        return 0.25


@triton.jit
def rht_columns(tile):
    """The RHT along 16 tensors, unrounded.

    Args:
        tile: Tuple of 16 fp32 tensors holding bf16 values.

    Returns:
        Tuple of 16 fp32 tensors.
    """
    # Signs and the quarter are exact products: a fused multiply-add rounds as the addition does.
    t = ()
    for i in tl.static_range(0, 16, 2):
        second = tile[i + 1] * signed_quarter(i + 1)
        # Not `-second`, which is 0 - second and makes a zero positive.
        t = t + (
            tl.fma(tile[i], signed_quarter(i), second),
            tl.fma(tile[i], signed_quarter(i), second * -1.0),
        )
    for stage in tl.static_range(1, 4):
        n = ()
        for i in tl.static_range(16):
            if (i >> stage) & 1:
                n = n + (t[i ^ (1 << stage)] - t[i],)
            else:
                n = n + (t[i] + t[i ^ (1 << stage)],)
        t = n
    return t


@triton.jit
def rht_rows(x, SIZE: tl.constexpr):
    """The RHT along blocks of 16 of a (SIZE,) fp32 tensor holding bf16 values, unrounded."""
    sign = (NEGATIVE >> (tl.arange(0, SIZE) & 15)) & 1
    t = x * tl.where(sign == 1, -0.25, 0.25)
    for stage in tl.static_range(4):
        pairs = tl.reshape(t, (SIZE // (2 << stage), 2, 1 << stage))
        a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
        t = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (SIZE,))
    return t


@triton.jit
def bf16_mantissa(amax_bits):
    """The 7 mantissa bits of non-negative fp32 rounded to bf16."""
    return (round_bits(amax_bits) >> 16) & 0x7F


@triton.jit
def philox(row, block, mantissas, stream, key_low, key_high):
    """Philox4x32-7: four uint32 words for each block of 16, a byte per element.

    Args:
        row: int32, scalar or tensor.
        block: int32, broadcasts with row.
        mantissas: int32 of the result's shape: bf16_mantissa of block | of tensor << 7.
        stream: int32 scalar.
        key_low: int32 scalar.
        key_high: int32 scalar.
    """
    zero = mantissas * 0
    c0, c1 = (zero + row).to(tl.uint32, bitcast=True), (zero + block).to(tl.uint32, bitcast=True)
    c2, c3 = mantissas.to(tl.uint32, bitcast=True), (zero + stream).to(tl.uint32, bitcast=True)
    k0, k1 = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    m0: tl.constexpr = 0xD2511F53
    m1: tl.constexpr = 0xCD9E8D57
    for _ in tl.static_range(PHILOX_ROUNDS):
        # One instruction gives both halves of a product; umulhi would be another.
        p0, p1 = c0.to(tl.uint64) * m0, c2.to(tl.uint64) * m1
        high0, high1 = (p0 >> 32).to(tl.uint32), (p1 >> 32).to(tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1.to(tl.uint32), high0 ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3
