"""MXFP8 blocks: E8M0 scales (powers of two) and E4M3 codes, bit for bit, on any device.

With v_b = max |x| of a block of 32, exponents biased by 127 (a byte; 255 is NaN):

    rounded up     s = exponent of v_b / 448, one more unless that is a power of two    at most 254
    rounded down   s = exponent of v_b, less 8 (448 = 1.75 * 2**8)                      at least 0
    q     = e4m3(clamp(x * 2**(127 - s), -448, 448))
    x_hat = q * 2**(s - 127)

Rounded up nothing saturates; rounded down what exceeds 448/512 of a binade does (OCP's rule). At
s = 0 TransformerEngine and torchao encode by 1 when rounding up and by 2**126 when rounding down,
not by 2**127: such blocks (v_b below 2.7e-36) become zeros, or halve. The bits follow them.

NaN leaves as NaN, in the whole block; Inf as Inf: 448 * 2**127, or 448 * 2**120, is past FLT_MAX.

Bits are read from the exponent field, with no logarithm, so they are the same everywhere, and are
those of Blackwell's `cvt.rp.satfinite.ue8m0x2.f32`. torchao's `to_mx` (0.18, RCEIL, eager) takes
ceil(log2(v_b / 448)) in fp32: the same for every bf16 input, but for fp32 values a few ulp above
448 * 2**k the logarithm rounds to k, and the largest of the block then saturates there.

Sources: OCP Microscaling Formats 1.0, section 6.3; cuBLAS, "1D block scaling"; TransformerEngine
b7598aa8, `common/util/ptx.cuh` (Apache-2.0); torchao 0.18, `mx_formats/mx_tensor.py` (BSD-3).
"""

import torch

from ..formats import MXFP8, BlockFormat

_MANTISSA_BITS, _NAN = 23, 255
_MANTISSA = (1 << _MANTISSA_BITS) - 1
_ELEMENT_EXPONENT = 8  # of the largest E4M3 power of two, 256


def block_scales(block_amax: torch.Tensor, fmt: BlockFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode scales (float8_e8m0fnu) and encode scales (fp32) of blocks.

    Args:
        block_amax: (R, B) fp32, non-negative.
        fmt: An MXFP8 format; its `scale_rounding` is "up" or "down".

    Returns:
        2**(s - 127) and what x is multiplied by, both (R, B).
    """
    if fmt.scale_rounding == "up":
        # Tensor by tensor: a GPU divides by a scalar as a product with its reciprocal, 1 ulp off.
        ratio = torch.div(block_amax, torch.full_like(block_amax, fmt.element_max))
        bits = ratio.view(torch.int32)
        exponent, mantissa = bits >> _MANTISSA_BITS, bits & _MANTISSA
        # Below 2**-126 the field holds no leading one: 2**-127 is its upper bit.
        above = torch.where(exponent == 0, mantissa > 1 << (_MANTISSA_BITS - 1), mantissa > 0)
        exponent = (exponent + above).clamp(max=_NAN - 1)
        at_zero, at_nan = 1.0, torch.nan
    else:
        exponent = (block_amax.view(torch.int32) >> _MANTISSA_BITS) - _ELEMENT_EXPONENT
        exponent = exponent.clamp(min=0)
        at_zero, at_nan = 2.0**126, 0.0  # NaN * 0 is NaN, the others become 0
    # 2**(127 - s) has exponent field 254 - s; at s = 254, for Inf alone, it is subnormal.
    field = 254 - exponent
    encode = torch.where(field > 0, field << _MANTISSA_BITS, 1 << (_MANTISSA_BITS - 1))
    encode = torch.where(exponent == 0, at_zero, encode.view(torch.float32))
    nan = block_amax.isnan()
    exponent = torch.where(nan, _NAN, exponent)
    encode = torch.where(nan, at_nan, encode)
    return exponent.to(torch.uint8).view(fmt.scale_dtype), encode


def encode_blocks(t: torch.Tensor, block_encode: torch.Tensor) -> torch.Tensor:
    """E4M3 codes (R, K) of (R, K), given (R, K / 32) encode scales.

    Args:
        t: (R, K) floating, K % 32 == 0.
        block_encode: (R, K / 32) fp32.
    """
    limit = MXFP8.element_max
    scaled = t.view(*block_encode.shape, MXFP8.block).to(torch.float32) * block_encode.unsqueeze(-1)
    return scaled.clamp_(-limit, limit).to(MXFP8.code_dtype).view(t.shape)
