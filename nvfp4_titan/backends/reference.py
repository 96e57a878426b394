"""The reference backend: the oracle on any device."""

import torch

from ..numerics import QuantizedOperand
from . import reference_grouped_ops as grouped_ops
from . import reference_ops as ops
from .backend import Backend, Operands, OperandUse


def _specs(*uses: OperandUse | None) -> tuple[list[str], list[int], bool]:
    """Formats and SR streams as the ops take them, and whether any use needs the key."""
    specs = [str(use.format) if use else "" for use in uses]
    streams = [use.stream if use else 0 for use in uses]
    return specs, streams, any(use and use.format.rounding == "sr" for use in uses)


def _quantize(
    t: torch.Tensor,
    rows: OperandUse | None,
    cols: OperandUse | None,
    key: torch.Tensor | None = None,
    offs: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    offset: tuple[int, int] = (0, 0),
) -> Operands:
    specs, streams, keyed = _specs(rows, cols)
    # Without the layer's key, calls on one tensor are the same call: compilers merge them.
    key = key if keyed else None
    sizes = t.shape[-1], t.shape[-2]
    if t.dim() == 3:
        assert amax is None and offset == (0, 0), "expert weights are never shards of a matrix"
        outputs = grouped_ops.quantize_experts_op(t, *specs, streams, key)
    elif offs is not None:
        outputs = grouped_ops.quantize_tokens_op(t, offs, *specs, streams, key)
    else:
        outputs = ops.quantize(t, *specs, streams, key, amax, list(offset))
    amaxes = outputs[4]
    row_operand = QuantizedOperand(outputs[0], outputs[1], amaxes[0], sizes[0])
    col_operand = QuantizedOperand(outputs[2], outputs[3], amaxes[1], sizes[1])
    return row_operand if rows else None, col_operand if cols else None


def _amax(t: torch.Tensor, rows: OperandUse | None, cols: OperandUse | None) -> torch.Tensor:
    return ops.amax(t, *_specs(rows, cols)[0])


def _fields(operand: QuantizedOperand) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return operand.codes, operand.block_scale, operand.amax


def _mm(
    a: QuantizedOperand,
    b: QuantizedOperand,
    columns: int,
    out_dtype: torch.dtype,
    b_transposed: bool = False,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    operands = (*_fields(a), *_fields(b))
    if offs is not None:
        return grouped_ops.grouped_mm(*operands, offs, columns, out_dtype, b_transposed)
    return ops.mm(*operands, columns, out_dtype, b_transposed)


def _wgrad(
    dy: QuantizedOperand,
    x: QuantizedOperand,
    out_dtype: torch.dtype,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    operands = (*_fields(dy), *_fields(x))
    if offs is not None:
        return grouped_ops.grouped_wgrad(*operands, offs, out_dtype)
    return ops.mm(*operands, x.codes.shape[0], out_dtype, False)


def _unavailable(device: str | None = None) -> None:
    """Runs everywhere."""


REFERENCE = Backend(
    name="reference",
    unavailable=_unavailable,
    quantize=_quantize,
    amax=_amax,
    mm=_mm,
    wgrad=_wgrad,
)
