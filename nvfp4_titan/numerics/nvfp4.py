"""NVFP4 blocks: scales and codes, bit for bit, on any device.

All in fp32, in this order (v_b: max |x| of a block; decode scales unless marked `enc`):

    s_enc = min(2688 / amax, FLT_MAX), 1 if amax == 0 or s_enc == 0        s_dec = 1 / s_enc
    S_b   = e4m3(min(v_b * (s_enc * (1/6)), 448))
    enc_b = min(1 / (S_b * s_dec), FLT_MAX), 0 if S_b == 0
    q     = e2m1(clamp(x * enc_b, -6, 6))
    x_hat = lut[q] * S_b * (amax / 2688)

Two details are easy to simplify wrongly: the product `s_enc * (1/6)` comes first, and the scale
that encodes is derived from the *rounded* S_b. There is no lower clamp on S_b: a block far below
the tensor's amax underflows to zeros (where TransformerEngine's codes saturate: compare values
there). With a single level of scales s_enc is 1, and amax is not part of x_hat.

Four over six ("nvfp4_46"): 1536 = 6 * 256 in place of 2688, and two candidates per block,

    S_6 = e4m3(min(v_b * (s_enc * (1/6)), 448))      S_4 = e4m3(min(v_b * (s_enc * (1/4)), 448))

each with its own enc and its own codes rounded to nearest. The one with the smaller squared error

    err = sum over the block of (lut[q] * S - x * s_enc) ** 2

wins, 6 in a tie. 1536 because the block that holds the tensor's amax then has S_6 = 256 and
S_4 = 384, both exact in E4M3; with 2688 its S_4 would be 672, past E4M3's 448. The error is summed
in units of 1 / s_enc, so that it cannot overflow, by halving (element i with i + 8, then i + 4, ..;
the 16 rows of a 16x16 block likewise), every product and sum rounded to fp32 (no fused
multiply-add): any device that follows gets the same choice. It looks at rounding to nearest even
where codes are rounded stochastically: a choice that saw the random bits would bias them.

Sources: TransformerEngine d0067d0d, `common/cast/nvfp4/core_nvfp4.cuh` and
`pytorch/custom_recipes/reference_nvfp4.py` (Apache-2.0); golden vectors from it in tests/golden.
Four over six: Cook et al., arXiv 2512.02010, and mit-han-lab/fouroversix 00e70335,
`quantize/pytorch/reference.py` (MIT), which sums in another order and chooses after drawing.
"""

import torch

from ..formats import BLOCK, NVFP4, BlockFormat
from .rounding import decode_codes, e2m1_rtne, e2m1_sr, e4m3_rtne, pack_codes

FLT_MAX = torch.finfo(torch.float32).max


def global_scale(amax: torch.Tensor, fmt: BlockFormat = NVFP4) -> torch.Tensor:
    """Decode scale amax / encode_max (2688 for NVFP4) of tensors with these amaxes, fp32."""
    # Tensor by tensor: a GPU divides by a scalar as a product with its reciprocal, 1 ulp off.
    return torch.div(amax, torch.full_like(amax, fmt.encode_max))


def block_scales(
    block_amax: torch.Tensor,
    amax: torch.Tensor | None,
    fmt: BlockFormat = NVFP4,
    target: float = NVFP4.element_max,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode scales (float8_e4m3fn) and encode scales (fp32) of blocks.

    Args:
        block_amax: (R, B) fp32.
        amax: fp32, broadcasts to (R, B): amax of the tensor that the block belongs to; None for a
            single level of scales.
        fmt: An NVFP4 format.
        target: Code magnitude that the block's amax is mapped to.

    Returns:
        S_b and enc_b of the module's formulas, both (R, B).
    """
    encode = tensor_encode(block_amax, amax, fmt)
    scale = block_amax * (encode * (1 / target))
    # An amax from outside may be finite where a block is not: saturating would hide it.
    scale = e4m3_rtne(torch.where(block_amax.isinf(), torch.nan, scale))
    decode = scale.to(torch.float32)
    block_encode = torch.reciprocal(decode * torch.reciprocal(encode)).clamp(max=FLT_MAX)
    return scale, torch.where(decode == 0, 0.0, block_encode)


def tensor_encode(
    block_amax: torch.Tensor, amax: torch.Tensor | None, fmt: BlockFormat
) -> torch.Tensor:
    """s_enc of the module's formulas, of amax's shape; 1 for a single level of scales."""
    if amax is None:
        return block_amax.new_ones(())
    # Tensor by tensor, as in global_scale.
    encode = torch.div(torch.full_like(amax, fmt.encode_max), amax).clamp(max=FLT_MAX)
    return torch.where((amax == 0) | (encode == 0), 1.0, encode)


def best_scales(
    t: torch.Tensor,
    block_amax: torch.Tensor,
    amax: torch.Tensor | None,
    fmt: BlockFormat,
    block_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of the target that errs least, of a format with several (four over six).

    Args:
        t: (R, K) floating, K % 16 == 0.
        block_amax: (R, K / 16) fp32, repeated on the rows of a block.
        amax: As in `block_scales`.
        fmt: An NVFP4 format.
        block_rows: 1 or 16.

    Returns:
        S_b and enc_b of the module's formulas, both (R, K / 16).
    """
    first, *others = fmt.block_targets
    scale, encode = block_scales(block_amax, amax, fmt, first)
    if not others:
        return scale, encode
    wanted = t.view(*block_amax.shape, BLOCK).to(torch.float32)
    wanted = wanted * tensor_encode(block_amax, amax, fmt).unsqueeze(-1)
    error = _block_error(t, wanted, scale, encode, block_rows)
    for target in others:
        other_scale, other_encode = block_scales(block_amax, amax, fmt, target)
        other_error = _block_error(t, wanted, other_scale, other_encode, block_rows)
        better = other_error < error  # false for NaN: the first target's scale carries it
        # where has no CPU kernel for float8: choose among the bytes.
        bytes_ = (s.view(torch.uint8) for s in (other_scale, scale))
        scale = torch.where(better, *bytes_).view(fmt.scale_dtype)
        encode = torch.where(better, other_encode, encode)
        error = torch.minimum(other_error, error)
    return scale, encode


def _block_error(
    t: torch.Tensor,
    wanted: torch.Tensor,
    scale: torch.Tensor,
    encode: torch.Tensor,
    block_rows: int,
) -> torch.Tensor:
    """Squared error (R, B) of blocks in units of 1 / s_enc, rounded to nearest."""
    error = decode_codes(encode_blocks(t, encode)).view(wanted.shape)
    error.mul_(scale.to(torch.float32).unsqueeze(-1)).sub_(wanted).square_()
    total = _halving_sum(error, dim=2)
    if block_rows == 1:
        return total
    rows, blocks = total.shape
    padded = torch.nn.functional.pad(total, (0, 0, 0, -rows % block_rows))
    total = _halving_sum(padded.view(-1, block_rows, blocks), dim=1)
    return total.repeat_interleave(block_rows, dim=0)[:rows]


def _halving_sum(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum over a dim of 16 elements in an order that every device can follow."""
    while t.shape[dim] > 1:
        low, high = t.chunk(2, dim)
        t = low + high
    return t.squeeze(dim)


def encode_blocks(
    t: torch.Tensor, block_encode: torch.Tensor, random_byte: torch.Tensor | None = None
) -> torch.Tensor:
    """Packed E2M1 codes of (R, K), given (R, K / 16) encode scales.

    Args:
        t: (R, K) floating, K % 16 == 0.
        block_encode: (R, K / 16) fp32.
        random_byte: None for RTNE; for SR (R, K / 16, 16) int16 in [0, 255].

    Returns:
        (R, K / 2) uint8.
    """
    scaled = t.view(*block_encode.shape, BLOCK).to(torch.float32) * block_encode.unsqueeze(-1)
    # Not a view: inductor in torch 2.11 cannot lower one of bool.
    sign = torch.signbit(scaled).to(torch.uint8)
    magnitude = scaled.abs_().clamp_(max=NVFP4.element_max)
    if random_byte is None:
        code = e2m1_rtne(magnitude)
    else:
        code = e2m1_sr(magnitude, random_byte)
    return pack_codes(code.bitwise_or_(sign << 3)).view(t.shape[0], t.shape[1] // 2)
