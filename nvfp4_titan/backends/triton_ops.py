"""The Triton backend's custom ops, plain and grouped.

Importing this module imports no Triton: it may be absent where the package is only imported. Ops
take and return contiguous tensors in the layouts of triton_quantize.py. No op takes a layer's name,
and RTNE takes no key, so that compilers merge equal calls.

A use travels as a string: its `OperandFormat`, and after "/" what is written of it ("p" packed,
"v" values); "" stands for a use that nobody asked for. The formats of a GEMM's two operands travel
as "format,format".
"""

import logging
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType

import torch

from ..errors import UnsupportedError
from ..formats import BLOCK, BlockFormat
from ..numerics.grouped import padded_rows
from ..recipe import FORMATS, OperandFormat
from . import cublas
from .backend import key_on
from .registration import fake_of, functional_op

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
    if fmt.rht and fmt.format.block != BLOCK:
        raise UnsupportedError(f"backend 'triton' lacks {name}: use backend = 'reference'")
    return _module("triton_launch").Use(
        square=fmt.block[0] != 1,
        sr=fmt.rounding == "sr",
        rht=fmt.rht,
        packed="p" in written,
        values="v" in written,
        format=fmt.format,
    )


@cache
def _formats(names: str) -> tuple[BlockFormat, ...]:
    """Of "format,format"."""
    return tuple(FORMATS[name] for name in names.split(","))


@cache
def _any_scaled(*specs: str) -> bool:
    """Whether any use has a scale per tensor, and so needs an amax."""
    return any(_layout(spec).tensor_scale for spec in specs if spec)


@cache
def _layout(spec: str) -> BlockFormat:
    """Format of a use, which says how it is stored; that of "" stores nothing."""
    return OperandFormat.parse(spec.partition("/")[0]).format if spec else FORMATS["nvfp4"]


def _outputs(
    t: torch.Tensor, offs: torch.Tensor | None, rows: str, cols: str, new: Callable
) -> list[torch.Tensor | None]:
    """Codes, scales and values of both uses, made by `new`; None where not asked for."""
    groups = None if offs is None else offs.shape[0]
    # A compiler's sizes may be symbols, which cannot be looked up.
    known = all(type(size) is int for size in t.shape)
    shapes = (_output_shapes if known else _output_shapes.__wrapped__)(t.shape, groups, rows, cols)
    return [None if kind is None else new(kind[0], dtype=kind[1]) for kind in shapes]


@lru_cache(maxsize=4096)
def _output_shapes(
    shape: torch.Size, groups: int | None, rows: str, cols: str
) -> list[tuple[tuple[int, ...], torch.dtype] | None]:
    *outer, m, k = shape
    outputs = []
    for spec, along_rows in ((rows, False), (cols, True)):
        fmt, written = _layout(spec), spec.partition("/")[2]
        blocks = -(-(m if along_rows else k) // fmt.block)
        if along_rows and groups is not None:
            blocks = padded_rows(m, groups, fmt.block) // fmt.block
        for letter, a_block, dtype in (
            ("p", fmt.block // fmt.codes_per_byte, fmt.code_dtype),
            ("p", 1, fmt.scale_dtype),
            ("v", fmt.block, torch.bfloat16),
        ):
            last = (blocks * a_block, k) if along_rows else (m, blocks * a_block)
            outputs.append(((*outer, *last), dtype) if letter in written else None)
    return outputs


def _groups(t: torch.Tensor, offs: torch.Tensor | None) -> tuple[int, ...]:
    """Shape of an amax per group: (E,), or () for one tensor."""
    if offs is not None:
        return tuple(offs.shape)
    return tuple(t.shape[:-2])


@functional_op("triton_amax")
def amax(t: torch.Tensor, offs: torch.Tensor | None, rows: str, cols: str) -> torch.Tensor:
    """Amaxes (2,) of the two uses of t (M, K), or (2, E) where t is grouped."""
    amax_triton = _module("triton_launch").amax_triton
    return amax_triton(t, offs, _use(rows), _use(cols), (2, *_groups(t, offs)))


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
) -> list[torch.Tensor]:
    """Quantize (M, K), tokens (M, K) with offs, or experts (E, N, K), along both dims.

    Returns codes and scales, then values, of the row use and of the column use, as far as they are
    asked for; then the amaxes (2, ...) where they are needed and were not given. Of a given `amax`
    (fp32) what is read must be contiguous: the first row, and the second with a column use.
    """
    launch = _module("triton_launch")
    uses = _use(rows), _use(cols)
    # Nothing is launched for an empty tensor, whose groups have slots all the same.
    outputs = _outputs(t, offs, rows, cols, t.new_empty if t.numel() else t.new_zeros)
    returned = [output for output in outputs if output is not None]
    if amax is None and _any_scaled(rows, cols):
        amax = launch.amax_triton(t, offs, *uses, (2, *_groups(t, offs)))
        returned.append(amax)
    key = key_on(key, t.device)
    launch.quantize_triton(t, offs, *uses, amax, outputs, streams, key, tuple(offset))
    return returned


@fake_of("triton_quantize")
def _(t, offs, rows, cols, streams, key, amax, offset):
    returned = [o for o in _outputs(t, offs, rows, cols, t.new_empty) if o is not None]
    if amax is None and _any_scaled(rows, cols):
        returned.append(t.new_empty((2, *_groups(t, offs)), dtype=torch.float32))
    return returned


@functional_op("triton_unpack")
def unpack(
    codes: torch.Tensor,
    scale: torch.Tensor,
    amax: torch.Tensor | None,
    offs: torch.Tensor | None,
    along_rows: bool,
    format: str,
) -> torch.Tensor:
    """Values (bf16) of a packed operand; along_rows: a column operand, tokens first."""
    launch, fmt = _module("triton_launch"), FORMATS[format]
    values = _values(codes, along_rows, fmt, torch.bfloat16)
    shape = values.shape
    if amax is None:
        # Without a scale per tensor there is nothing that groups differ in.
        shape, offs = torch.Size((values.numel() // shape[-1], shape[-1])), None
    elif offs is not None and along_rows:
        shape = torch.Size((shape[0] - fmt.block * offs.shape[0], shape[1]))
    slots = launch.Slots.of(shape, offs, fmt.block if along_rows else BLOCK)
    launch.unpack_triton(codes, scale, amax, values, slots, along_rows, fmt)
    return values


def _values(
    codes: torch.Tensor, along_rows: bool, fmt: BlockFormat, dtype: torch.dtype
) -> torch.Tensor:
    *outer, m, k = codes.shape
    n = fmt.codes_per_byte
    shape = (*outer, n * m, k) if along_rows else (*outer, m, n * k)
    return codes.new_empty(shape, dtype=dtype)


@fake_of("triton_unpack")
def _(codes, scale, amax, offs, along_rows, format):
    return _values(codes, along_rows, FORMATS[format], torch.bfloat16)


@functional_op("triton_dequantize")
def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    amax: torch.Tensor | None,
    offs: torch.Tensor | None,
    dtype: torch.dtype,
    format: str,
) -> torch.Tensor:
    """x_hat (..., Kp) of a packed row operand; rows of no group are 0."""
    launch, fmt = _module("triton_launch"), FORMATS[format]
    x = _values(codes, False, fmt, dtype)
    if offs is not None:
        x.zero_()
    slots = launch.Slots.of(x.shape, offs)
    launch.unpack_triton(codes, scale, amax, x, slots, False, fmt, dequantize=True)
    return x


@fake_of("triton_dequantize")
def _(codes, scale, amax, offs, dtype, format):
    return _values(codes, False, FORMATS[format], dtype)


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
    a_amax: torch.Tensor | None,
    b_amax: torch.Tensor | None,
    a_transposed: bool,
    b_transposed: bool,
    columns: int,
    out_dtype: torch.dtype,
    formats: str,
) -> torch.Tensor:
    """(m, k) @ (k, columns) of values, times alpha.

    Args:
        a: (m, >= k) bf16, or (k, m) if a_transposed.
        b: (k, >= columns) bf16, or (columns, k) if b_transposed. b's k counts.
        a_amax: fp32 scalar; None for a format without a scale per tensor.
        b_amax: Likewise.
        a_transposed: See a.
        b_transposed: See b.
        columns: Columns of the result.
        out_dtype: Result's dtype.
        formats: "format,format" of a and b.
    """
    launch = _module("triton_launch")
    m, k = a.shape[1 if a_transposed else 0], b.shape[1 if b_transposed else 0]
    if 0 in (m, k, columns):
        return a.new_zeros((m, columns), dtype=out_dtype)
    alpha = launch.alpha_triton(a_amax, b_amax, _formats(formats), a.device)
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
def _(a, b, a_amax, b_amax, a_transposed, b_transposed, columns, out_dtype, formats):
    return a.new_empty((a.shape[1 if a_transposed else 0], columns), dtype=out_dtype)


@functional_op("triton_grouped_mm")
def grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_amax: torch.Tensor | None,
    b_amax: torch.Tensor | None,
    offs: torch.Tensor,
    b_transposed: bool,
    columns: int,
    out_dtype: torch.dtype,
    formats: str,
) -> torch.Tensor:
    """Per group (m, k) @ (k, columns); b (E, k, >= columns), or (E, columns, k) if b_transposed."""
    return _module("triton_grouped_gemm").grouped_mm_triton(
        a, b, a_amax, b_amax, offs, b_transposed, columns, out_dtype, _formats(formats)
    )


@fake_of("triton_grouped_mm")
def _(a, b, a_amax, b_amax, offs, b_transposed, columns, out_dtype, formats):
    return a.new_empty((a.shape[0], columns), dtype=out_dtype)


@functional_op("triton_grouped_wgrad")
def grouped_wgrad(
    dy: torch.Tensor,
    x: torch.Tensor,
    dy_amax: torch.Tensor | None,
    x_amax: torch.Tensor | None,
    offs: torch.Tensor,
    out_dtype: torch.dtype,
    formats: str,
) -> torch.Tensor:
    """Per group (N, p) @ (p, K) of values dy (P, N) and x (P, K) by slots: (E, N, K)."""
    return _module("triton_grouped_gemm").grouped_wgrad_triton(
        dy, x, dy_amax, x_amax, offs, out_dtype, _formats(formats)
    )


@fake_of("triton_grouped_wgrad")
def _(dy, x, dy_amax, x_amax, offs, out_dtype, formats):
    return dy.new_empty((offs.shape[0], dy.shape[1], x.shape[1]), dtype=out_dtype)
