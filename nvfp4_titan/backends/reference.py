"""The reference backend: the oracle on any device."""

import torch

from ..numerics import QuantizedOperand
from ..recipe import FORMATS
from . import reference_grouped_ops as grouped_ops
from . import reference_ops as ops
from .backend import Backend, GemmOp, Operands, OperandUse, streams_and_key


def _specs(*uses: OperandUse | None) -> list[str]:
    """Formats as the ops take them."""
    return [str(use.format) if use else "" for use in uses]


def _quantize(
    t: torch.Tensor,
    rows: OperandUse | None,
    cols: OperandUse | None,
    key: torch.Tensor | None = None,
    offs: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    offset: tuple[int, int] = (0, 0),
) -> Operands:
    specs = _specs(rows, cols)
    streams, key = streams_and_key(rows, cols, key)
    sizes = t.shape[-1], t.shape[-2]
    if t.dim() == 3:
        outputs = grouped_ops.quantize_experts_op(t, *specs, streams, key, amax, list(offset))
    elif offs is not None:
        outputs = grouped_ops.quantize_tokens_op(t, offs, *specs, streams, key, amax, offset[1])
    else:
        outputs = ops.quantize(t, *specs, streams, key, amax, list(offset))
    amaxes = outputs[4]
    return (
        _operand(rows, *outputs[0:2], amaxes[0], sizes[0]),
        _operand(cols, *outputs[2:4], amaxes[1], sizes[1]),
    )


def _operand(
    use: OperandUse | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    amax: torch.Tensor,
    size: int,
) -> QuantizedOperand | None:
    if use is None:
        return None
    fmt = use.format.format
    return QuantizedOperand(codes, scale, amax if fmt.tensor_scale else None, size, fmt)


def _amax(
    t: torch.Tensor,
    rows: OperandUse | None,
    cols: OperandUse | None,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    specs = _specs(rows, cols)
    if t.dim() == 3 or offs is not None:
        return grouped_ops.grouped_amax(t, offs, *specs)
    return ops.amax(t, *specs)


def _fields(a: QuantizedOperand, b: QuantizedOperand) -> tuple:
    """Two operands as the ops take them: the tensors of each, and "format,format"."""
    tensors = (a.codes, a.block_scale, a.amax, b.codes, b.block_scale, b.amax)
    return *tensors, f"{a.format.name},{b.format.name}"


def _mm(
    a: QuantizedOperand,
    b: QuantizedOperand,
    columns: int,
    out_dtype: torch.dtype,
    b_transposed: bool = False,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    operands = _fields(a, b)
    if offs is not None:
        return grouped_ops.grouped_mm(*operands, offs, columns, out_dtype, b_transposed)
    return ops.mm(*operands, columns, out_dtype, b_transposed)


def _weight_shape(
    a_codes: torch.Tensor, a_scale, a_amax, b_codes, b_scale, b_amax, formats, columns: int, *_
) -> tuple[int, int]:
    a_format = FORMATS[formats.partition(",")[0]]
    return a_codes.shape[1] * a_format.codes_per_byte, columns


def _wgrad(
    dy: QuantizedOperand,
    x: QuantizedOperand,
    out_dtype: torch.dtype,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    operands = _fields(dy, x)
    if offs is not None:
        return grouped_ops.grouped_wgrad(*operands, offs, out_dtype)
    return ops.mm(*operands, x.codes.shape[0], out_dtype, False)


def _dequantize(
    operand: QuantizedOperand, dtype: torch.dtype, offs: torch.Tensor | None = None
) -> torch.Tensor:
    packed = operand.codes, operand.block_scale, operand.amax
    return ops.dequantize(*packed, offs, operand.K, dtype, operand.format.name)


def _unavailable(device: str | None = None) -> None:
    """Runs everywhere."""


REFERENCE = Backend(
    name="reference",
    unavailable=_unavailable,
    quantize=_quantize,
    amax=_amax,
    mm=_mm,
    wgrad=_wgrad,
    dequantize=_dequantize,
    gemm=GemmOp("nvfp4_titan::reference_mm", _weight_shape),
    formats=frozenset(FORMATS),
)
