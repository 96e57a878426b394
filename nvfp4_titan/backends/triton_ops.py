"""The Triton backend's custom ops, plain and grouped.

Importing this module imports no Triton: it may be absent where the package is only imported. Ops
take and return contiguous tensors in the layouts of triton_quantize.py. No op takes a layer's name,
and RTNE takes no key, so that compilers merge equal calls.

A use travels as a string: its `OperandFormat`, and after "/" what is written of it ("p" packed,
"v" values); "" stands for a use that nobody asked for.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from ..formats import BLOCK
from ..numerics.grouped import padded_rows
from ..recipe import OperandFormat
from . import cublas
from .registration import fake_of, functional_op

_T = torch.Tensor
SEVEN_TENSORS = tuple[_T, _T, _T, _T, _T, _T, _T]
"""Codes, scales and values of the row use, of the column use, and the amaxes of both."""

_logger = logging.getLogger(__name__)


@cache
def _module(name: str) -> ModuleType:
    """A module of kernels, imported when first needed."""
    return import_module(f".{name}", __package__)


@cache
def _use(spec: str):
    """What a kernel is told of a use; None for "" ."""
    if not spec:
        return None
    name, written = spec.split("/")
    fmt = OperandFormat.parse(name)
    return _module("triton_launch").Use(
        square=fmt.block[0] != 1,
        sr=fmt.rounding == "sr",
        rht=fmt.rht,
        packed="p" in written,
        values="v" in written,
    )


def _outputs(
    t: torch.Tensor, offs: torch.Tensor | None, rows: str, cols: str, new: Callable
) -> list[torch.Tensor]:
    """Codes, scales and values of both uses, made by `new`; empty where not asked for."""
    *outer, m, k = t.shape
    kp = -(-k // BLOCK) * BLOCK
    slots = -(-m // BLOCK) * BLOCK if offs is None else padded_rows(m, offs.shape[0])
    shapes = (
        ((m, kp // 2), (m, kp // BLOCK), (m, kp)),
        ((slots // 2, k), (slots // BLOCK, k), (slots, k)),
    )
    outputs = []
    for spec, (codes, scale, values) in zip((rows, cols), shapes, strict=True):
        written = spec.partition("/")[2]
        for letter, shape, dtype in (
            ("p", codes, torch.uint8),
            ("p", scale, torch.float8_e4m3fn),
            ("v", values, torch.bfloat16),
        ):
            outputs.append(new((*outer, *shape) if letter in written else (0,), dtype=dtype))
    return outputs


def _groups(t: torch.Tensor, offs: torch.Tensor | None) -> tuple[int, ...]:
    """Shape of an amax per group: (E,), or () for one tensor."""
    if offs is not None:
        return tuple(offs.shape)
    return tuple(t.shape[:-2])


@functional_op("triton_amax")
def amax(t: torch.Tensor, offs: torch.Tensor | None, rows: str, cols: str) -> torch.Tensor:
    """Amaxes (2,) of the two uses of t (M, K), or (2, E) where t is grouped."""
    launch = _module("triton_launch")
    amaxes = launch.amax_triton(t, launch.Slots.of(t.shape, offs), _use(rows), _use(cols))
    return amaxes.view(2, *_groups(t, offs))


@fake_of("triton_amax")
def _(t, offs, rows, cols):
    return t.new_empty((2, *_groups(t, offs)), dtype=torch.float32)


@functional_op("triton_quantize")
def quantize(
    t: torch.Tensor,
    offs: torch.Tensor | None,
    rows: str,
    cols: str,
    streams: list[int],
    key: torch.Tensor | None,
    amax: torch.Tensor | None,
    offset: list[int],
) -> SEVEN_TENSORS:
    """Quantize (M, K), tokens (M, K) with offs, or experts (E, N, K), along both dims."""
    launch = _module("triton_launch")
    slots = launch.Slots.of(t.shape, offs)
    uses = _use(rows), _use(cols)
    if amax is None:
        amaxes = launch.amax_triton(t, slots, *uses)
    else:
        amaxes = amax.to(torch.float32, copy=True).reshape(2, slots.groups)
    # Nothing is launched for an empty tensor, whose groups have slots all the same.
    outputs = _outputs(t, offs, rows, cols, t.new_empty if t.numel() else t.new_zeros)
    seed = 0 if key is None else int(key)
    launch.quantize_triton(t, slots, *uses, amaxes, outputs, streams, seed, tuple(offset))
    return (*outputs, amaxes.view(2, *_groups(t, offs)))


@fake_of("triton_quantize")
def _(t, offs, rows, cols, streams, key, amax, offset):
    outputs = _outputs(t, offs, rows, cols, t.new_empty)
    return (*outputs, t.new_empty((2, *_groups(t, offs)), dtype=torch.float32))


@functional_op("triton_unpack")
def unpack(
    codes: torch.Tensor,
    scale: torch.Tensor,
    amax: torch.Tensor,
    offs: torch.Tensor | None,
    along_rows: bool,
) -> torch.Tensor:
    """Values (bf16) of a packed operand; along_rows: a column operand, tokens first."""
    launch = _module("triton_launch")
    values = _values(codes, along_rows)
    shape = values.shape
    if offs is not None and along_rows:
        shape = torch.Size((shape[0] - BLOCK * offs.shape[0], shape[1]))
    slots = launch.Slots.of(shape, offs)
    launch.unpack_triton(codes, scale, amax, values, slots, along_rows)
    return values


def _values(codes: torch.Tensor, along_rows: bool) -> torch.Tensor:
    *outer, m, k = codes.shape
    shape = (*outer, 2 * m, k) if along_rows else (*outer, m, 2 * k)
    return codes.new_empty(shape, dtype=torch.bfloat16)


@fake_of("triton_unpack")
def _(codes, scale, amax, offs, along_rows):
    return _values(codes, along_rows)


@cache
def _explain_missing_cublas() -> None:
    _logger.warning(
        "NVFP4 backend 'triton' found no cuBLAS in this process: alpha is applied to fp32 sums in "
        "a pass of its own"
    )


@functional_op("triton_gemm")
def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_amax: torch.Tensor,
    b_amax: torch.Tensor,
    a_transposed: bool,
    b_transposed: bool,
    columns: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """(m, k) @ (k, columns) of values, times alpha.

    Args:
        a: (m, >= k) bf16, or (k, m) if a_transposed.
        b: (k, >= columns) bf16, or (columns, k) if b_transposed. b's k counts.
        a_amax: fp32 scalar.
        b_amax: fp32 scalar.
        a_transposed: See a.
        b_transposed: See b.
        columns: Columns of the result.
        out_dtype: Result's dtype.
    """
    launch = _module("triton_launch")
    m, k = a.shape[1 if a_transposed else 0], b.shape[1 if b_transposed else 0]
    if 0 in (m, k, columns):
        return a.new_zeros((m, columns), dtype=out_dtype)
    alpha = launch.alpha_triton(a_amax, b_amax)
    if a.device.type == "cuda" and out_dtype in cublas.DATA_TYPES:
        if cublas.library() is not None:
            sizes = (m, columns, k)
            return cublas.gemm(a, b, a_transposed, b_transposed, sizes, alpha, out_dtype)
        _explain_missing_cublas()
    left = (a.mT if a_transposed else a)[:, :k]
    right = (b.mT if b_transposed else b)[:, :columns]
    with torch.autocast(a.device.type, enabled=False):
        if a.device.type == "cuda":
            acc = torch.mm(left, right, out_dtype=torch.float32)
        else:  # Triton's interpreter on a CPU, which has no bf16 GEMM with fp32 output
            acc = left.float() @ right.float()
    return launch.scale_triton(acc, alpha, out_dtype)


@fake_of("triton_gemm")
def _(a, b, a_amax, b_amax, a_transposed, b_transposed, columns, out_dtype):
    return a.new_empty((a.shape[1 if a_transposed else 0], columns), dtype=out_dtype)


@functional_op("triton_grouped_mm")
def grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_amax: torch.Tensor,
    b_amax: torch.Tensor,
    offs: torch.Tensor,
    b_transposed: bool,
    columns: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Per group (m, k) @ (k, columns); b (E, k, >= columns), or (E, columns, k) if b_transposed."""
    return _module("triton_grouped_gemm").grouped_mm_triton(
        a, b, a_amax, b_amax, offs, b_transposed, columns, out_dtype
    )


@fake_of("triton_grouped_mm")
def _(a, b, a_amax, b_amax, offs, b_transposed, columns, out_dtype):
    return a.new_empty((a.shape[0], columns), dtype=out_dtype)


@functional_op("triton_grouped_wgrad")
def grouped_wgrad(
    dy: torch.Tensor,
    x: torch.Tensor,
    dy_amax: torch.Tensor,
    x_amax: torch.Tensor,
    offs: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Per group (N, p) @ (p, K) of values dy (P, N) and x (P, K) by slots: (E, N, K)."""
    return _module("triton_grouped_gemm").grouped_wgrad_triton(
        dy, x, dy_amax, x_amax, offs, out_dtype
    )


@fake_of("triton_grouped_wgrad")
def _(dy, x, dy_amax, x_amax, offs, out_dtype):
    return dy.new_empty((offs.shape[0], dy.shape[1], x.shape[1]), dtype=out_dtype)
