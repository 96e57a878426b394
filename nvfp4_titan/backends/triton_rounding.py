"""Arithmetic of the Triton kernels: scales, rounding, RHT and Philox, bit for bit the oracle's.

Every helper has a portable form (integers, additions, tl.div_rn) that runs in Triton's interpreter
and on any GPU. PTX, a constexpr, allows shorter forms: 0 none, 80 those of sm_80, 89 those of
sm_89. Each is equal by definition of its instructions, as its comment says.

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
NAN_SCALE = tl.constexpr(0x7F)
PHILOX_ROUNDS = tl.constexpr(7)


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
def tensor_scales(amax, MAX: tl.constexpr = ENCODE_MAX):
    """Scales of a tensor (numerics/nvfp4.py) from its fp32 amax, which is mapped onto MAX.

    Returns:
        s_enc, s_dec, and the power of two that brings s_dec to about 1.
    """
    encode = tl.div_rn(MAX, amax)
    encode = tl.where(encode > FLT_MAX, FLT_MAX, encode)
    encode = tl.where((amax == 0) | (encode == 0), 1.0, encode)
    decode = tl.div_rn(1.0, encode)
    # Clamped: s_dec is subnormal where s_enc is near FLT_MAX.
    lift = number((254 - tl.maximum((bits(decode) >> 23) & 0xFF, 1)) << 23)
    return encode, decode, lift


@triton.jit
def block_scales(
    amax_bits,
    scales,
    ZEROS: tl.constexpr,
    PTX: tl.constexpr,
    TARGET: tl.constexpr = ELEMENT_MAX,
):
    """Scales of blocks.

    Args:
        amax_bits: int32, bits of the blocks' amaxes.
        scales: From `tensor_scales`.
        ZEROS: Whether enc_b is 0 where S_b is; else it is any number, for codes that only count
            times S_b.
        PTX: See the module.
        TARGET: Magnitude of a code that a block's amax is mapped to.

    Returns:
        e4m3 codes (int32), decode scales S_b (fp32), encode scales enc_b (fp32).
    """
    encode, decode, lift = scales
    scale = number(amax_bits) * (encode * (1 / TARGET))
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
def load_key(key_ptr, SR: tl.constexpr):
    """The SR key, int64 in memory, where a CUDA graph finds that of the layer it is replayed for.

    Read once for each use of a tile: held for longer, its registers are missed elsewhere.
    """
    if SR:
        return tl.load(key_ptr)
    else:
        return 0


@triton.jit
def random_words(row, block, block_amax, amax, stream, key):
    """Four uint32 words for the 16 elements of each block: `philox` with their mantissas.

    Args:
        row: int32, the blocks' row in SR counters.
        block: int32, their block in SR counters.
        block_amax: int32 bits of their amaxes.
        amax: fp32 scalar, of the tensor.
        stream: See philox.
        key: int64 scalar, from `load_key`.
    """
    mantissas = bf16_mantissa(block_amax) | (bf16_mantissa(bits(amax)) << 7)
    return philox(row, block, mantissas, stream, key.to(tl.int32), (key >> 32).to(tl.int32))


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
