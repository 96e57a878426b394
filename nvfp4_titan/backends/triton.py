"""The Triton backend: the whole recipe in fused kernels and bf16 GEMMs, on sm_80 and newer.

Bits are the oracle's, in every format. A GEMM multiplies `lut[q] * S_b`, which bf16 holds exactly,
with fp32 accumulation, and alpha is applied in fp32 before the output cast: the NVFP4 GEMM up to
the order of accumulation (it emulates FP4, at bf16 speed). MXFP8's `code * scale` is exact in bf16,
too, and needs no alpha. Operands for a GEMM that follows at once are written as those values;
operands kept for later stay packed, 0.56 (1.03) bytes an element, and are unpacked when used.

This module imports no Triton; triton_ops.py loads the kernels when the first one runs.
"""

import os
from importlib.util import find_spec

import torch

from ..numerics import QuantizedOperand
from ..recipe import FORMATS
from . import triton_ops as ops
from .backend import Backend, GemmOp, Operands, OperandUse, any_scaled, streams_and_key

_INSTALLED = find_spec("triton") is not None
# Triton reads it on import, so that it cannot change later.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_MIN_CAPABILITY = (8, 0)


def _spec(use: OperandUse | None) -> str:
    """A use as the ops take it."""
    if use is None:
        return ""
    return str(use.format) + "/" + ("p" if use.packed else "") + ("v" if use.values else "")


def _quantize(
    t: torch.Tensor,
    rows: OperandUse | None,
    cols: OperandUse | None,
    key: torch.Tensor | None = None,
    offs: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    offset: tuple[int, int] = (0, 0),
) -> Operands:
    streams, key = streams_and_key(rows, cols, key)
    if amax is not None and (cols is not None or amax.dim() > 1):
        amax = amax.contiguous()
    specs = _spec(rows), _spec(cols)
    outputs = list(ops.quantize(t, offs, *specs, streams, key, amax, list(offset)))
    if amax is None and any_scaled(rows, cols):
        amax = outputs.pop()
    row_operand = _operand(rows, outputs, amax, 0, t.shape[-1])
    return row_operand, _operand(cols, outputs, amax, 1, t.shape[-2])


def _operand(
    use: OperandUse | None,
    outputs: list[torch.Tensor],
    amaxes: torch.Tensor | None,
    number: int,
    size: int,
) -> QuantizedOperand | None:
    """The first or second (`number`) use's operand, whose outputs are taken off the list."""
    if use is None:
        return None
    found = [outputs.pop(0) for _ in range(2 * use.packed + use.values)]
    if number == 1:  # stored tokens first; an operand has its contraction last
        found = [output.mT for output in found]
    fmt = use.format.format
    amax = amaxes[number] if fmt.tensor_scale else None
    codes, scale = found[:2] if use.packed else (None, None)
    return QuantizedOperand(codes, scale, amax, size, fmt, found[-1] if use.values else None)


def _amax(
    t: torch.Tensor,
    rows: OperandUse | None,
    cols: OperandUse | None,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    return ops.amax(t, offs, _spec(rows), _spec(cols))


def _values(
    operand: QuantizedOperand, along_rows: bool, offs: torch.Tensor | None = None
) -> torch.Tensor:
    """What the GEMM multiplies, as it lies: (R, Kp), or with along_rows (P, K), tokens first."""
    if operand.values is not None:
        return operand.values.mT if along_rows else operand.values
    packed = operand.codes, operand.block_scale
    if along_rows:
        packed = tuple(t.mT for t in packed)
    return ops.unpack(*packed, operand.amax, offs, along_rows, operand.format.name)


def _dequantize(
    operand: QuantizedOperand, dtype: torch.dtype, offs: torch.Tensor | None = None
) -> torch.Tensor:
    packed = operand.codes, operand.block_scale, operand.amax
    return ops.dequantize(*packed, offs, dtype, operand.format.name)[..., : operand.K]


def _mm(
    a: QuantizedOperand,
    b: QuantizedOperand,
    columns: int,
    out_dtype: torch.dtype,
    b_transposed: bool = False,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    # A weight quantized along its rows lies contraction first. (One row may pass for one column:
    # they lie alike.)
    b_tensor = b.codes if b.values is None else b.values
    contraction_first = not b_tensor.is_contiguous()
    left, right = _values(a, False, offs), _values(b, contraction_first)
    operands, formats = (left, right, a.amax, b.amax), f"{a.format.name},{b.format.name}"
    transposed = contraction_first == b_transposed
    if offs is None and _needs_no_alpha(a, b, out_dtype):
        right = (right.mT if transposed else right)[:, :columns]
        return left[:, : right.shape[0]] @ right
    if offs is not None:
        return ops.grouped_mm(*operands, offs, transposed, columns, out_dtype, formats)
    return ops.gemm(*operands, False, transposed, columns, out_dtype, formats)


def _needs_no_alpha(a: QuantizedOperand, b: QuantizedOperand, out_dtype: torch.dtype) -> bool:
    """Whether a plain bf16 GEMM of the values is the result: then compilers get to see it."""
    return a.format.codes_per_byte == b.format.codes_per_byte == 1 and out_dtype == torch.bfloat16


def _weight_shape(
    a: torch.Tensor, b: torch.Tensor, a_amax, b_amax, a_transposed, b_transposed, columns, *_
) -> tuple[int, int]:
    return b.shape[1 if b_transposed else 0], columns


def _wgrad(
    dy: QuantizedOperand,
    x: QuantizedOperand,
    out_dtype: torch.dtype,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    left, right = _values(dy, True, offs), _values(x, True, offs)
    operands, formats = (left, right, dy.amax, x.amax), f"{dy.format.name},{x.format.name}"
    if offs is None and _needs_no_alpha(dy, x, out_dtype):
        return left.mT @ right
    if offs is not None:
        return ops.grouped_wgrad(*operands, offs, out_dtype, formats)
    return ops.gemm(*operands, True, False, right.shape[1], out_dtype, formats)


def _unavailable(device: str | None = None) -> str | None:
    """None where it can run, else why not."""
    if not _INSTALLED:
        return "triton is not installed"
    if _INTERPRETED:
        return None
    if device == "cpu":
        return "the tensors are on the CPU"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    # A compiler cannot trace the query; the eager start of a run makes it.
    if torch.compiler.is_compiling():
        return None
    if torch.cuda.get_device_capability() < _MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than sm_80 and has no bf16 tensor cores"
    return None


TRITON = Backend(
    name="triton",
    unavailable=_unavailable,
    quantize=_quantize,
    amax=_amax,
    mm=_mm,
    wgrad=_wgrad,
    dequantize=_dequantize,
    gemm=GemmOp("nvfp4_titan::triton_gemm", _weight_shape),
    formats=frozenset(FORMATS),
    key_on_device=True,
)
