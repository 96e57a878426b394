"""The oracle: quantize and dequantize in plain PyTorch, bit for bit, on any device.

The formulas of a block are in numerics/nvfp4.py and numerics/mxfp8.py; here is what the formats
share: padding to whole blocks, the Hadamard transform, block amaxes, and the operand.

NaN or Inf in x leaves as NaN or Inf: it reaches amax, so alpha and every dependent result (in a
format without a scale per tensor, the blocks that hold it).
"""

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..formats import BLOCK, NVFP4, BlockFormat
from ..recipe import OperandFormat, get_format
from . import mxfp8
from .hadamard import rht as apply_rht
from .layout import from_blocked
from .nvfp4 import best_scales, block_scales, encode_blocks, global_scale
from .philox import block_random_bytes
from .rounding import decode_codes

__all__ = ["QuantizedOperand", "block_scales", "dequantize", "global_scale", "quantize"]

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NVFP4_ROWS = OperandFormat()


@dataclass(frozen=True)
class QuantizedOperand:
    """One GEMM operand, quantized, contraction dim last.

    Attributes:
        codes: Element codes, of the format's code_dtype. NVFP4: (..., Kp / 2) uint8, two E2M1 codes
            a byte, even element in the low nibble; MXFP8: (..., Kp) float8_e4m3fn. Kp is K rounded
            up to the format's block (16 or 32).
        block_scale: (..., Kp / block) decode scales of the format's scale_dtype, one per row and
            block of columns (for square blocks the scale is repeated on its rows). With one dim
            less than codes: in the layout of the native GEMMs (numerics/layout.py), which
            `plain_scale` reads.
        amax: fp32 scalar (one per group for grouped operands), from which the tensor's decode
            scale follows; None where the format has no scale per tensor.
        K: Size of the contraction dim before padding.
        format: The format of codes and scales.
        values: (..., Kp) or None: what a backend's GEMM multiplies, where it is not the codes.
            Codes and scales may then be None.
    """

    codes: torch.Tensor | None
    block_scale: torch.Tensor | None
    amax: torch.Tensor | None
    K: int
    # No default: torch 2.11's compiler cannot trace one that is a record.
    format: BlockFormat
    values: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Logical shape (..., K)."""
        return torch.Size((*self.codes.shape[:-1], self.K))

    @property
    def global_scale(self) -> torch.Tensor | None:
        """fp32 decode scale of the whole tensor, amax / encode_max; None where there is none."""
        return None if self.amax is None else global_scale(self.amax, self.format)

    @property
    def plain_scale(self) -> torch.Tensor:
        """(..., Kp / block) block scales, however they are kept; not for groups of tokens."""
        scale, codes = self.block_scale, self.codes
        if scale.dim() == codes.dim():
            return scale
        columns = codes.shape[-1] * self.format.codes_per_byte // self.format.block
        if codes.dim() == 2:
            return from_blocked(scale, codes.shape[0], columns)
        return torch.stack([from_blocked(s, codes.shape[1], columns) for s in scale])


def pad_to_blocks(t: torch.Tensor, dim: int = -1, block: int = BLOCK) -> torch.Tensor:
    """Zero-pad a 2D tensor to a multiple of `block` along `dim`; t itself where none is missing."""
    missing = -t.shape[dim] % block
    if missing == 0:
        return t
    return torch.nn.functional.pad(t, (0, missing) if dim % 2 == 1 else (0, 0, 0, missing))


def block_amaxes(t: torch.Tensor, block_rows: int = 1, block: int = BLOCK) -> torch.Tensor:
    """Amax of each element's block.

    Args:
        t: (R, K) floating, K % block == 0.
        block_rows: 1 or `block`; the last block of rows may be incomplete.
        block: Elements of a block along K.

    Returns:
        (R, K / block) fp32, repeated on the rows of a block.
    """
    rows, columns = t.shape
    if rows == 0:
        return t.new_zeros((0, columns // block), dtype=torch.float32)
    amax = t.view(rows, columns // block, block).abs().amax(-1).to(torch.float32)
    if block_rows == 1:
        return amax
    amax = pad_to_blocks(amax, dim=0, block=block).view(-1, block, columns // block).amax(1)
    return amax.repeat_interleave(block, dim=0)[:rows]


def quantize(
    x: torch.Tensor,
    *,
    format: str | BlockFormat = NVFP4,
    block: tuple[int, int] | None = None,
    rounding: str = "rtne",
    rht: bool = False,
    amax: torch.Tensor | None = None,
    seed: int | None = None,
    stream: int = 0,
    first_row: int = 0,
    first_block: int = 0,
) -> QuantizedOperand:
    """Quantize a GEMM operand.

    Args:
        x: (..., K) fp32, bf16 or fp16; the contraction dim is last. Square blocks need (M, K).
            Sizes that are not multiples of the block are padded with zeros inside.
        format: Name in `FORMATS`, or a BlockFormat.
        block: (1, 16), the default, or (16, 16) for weights; for MXFP8 (1, 32) or (32, 32).
        rounding: "rtne" or "sr" (stochastic; NVFP4 only, needs `seed`).
        rht: Apply the random Hadamard transform along K first; values and amax are then those of
            the transformed tensor, rounded to bf16.
        amax: fp32 scalar to use in place of max |x|, as reduced over the ranks that share the
            operand; of the transformed tensor with `rht`. Not read by formats without a scale per
            tensor.
        seed: 64-bit SR key (`sr_key`): the same key and x give the same codes.
        stream: Which operand of which GEMM this is (part of the SR counter).
        first_row: Global index of row 0, where x is a shard.
        first_block: Global index, in blocks of 16, of column 0, where x is a shard.

    Returns:
        QuantizedOperand of the format.

    Raises:
        ConfigError: unknown format, block or rounding, wrong dtype or shape, SR without a seed.

    Source: numerics/nvfp4.py, numerics/mxfp8.py.
    """
    format = get_format(format)
    fmt = OperandFormat(format, tuple(block or (1, format.block)), rounding, rht)
    _check_arguments(x, fmt, seed)
    leading, size = x.shape[:-1], x.shape[-1]
    t = prepare(x.detach().reshape(-1, size), rht=rht, block=format.block)
    block_amax = block_amaxes(t, fmt.block[0], format.block)
    if not format.tensor_scale:
        amax = None
    else:
        amax = tensor_amax(block_amax) if amax is None else amax.to(torch.float32).reshape(())
    sr_draw = None
    if rounding == "sr":
        row, column = block_indices(block_amax, first_row, first_block)
        sr_draw = random_bytes(seed, stream, amax, block_amax, row, column)
    codes, scale = quantize_blocks(t, block_amax, amax, sr_draw, fmt)
    return QuantizedOperand(
        codes.view(*leading, codes.shape[1]),
        scale.view(*leading, scale.shape[1]),
        amax,
        size,
        format,
    )


def prepare(
    t: torch.Tensor, *, rht: bool, transpose: bool = False, block: int = BLOCK
) -> torch.Tensor:
    """A GEMM operand with its contraction dim last, padded to blocks, transformed, contiguous.

    Args:
        t: (R, K).
        rht: Whether to apply the RHT along the contraction dim.
        transpose: The contraction runs along t's rows: the result is (K, R padded).
        block: Size of the format's blocks.
    """
    t = pad_to_blocks(t, dim=0 if transpose else 1, block=block)
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


def random_bytes(
    key: int,
    stream: int,
    amax: torch.Tensor | None,
    block_amax: torch.Tensor,
    row: torch.Tensor | None = None,
    column: torch.Tensor | None = None,
) -> torch.Tensor:
    """`block_random_bytes`, where a format without a scale per tensor has no amax to count with."""
    amax = block_amax.new_zeros(()) if amax is None else amax
    return block_random_bytes(key, stream, amax, block_amax, row, column)


def tensor_amax(block_amax: torch.Tensor) -> torch.Tensor:
    """fp32 scalar amax from block amaxes; 0 for an empty tensor."""
    return block_amax.amax() if block_amax.numel() else block_amax.new_zeros(())


def quantize_blocks(
    t: torch.Tensor,
    block_amax: torch.Tensor,
    amax: torch.Tensor | None,
    random_byte: torch.Tensor | None = None,
    fmt: OperandFormat = _NVFP4_ROWS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and block scales of a prepared operand.

    Args:
        t: (R, K) from `prepare`.
        block_amax: (R, K / block) fp32, from `block_amaxes`.
        amax: fp32, broadcasts to block_amax; None for formats without a scale per tensor.
        random_byte: See `nvfp4.encode_blocks`.
        fmt: The operand's format.

    Returns:
        codes and block_scale as QuantizedOperand has them, 2D.
    """
    if fmt.format.scale_dtype == torch.float8_e8m0fnu:
        scale, encode = mxfp8.block_scales(block_amax, fmt.format)
        return mxfp8.encode_blocks(t, encode), scale
    scale, encode = best_scales(t, block_amax, amax, fmt.format, fmt.block[0])
    return encode_blocks(t, encode, random_byte), scale


def dequantize(operand: QuantizedOperand, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """x_hat of a quantized operand (in the transformed space where the RHT was applied).

    Args:
        operand: From `quantize`, or expert weights (E, N, K) with one amax each.
        dtype: Result's dtype; computed in fp32.

    Returns:
        (..., K) of `dtype`.
    """
    values = scaled_values(operand.codes, operand.plain_scale, fmt=operand.format)
    scale = operand.global_scale
    if scale is not None:
        values = values * (scale.view(-1, 1, 1) if scale.dim() else scale)
    return values[..., : operand.K].to(dtype)


def scaled_values(
    codes: torch.Tensor,
    block_scale: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    fmt: BlockFormat = NVFP4,
) -> torch.Tensor:
    """`code * block_scale`, what the GEMM multiplies; exact in bf16 (at most 6 significant bits).

    Args:
        codes: As in QuantizedOperand.
        block_scale: As in QuantizedOperand.
        dtype: float32 or bfloat16.
        fmt: Format of the two.

    Returns:
        (..., Kp) of `dtype`.
    """
    values = codes.to(dtype) if fmt.codes_per_byte == 1 else decode_codes(codes, dtype)
    blocks = values.view(*block_scale.shape, fmt.block)
    return blocks.mul_(block_scale.to(dtype).unsqueeze(-1)).view(values.shape)


def _check_arguments(x: torch.Tensor, fmt: OperandFormat, seed: int | None) -> None:
    if x.dtype not in INPUT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in INPUT_DTYPES)
        raise ConfigError(f"quantize takes {names}, got {x.dtype}: cast the input first")
    if x.dim() == 0 or (fmt.block[0] != 1 and x.dim() != 2):
        wanted = "2D" if fmt.block[0] != 1 else "1D or higher"
        raise ConfigError(
            f"block={fmt.block} takes a {wanted} tensor with the contraction dim last, got shape "
            f"{tuple(x.shape)}"
        )
    if x.shape[-1] == 0:
        raise ConfigError(f"a tensor of shape {tuple(x.shape)} has no contraction dim to quantize")
    if fmt.rounding == "sr" and seed is None:
        raise ConfigError("rounding='sr' needs seed=, the 64-bit key from numerics.sr_key()")
