"""The oracle: NVFP4 quantize and dequantize in plain PyTorch, bit for bit, on any device.

All in fp32, in this order (v_b: max |x| of a block; decode scales unless marked `enc`):

    s_enc = min(2688 / amax, FLT_MAX), 1 if amax == 0 or s_enc == 0        s_dec = 1 / s_enc
    S_b   = e4m3(min(v_b * (s_enc * (1/6)), 448))
    enc_b = min(1 / (S_b * s_dec), FLT_MAX), 0 if S_b == 0
    q     = e2m1(clamp(x * enc_b, -6, 6))
    x_hat = lut[q] * S_b * (amax / 2688)

Two details are easy to simplify wrongly: the product `s_enc * (1/6)` comes first, and the scale
that encodes is derived from the *rounded* S_b. There is no lower clamp on S_b: a block far below
the tensor's amax underflows to zeros (where TransformerEngine's codes saturate: compare values
there).

NaN or Inf in x leaves as NaN or Inf: it reaches amax, so alpha and every dependent result.

Source: TransformerEngine d0067d0d, `common/cast/nvfp4/core_nvfp4.cuh` and
`pytorch/custom_recipes/reference_nvfp4.py` (Apache-2.0); golden vectors from it in tests/golden.
"""

from dataclasses import dataclass, field

import torch

from ..errors import ConfigError
from ..formats import BLOCK, NVFP4
from .hadamard import rht as apply_rht
from .philox import block_random_bytes
from .rounding import decode_codes, e2m1_rtne, e2m1_sr, e4m3_rtne, pack_codes

FLT_MAX = torch.finfo(torch.float32).max
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = ((1, BLOCK), (BLOCK, BLOCK))


@dataclass(frozen=True)
class QuantizedOperand:
    """One GEMM operand in NVFP4, contraction dim last.

    Attributes:
        codes: (..., Kp / 2) uint8, two E2M1 codes a byte, even element in the low nibble; Kp is K
            rounded up to 16.
        block_scale: (..., Kp / 16) float8_e4m3fn decode scales, one per row and 16 columns (for
            16x16 blocks the scale is repeated on its 16 rows).
        amax: fp32 scalar; the tensor's decode scale is amax / 2688.
        K: Size of the contraction dim before padding.
        values: (..., Kp) or None: what a backend's GEMM multiplies, where it is not the codes.
            Codes and scales may then be empty.
    """

    codes: torch.Tensor
    block_scale: torch.Tensor
    amax: torch.Tensor
    K: int = field(default=0)
    values: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Logical shape (..., K)."""
        return torch.Size((*self.codes.shape[:-1], self.K))

    @property
    def global_scale(self) -> torch.Tensor:
        """fp32 decode scale of the whole tensor, amax / 2688."""
        return global_scale(self.amax)


def global_scale(amax: torch.Tensor) -> torch.Tensor:
    """Decode scale amax / 2688 of tensors with these amaxes, fp32."""
    # Tensor by tensor: a GPU divides by a scalar as a product with its reciprocal, 1 ulp off.
    return torch.div(amax, torch.full_like(amax, NVFP4.encode_max))


def pad_to_blocks(t: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Zero-pad a 2D tensor to a multiple of 16 along `dim`; t itself where nothing is missing."""
    missing = -t.shape[dim] % BLOCK
    if missing == 0:
        return t
    return torch.nn.functional.pad(t, (0, missing) if dim % 2 == 1 else (0, 0, 0, missing))


def block_amaxes(t: torch.Tensor, block_rows: int = 1) -> torch.Tensor:
    """Amax of each element's block.

    Args:
        t: (R, K) floating, K % 16 == 0.
        block_rows: 1 or 16; the last 16-row block may be incomplete.

    Returns:
        (R, K / 16) fp32, repeated on the rows of a block.
    """
    rows, columns = t.shape
    if rows == 0:
        return t.new_zeros((0, columns // BLOCK), dtype=torch.float32)
    amax = t.view(rows, columns // BLOCK, BLOCK).abs().amax(-1).to(torch.float32)
    if block_rows == 1:
        return amax
    amax = pad_to_blocks(amax, dim=0).view(-1, BLOCK, columns // BLOCK).amax(1)
    return amax.repeat_interleave(BLOCK, dim=0)[:rows]


def block_scales(block_amax: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode scales (float8_e4m3fn) and encode scales (fp32) of blocks.

    Args:
        block_amax: (R, B) fp32.
        amax: fp32, broadcasts to (R, B): amax of the tensor that the block belongs to.

    Returns:
        S_b and enc_b of the module's formulas, both (R, B).
    """
    # Tensor by tensor, as in global_scale.
    encode = torch.div(torch.full_like(amax, NVFP4.encode_max), amax).clamp(max=FLT_MAX)
    encode = torch.where((amax == 0) | (encode == 0), 1.0, encode)
    scale = block_amax * (encode * (1 / NVFP4.element_max))
    # An amax from outside may be finite where a block is not: saturating would hide it.
    scale = e4m3_rtne(torch.where(block_amax.isinf(), torch.nan, scale))
    decode = scale.to(torch.float32)
    block_encode = torch.reciprocal(decode * torch.reciprocal(encode)).clamp(max=FLT_MAX)
    return scale, torch.where(decode == 0, 0.0, block_encode)


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
    sign = torch.signbit(scaled).view(torch.uint8)
    magnitude = scaled.abs_().clamp_(max=NVFP4.element_max)
    if random_byte is None:
        code = e2m1_rtne(magnitude)
    else:
        code = e2m1_sr(magnitude, random_byte)
    return pack_codes(code.bitwise_or_(sign << 3)).view(t.shape[0], t.shape[1] // 2)


def quantize(
    x: torch.Tensor,
    *,
    block: tuple[int, int] = (1, BLOCK),
    rounding: str = "rtne",
    rht: bool = False,
    amax: torch.Tensor | None = None,
    seed: int | None = None,
    stream: int = 0,
    first_row: int = 0,
    first_block: int = 0,
) -> QuantizedOperand:
    """Quantize a GEMM operand to NVFP4.

    Args:
        x: (..., K) fp32, bf16 or fp16; the contraction dim is last. 16x16 blocks need (M, K). Sizes
            that are not multiples of 16 are padded with zeros inside.
        block: (1, 16), or (16, 16) for weights.
        rounding: "rtne" or "sr" (stochastic; needs `seed`).
        rht: Apply the random Hadamard transform along K first; values and amax are then those of
            the transformed tensor, rounded to bf16.
        amax: fp32 scalar to use in place of max |x|, as reduced over the ranks that share the
            operand; of the transformed tensor with `rht`.
        seed: 64-bit SR key (`sr_key`): the same key and x give the same codes.
        stream: Which operand of which GEMM this is (part of the SR counter).
        first_row: Global index of row 0, where x is a shard.
        first_block: Global index, in blocks of 16, of column 0, where x is a shard.

    Returns:
        QuantizedOperand with codes (..., Kp / 2) and block_scale (..., Kp / 16).

    Raises:
        ConfigError: unknown block or rounding, wrong dtype or shape, SR without a seed.

    Source: module docstring.
    """
    _check_arguments(x, block, rounding, seed)
    leading, size = x.shape[:-1], x.shape[-1]
    t = prepare(x.reshape(-1, size), rht=rht)
    block_amax = block_amaxes(t, block[0])
    amax = tensor_amax(block_amax) if amax is None else amax.to(torch.float32).reshape(())
    sr_draw = None
    if rounding == "sr":
        row, column = block_indices(block_amax, first_row, first_block)
        sr_draw = block_random_bytes(seed, stream, amax, block_amax, row, column)
    codes, scale = quantize_blocks(t, block_amax, amax, sr_draw)
    columns = t.shape[1]
    return QuantizedOperand(
        codes.view(*leading, columns // 2), scale.view(*leading, columns // BLOCK), amax, size
    )


def prepare(t: torch.Tensor, *, rht: bool, transpose: bool = False) -> torch.Tensor:
    """A GEMM operand with its contraction dim last, padded to blocks, transformed, contiguous.

    Args:
        t: (R, K).
        rht: Whether to apply the RHT along the contraction dim.
        transpose: The contraction runs along t's rows: the result is (K, R padded).
    """
    t = pad_to_blocks(t, dim=0 if transpose else 1)
    if rht:
        t = apply_rht(t, dim=0 if transpose else 1)
    return (t.T if transpose else t).contiguous()


def block_indices(
    block_amax: torch.Tensor, first_row: int, first_block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Global row and block-column indices of an (R, B) shard, int64."""
    rows, blocks = block_amax.shape
    device = block_amax.device
    return (
        torch.arange(first_row, first_row + rows, device=device),
        torch.arange(first_block, first_block + blocks, device=device),
    )


def tensor_amax(block_amax: torch.Tensor) -> torch.Tensor:
    """fp32 scalar amax from block amaxes; 0 for an empty tensor."""
    return block_amax.amax() if block_amax.numel() else block_amax.new_zeros(())


def quantize_blocks(
    t: torch.Tensor,
    block_amax: torch.Tensor,
    amax: torch.Tensor,
    random_byte: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and block scales of a prepared operand.

    Args:
        t: (R, K) from `prepare`.
        block_amax: (R, K / 16) fp32, from `block_amaxes`.
        amax: fp32, broadcasts to block_amax.
        random_byte: See `encode_blocks`.

    Returns:
        codes (R, K / 2) uint8 and block_scale (R, K / 16) float8_e4m3fn.
    """
    scale, encode = block_scales(block_amax, amax)
    return encode_blocks(t, encode, random_byte), scale


def dequantize(operand: QuantizedOperand, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """x_hat of a quantized operand (in the transformed space where the RHT was applied).

    Args:
        operand: From `quantize`.
        dtype: Result's dtype; computed in fp32.

    Returns:
        (..., K) of `dtype`.
    """
    values = scaled_values(operand.codes, operand.block_scale)
    return (values * operand.global_scale)[..., : operand.K].to(dtype)


def scaled_values(
    codes: torch.Tensor, block_scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`lut[q] * S_b`, what the GEMM multiplies; exact in bf16 (at most 6 significant bits).

    Args:
        codes: (..., Kp / 2) uint8.
        block_scale: (..., Kp / 16) float8_e4m3fn.
        dtype: float32 or bfloat16.

    Returns:
        (..., Kp) of `dtype`.
    """
    values = decode_codes(codes, dtype)
    blocks = values.view(*block_scale.shape, BLOCK)
    return blocks.mul_(block_scale.to(dtype).unsqueeze(-1)).view(values.shape)


def _check_arguments(x: torch.Tensor, block: tuple, rounding: str, seed: int | None) -> None:
    if x.dtype not in INPUT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in INPUT_DTYPES)
        raise ConfigError(f"quantize takes {names}, got {x.dtype}: cast the input first")
    if tuple(block) not in BLOCKS:
        raise ConfigError(f"block={tuple(block)} is not a block of NVFP4: use (1, 16) or (16, 16)")
    if x.dim() == 0 or (block[0] != 1 and x.dim() != 2):
        raise ConfigError(
            f"block={tuple(block)} takes a {'2D' if block[0] != 1 else '1D or higher'} tensor with "
            f"the contraction dim last, got shape {tuple(x.shape)}"
        )
    if rounding not in ("rtne", "sr"):
        raise ConfigError(f"rounding={rounding!r} is unknown: use 'rtne' or 'sr'")
    if rounding == "sr" and seed is None:
        raise ConfigError("rounding='sr' needs seed=, the 64-bit key from numerics.sr_key()")
