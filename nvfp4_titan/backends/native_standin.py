"""Stand-ins for torch's block-scaled GEMMs: the same operands, on any device.

They take what torch.nn.functional.scaled_mm and scaled_grouped_mm take for NVFP4 (packed codes,
blocked scales, fp32 scales per tensor or group), refuse what those refuse, undo the layout and
multiply as the reference backend does: with what it is given, a sum of the same fp32 products.
They check a call; they are not for training (grouped ones read group ends).
"""

import torch

from ..errors import ConfigError
from ..formats import BLOCK
from ..numerics import from_blocked
from ..numerics.grouped import padded_ends
from ..numerics.layout import TILE_ROWS, blocked_shape
from ..numerics.quantize import scaled_values
from .native_gemm import SCALING, SWIZZLE, Gemms
from .native_layout import group_of_columns


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ConfigError(f"torch's NVFP4 GEMMs would refuse this call: {rule}")


def _check(a, b, scale_a, scale_b, recipes, swizzles, groups: int) -> None:
    """What torch checks of both kinds of GEMM."""
    for t in (a, b):
        _require(t.dtype == torch.float4_e2m1fn_x2, f"codes are {t.dtype}")
    _require(a.is_contiguous(), "the left operand must have its contraction last")
    _require(b.transpose(-2, -1).is_contiguous(), "the right operand must be a transposed view")
    _require(a.shape[-1] == b.shape[-2] and a.shape[-1] % 16 == 0, "contraction must be 32 n")
    _require(b.shape[-1] % 16 == 0, "the result must have 16 n columns")
    _require(all(r == SCALING for r in recipes), "scales must be 1x16 and per tensor")
    _require(all(s == SWIZZLE for s in swizzles), "block scales must be blocked")
    for block, whole in (scale_a, scale_b):
        _require(block.dtype == torch.float8_e4m3fn and block.is_contiguous(), "block scales")
        _require(whole.dtype == torch.float32 and whole.numel() == groups, "fp32 scales")


def _values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return scaled_values(codes.contiguous().view(torch.uint8), scale)


def _product(a, b, scale_a, scale_b, dtype: torch.dtype) -> torch.Tensor:
    """Values (M, K) and (N, K) and their fp32 scales to (M, N)."""
    with torch.autocast(a.device.type, enabled=False):
        acc = a @ b.T
    return acc.mul_(scale_a * scale_b).to(dtype)


def scaled_mm(
    mat_a,
    mat_b,
    scale_a,
    scale_recipe_a,
    scale_b,
    scale_recipe_b,
    swizzle_a,
    swizzle_b,
    output_dtype,
):
    """As torch.nn.functional.scaled_mm, for NVFP4 with two levels of scales."""
    recipes, swizzles = (scale_recipe_a, scale_recipe_b), (swizzle_a, swizzle_b)
    _check(mat_a, mat_b, scale_a, scale_b, recipes, swizzles, 1)
    values = []
    for codes, (block, _) in ((mat_a, scale_a), (mat_b.t(), scale_b)):
        rows, columns = codes.shape[0], 2 * codes.shape[1] // BLOCK
        expected = blocked_shape(rows, columns)
        _require(block.numel() == expected[0] * expected[1], f"{block.numel()} block scales")
        values.append(_values(codes, from_blocked(block, rows, columns)))
    return _product(*values, scale_a[1], scale_b[1], output_dtype)


def scaled_grouped_mm(
    mat_a,
    mat_b,
    scale_a,
    scale_recipe_a,
    scale_b,
    scale_recipe_b,
    swizzle_a,
    swizzle_b,
    offs,
    output_dtype,
):
    """As torch.nn.functional.scaled_grouped_mm; what that leaves undefined is NaN here."""
    recipes, swizzles = (scale_recipe_a, scale_recipe_b), (swizzle_a, swizzle_b)
    _require(offs.dtype == torch.int32 and offs.dim() == 1, "offs must be int32")
    _check(mat_a, mat_b, scale_a, scale_b, recipes, swizzles, offs.shape[0])
    run = _groups_of_rows if mat_b.dim() == 3 else _groups_of_slots
    return run(mat_a, mat_b, scale_a, scale_b, offs, output_dtype)


def _groups_of_rows(mat_a, mat_b, scale_a, scale_b, offs, dtype):
    groups, columns = offs.shape[0], 2 * mat_a.shape[1] // BLOCK
    n = mat_b.shape[2]
    expected = blocked_shape(n, columns)
    _require(tuple(scale_b[0].shape) == (groups, expected[0] * expected[1]), "scales of experts")
    _require(scale_a[0].dim() == 2 and len(scale_a[0]) >= len(mat_a), "scales of rows")
    y = torch.full((mat_a.shape[0], n), torch.nan, dtype=dtype, device=mat_a.device)
    width, start, first = expected[1], 0, 0
    blocked = scale_a[0].view(-1)
    tiles = padded_ends(offs, TILE_ROWS).tolist()
    for e, (end, last) in enumerate(zip(offs.tolist(), tiles, strict=True)):
        if end > start:
            a_scale = from_blocked(blocked[first * width : last * width], end - start, columns)
            a = _values(mat_a[start:end], a_scale)
            b = _values(mat_b[e].t(), from_blocked(scale_b[0][e], n, columns))
            y[start:end] = _product(a, b, scale_a[1][e], scale_b[1][e], dtype)
        start, first = end, last
    return y


def _groups_of_slots(mat_a, mat_b, scale_a, scale_b, offs, dtype):
    rows = (mat_a.shape[0], mat_b.shape[1])
    for count, (block, _) in zip(rows, (scale_a, scale_b), strict=True):
        _require(block.dim() == 2 and len(block) >= count, "scales of a group of slots")
    dw = torch.full((offs.shape[0], *rows), torch.nan, dtype=dtype, device=mat_a.device)
    start = 0
    for e, end in enumerate(offs.tolist()):
        _require((end - start) % 32 == 0, "groups must be 32 n slots")
        if end > start:
            pairs = ((mat_a, scale_a[0]), (mat_b.t(), scale_b[0]))
            a, b = (_values(*group_of_columns(*pair, start, end)) for pair in pairs)
            dw[e] = _product(a, b, scale_a[1][e], scale_b[1][e], dtype)
        start = end
    return dw


STAND_IN = Gemms(scaled_mm, scaled_grouped_mm, (torch.bfloat16, torch.float32, torch.float16))
