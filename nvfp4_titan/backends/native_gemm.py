"""The one place that spells the arguments of torch's block-scaled GEMMs.

    scaled_mm            (M, K) @ (N, K).T                     2D @ 2D
    scaled_grouped_mm    (m, K) @ (N, K).T per group of rows   2D @ 3D
                         (N, p) @ (K, p).T per group of slots  2D @ 2D

Both multiply packed codes, contraction last in memory, with two levels of decode scales: blocked
e4m3 per 16 elements and fp32 per tensor (per group). torch multiplies the two fp32 scales to one
alpha: a product below 2**-126 loses range there, which the other backends keep.

`Gemms` holds the two functions: torch's, or the stand-in's of native_standin.py, which has the same
signatures and runs anywhere.

Source: torch.nn.functional.scaled_mm and scaled_grouped_mm (torch 2.11 to 2.13).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import ScalingType, SwizzleType, scaled_grouped_mm, scaled_mm

from ..errors import UnsupportedError
from ..numerics.layout import blocked_shape
from ..numerics.quantize import global_scale

SCALING = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
SWIZZLE = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
MIN_COLUMNS = 16
"""What the number of columns of a result must be a multiple of."""


@dataclass(frozen=True)
class Gemms:
    """Functions with the signatures of torch.nn.functional's.

    Attributes:
        plain: As scaled_mm.
        grouped: As scaled_grouped_mm.
        grouped_dtypes: What `grouped` writes.
    """

    plain: Callable
    grouped: Callable
    grouped_dtypes: tuple[torch.dtype, ...]


TORCH = Gemms(scaled_mm, scaled_grouped_mm, (torch.bfloat16,))


@dataclass(frozen=True)
class GemmOperand:
    """What a GEMM takes of an operand (native_layout.py).

    Attributes:
        codes: uint8.
        scale: float8_e4m3fn, blocked.
        amax: fp32 scalar, or one per group.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    amax: torch.Tensor

    def packed(self) -> torch.Tensor:
        """Codes as torch's dtype."""
        return self.codes.view(torch.float4_e2m1fn_x2)

    def scales(self, *shape: int) -> list[torch.Tensor]:
        """Block scales, of a shape if given, and the fp32 decode scale."""
        block = self.scale.view(shape) if shape else self.scale
        return [block, global_scale(self.amax)]


def whole_columns(b: GemmOperand) -> GemmOperand:
    """A right operand with rows of zeros up to what torch takes; itself where none are missing."""
    missing = -b.codes.shape[-2] % MIN_COLUMNS
    if not missing:
        return b
    codes = torch.nn.functional.pad(b.codes, (0, 0, 0, missing))
    # Block scales are padded further already.
    return GemmOperand(codes, b.scale, b.amax)


def _options(a: list[torch.Tensor], b: list[torch.Tensor], out_dtype: torch.dtype) -> dict:
    return {
        "scale_a": a,
        "scale_recipe_a": SCALING,
        "swizzle_a": SWIZZLE,
        "scale_b": b,
        "scale_recipe_b": SCALING,
        "swizzle_b": SWIZZLE,
        "output_dtype": out_dtype,
    }


def multiply(gemms: Gemms, a: GemmOperand, b: GemmOperand, out_dtype: torch.dtype) -> torch.Tensor:
    """(M, N) = (M, K) @ (N, K).T.

    Args:
        gemms: Functions.
        a: (M, Kp / 2).
        b: (N, Kp / 2), N % 16 == 0.
        out_dtype: Result's dtype.
    """
    options = _options(a.scales(), b.scales(), out_dtype)
    return gemms.plain(a.packed(), b.packed().t(), **options)


def multiply_groups(
    gemms: Gemms, a: GemmOperand, b: GemmOperand, offs: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """(M, N): per group (m, K) @ (N, K).T; rows of no group are undefined.

    Args:
        gemms: Functions.
        a: (M, Kp / 2), amax (E,).
        b: (E, N, Kp / 2), amax (E,), N % 16 == 0.
        offs: (E,) int32 group ends.
        out_dtype: Result's dtype.
    """
    columns = blocked_shape(1, a.codes.shape[1] // 8)[1]
    options = _options(a.scales(-1, columns), b.scales(), _written(gemms, out_dtype))
    y = _grouped(gemms, a.packed(), b.packed().transpose(-2, -1), offs, options)
    return y.to(out_dtype)


def multiply_slots(
    gemms: Gemms, a: GemmOperand, b: GemmOperand, ends: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """(E, N, K): per group of slots (N, p) @ (K, p).T.

    Args:
        gemms: Functions.
        a: (N, P / 2), amax (E,).
        b: (K, P / 2), amax (E,), K % 16 == 0.
        ends: (E,) int32 ends of groups in slots, in steps of 64, none of them empty.
        out_dtype: Result's dtype.
    """
    scales = (o.scales(blocked_shape(o.codes.shape[0], 1)[0], -1) for o in (a, b))
    options = _options(*scales, _written(gemms, out_dtype))
    return _grouped(gemms, a.packed(), b.packed().t(), ends, options)


def _written(gemms: Gemms, out_dtype: torch.dtype) -> torch.dtype:
    if out_dtype not in gemms.grouped_dtypes:
        raise UnsupportedError(
            f"backend 'native': torch's scaled_grouped_mm writes bfloat16, not {out_dtype}: run "
            "the experts in bfloat16 (FSDP's or autocast's), or use backend = 'triton'"
        )
    return out_dtype


def grouped_refusal(capability: tuple[int, int]) -> str | None:
    """Why torch has no grouped FP4 GEMM for a GPU, None where it may have one."""
    if capability[0] == 10:
        return None
    major, minor = capability
    return (
        f"torch's scaled_grouped_mm has no FP4 for sm_{major}{minor}, only for sm_100 and sm_103: "
        "use backend = 'triton' for the experts (nvfp4.experts = false leaves them out)"
    )


def _grouped(gemms: Gemms, a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, options: dict):
    if gemms is TORCH and a.device.type == "cuda":
        reason = grouped_refusal(torch.cuda.get_device_capability(a.device))
        if reason is not None:
            raise UnsupportedError(reason)
    try:
        return gemms.grouped(a, b, offs=offs, **options)
    except NotImplementedError as error:
        raise UnsupportedError(
            "this build of torch has no grouped NVFP4 GEMM (scaled_grouped_mm needs one built with "
            "MSLK or USE_FBGEMM_GENAI, for sm_100): install torch's CUDA wheel, or use "
            "backend = 'triton' for the experts"
        ) from error
