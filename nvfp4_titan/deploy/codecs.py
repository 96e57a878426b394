"""Weight and activation formats of deployed models: tensors to codes and scales, and back.

A codec's `encode` gives the tensors that a checkpoint stores, `decode` what a kernel multiplies,
so that fake quantization, `decode(encode(x))`, is the deployed model's arithmetic by construction.
With amax over a group g, and every operation in the dtype that is named:

    int_group      s = max(amax / ((2**b - 1) / 2), eps)     q = round(w / s) in [-2**(b-1), ..]
    int4_of_float8 w8 = float8 of w, rowwise, eps 1e-12; s = max(amax(w8) / 8, 1e-6); q in [-8, 7]
    int4_minimum   s = max(max - min, 1e-6) / 15; q = round((w - min) / s) in [0, 15], less 8;
                   w_hat = q * s + (min + 8 * s): the minimum in place of an integer zero point
    float8         s = max(amax / 448, eps)                  q = e4m3(w / s)
    int8_token, float8_token   the same two for a row of activations, in its own dtype
    mxfp4          numerics/mxfp8.py's scales rounded up, with 6 for 448, and E2M1 codes
    nvfp4          codes and S_b of numerics/nvfp4.py; x_hat = q * (S_b / s_enc), as
                   compressed-tensors decodes them: a last bit of fp32 from S_b * (amax / 2688)

Scales are rounded to the tensor's dtype before anything is divided by them, as compressed-tensors
stores them. Sources: torchao 0.18, `quantization/qat/fake_quantizer.py` (BSD-3), for the int4
kernels' arithmetic (MSLK, `quantize/shuffle.py`); compressed-tensors 0.20 (Apache-2.0),
`quantization/utils/helpers.py`, for integers and float8.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from ..errors import ConfigError
from ..formats import BLOCK, MXFP8, NVFP4, BlockFormat
from ..numerics import QuantizedOperand, dequantize, quantize
from ..numerics.mxfp8 import block_scales as mx_scales
from ..numerics.nvfp4 import tensor_encode
from ..numerics.quantize import block_amaxes
from ..numerics.rounding import decode_codes, e2m1_rtne, pack_codes

Encoded = dict[str, torch.Tensor]
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class Integers:
    """A symmetric integer codec in numbers: s = max(amax / largest, eps of the dtype).

    Attributes:
        low: Least code.
        high: Largest code.
        largest: What a group's amax is divided by.
        group: Elements of a group; None: a whole row.
    """

    low: int
    high: int
    largest: float
    group: int | None = None


@dataclass(frozen=True)
class Codec:
    """A format of the last dim of a tensor.

    Attributes:
        name: Name of its own.
        encode: (..., K) floating to the tensors that are stored.
        decode: These, and a dtype, to (..., K) of it.
        multiple: K must be a multiple of this.
        bits: Bits of an element's code.
        type: "int" or "float", as compressed-tensors calls it.
        integers: The codec in numbers, for kernels, where it is one of symmetric integers.
    """

    name: str
    encode: Callable[[torch.Tensor], Encoded]
    decode: Callable[[Encoded, torch.dtype], torch.Tensor]
    multiple: int = 1
    bits: int = 8
    type: str = "int"
    integers: Integers | None = None

    def round_trip(self, x: torch.Tensor) -> torch.Tensor:
        """What the deployed model multiplies for x, in x's dtype."""
        return self.decode(self.encode(x), x.dtype)

    def check(self, size: int, name: str) -> None:
        """Check the size of a dim.

        Raises:
            ConfigError: not a whole number of groups.
        """
        if size % self.multiple:
            raise ConfigError(
                f"{name} has {size} in features, not a multiple of the recipe's group of "
                f"{self.multiple}: add its name to skip, or use another recipe"
            )


def _scale(amax: torch.Tensor, largest: float, eps: float) -> torch.Tensor:
    """Amax / largest, at least eps, in amax's dtype."""
    return torch.div(amax, torch.full_like(amax, largest)).clamp(min=eps)


@cache
def int_group(bits: int, group: int) -> Codec:
    """Symmetric integers with a scale per row and group."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    largest = (high - low) / 2

    def encode(w: torch.Tensor) -> Encoded:
        groups = w.unflatten(-1, (-1, group))
        eps = torch.finfo(w.dtype).eps
        scale = _scale(groups.abs().amax(-1, keepdim=True), largest, eps)
        codes = (groups / scale).clamp(low, high).round().to(torch.int8)
        return {"codes": codes.flatten(-2), "scale": scale.squeeze(-1)}

    integers = Integers(low, high, largest, group)
    name = f"int{bits}_groups_of_{group}"
    return Codec(name, encode, _decode_groups, group, bits, integers=integers)


def _decode_groups(encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
    scale = encoded["scale"]
    codes = encoded["codes"].unflatten(-1, (scale.shape[-1], -1))
    return (codes.to(scale.dtype) * scale.unsqueeze(-1)).flatten(-2).to(dtype)


@cache
def int4_of_float8(group: int) -> Codec:
    """Float8 first, then int4 in groups: what a kernel with float8 activations is given."""

    def encode(w: torch.Tensor) -> Encoded:
        scale = _scale(w.float().abs().amax(-1, keepdim=True), _E4M3_MAX, 1e-12)
        w8 = ((w.float() / scale).clamp(-_E4M3_MAX, _E4M3_MAX)).to(torch.float8_e4m3fn)
        groups = (w8.float() * scale).to(w.dtype).unflatten(-1, (-1, group))
        scale = _scale(groups.abs().amax(-1, keepdim=True), 8.0, 1e-6)
        codes = (groups / scale).round().clamp(-8, 7).to(torch.int8)
        return {"codes": codes.flatten(-2), "scale": scale.squeeze(-1)}

    return Codec(f"int4_of_float8_groups_of_{group}", encode, _decode_groups, group, 4)


@cache
def int4_minimum(group: int) -> Codec:
    """Asymmetric int4 in groups, recentred on 8, with the minimum in place of a zero point."""

    def encode(w: torch.Tensor) -> Encoded:
        groups = w.float().unflatten(-1, (-1, group))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        span = (high - low).clamp(min=1e-6)
        scale = torch.div(span, torch.full_like(span, 15.0))
        codes = ((groups - low) / scale).round().clamp(0, 15) - 8
        return {
            "codes": codes.to(torch.int8).flatten(-2),
            "scale": scale.squeeze(-1),
            "zero": (low + scale * 8).squeeze(-1),
        }

    def decode(encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        scale, zero = encoded["scale"].unsqueeze(-1), encoded["zero"].unsqueeze(-1)
        codes = encoded["codes"].unflatten(-1, (scale.shape[-2], -1)).float()
        return (codes * scale + zero).flatten(-2).to(dtype)

    return Codec(f"int4_minimum_groups_of_{group}", encode, decode, group, 4)


def _float8(eps: float | None) -> Codec:
    def encode(x: torch.Tensor) -> Encoded:
        floor = torch.finfo(x.dtype).eps if eps is None else eps
        scale = _scale(x.abs().amax(-1, keepdim=True), _E4M3_MAX, floor)
        codes = (x / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
        return {"codes": codes, "scale": scale}

    name = "float8_token" if eps is None else "float8_row"
    return Codec(name, encode, _decode_groups, type="float")


def _int8_token() -> Codec:
    integers = Integers(-128, 127, 127.5)

    def encode(x: torch.Tensor) -> Encoded:
        scale = _scale(x.abs().amax(-1, keepdim=True), integers.largest, torch.finfo(x.dtype).eps)
        return {"codes": (x / scale).clamp(-128, 127).round().to(torch.int8), "scale": scale}

    return Codec("int8_token", encode, _decode_groups, integers=integers)


def _mxfp4() -> Codec:
    fmt = replace(
        MXFP8, name="mxfp4", element_max=6.0, values=NVFP4.values, code_dtype=torch.uint8,
        codes_per_byte=2, block_targets=(6.0,),
    )  # fmt: skip

    def encode(x: torch.Tensor) -> Encoded:
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()
        scale, block_encode = mx_scales(block_amaxes(rows, 1, fmt.block), fmt)
        scaled = rows.view(*scale.shape, fmt.block) * block_encode.unsqueeze(-1)
        codes = e2m1_rtne(scaled.abs().clamp(max=fmt.element_max))
        codes = codes | (torch.signbit(scaled).to(torch.uint8) << 3)
        packed = pack_codes(codes.flatten(-2))
        leading = x.shape[:-1]
        return {"codes": packed.view(*leading, -1), "scale": scale.view(*leading, -1)}

    def decode(encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        scale = encoded["scale"].float().unsqueeze(-1)
        values = decode_codes(encoded["codes"]).unflatten(-1, (scale.shape[-2], -1))
        return (values * scale).flatten(-2).to(dtype)

    return Codec("mxfp4", encode, decode, fmt.block, 4, "float")


@cache
def nvfp4(fmt: BlockFormat = NVFP4, block_rows: int = 1, amax: float | None = None) -> Codec:
    """NVFP4 in 1x16 or 16x16 blocks.

    Args:
        fmt: NVFP4, or its single level.
        block_rows: 1 or 16.
        amax: A static amax in place of each tensor's own.
    """

    def encode(x: torch.Tensor) -> Encoded:
        static = None if amax is None else torch.tensor(amax, device=x.device)
        operand = quantize(x, format=fmt, block=(block_rows, BLOCK), amax=static)
        found = {"codes": operand.codes, "scale": operand.block_scale}
        if operand.amax is None:
            return found
        return found | {"encode_scale": tensor_encode(operand.amax, operand.amax, fmt)}

    def decode(encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        scale = encoded["scale"].float()
        if "encode_scale" in encoded:
            scale = scale / encoded["encode_scale"]
        values = decode_codes(encoded["codes"]).unflatten(-1, (-1, BLOCK))
        return (values * scale.unsqueeze(-1)).flatten(-2).to(dtype)

    name = f"{fmt.name}_{block_rows}x{BLOCK}" + ("" if amax is None else f"_amax_{amax}")
    return Codec(name, encode, decode, BLOCK, 4, "float")


def _mxfp8() -> Codec:
    def encode(x: torch.Tensor) -> Encoded:
        operand = quantize(x, format=MXFP8)
        return {"codes": operand.codes, "scale": operand.block_scale}

    def decode(encoded: Encoded, dtype: torch.dtype) -> torch.Tensor:
        codes = encoded["codes"]
        operand = QuantizedOperand(codes, encoded["scale"], None, codes.shape[-1], MXFP8)
        return dequantize(operand, dtype)

    return Codec("mxfp8", encode, decode, MXFP8.block, 8, "float")


FP8_MX = _mxfp8()
FLOAT8, FLOAT8_TOKEN, INT8_TOKEN, MXFP4 = _float8(1e-12), _float8(None), _int8_token(), _mxfp4()
