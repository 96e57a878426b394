"""The native backend: FP4 tensor cores of Blackwell, through torch's block-scaled GEMMs.

Quantize kernels write packed codes and blocked scales (native_layout.py), with the hardware's
conversions; torch.nn.functional.scaled_mm and scaled_grouped_mm multiply them. dgrad's w is fprop's
operand, transposed when it is used.

    native               RTNE bits are the oracle's. Stochastic rounding is the hardware's on
                         capability 10.0 and 10.3 (B200, GB200, B300), whose distribution and bits
                         are its own, and the oracle's elsewhere.
    native_software_sr   stochastic rounding is the oracle's bits everywhere
    STAND_IN             either, with stand-ins for the GEMMs and without Blackwell's instructions:
                         what can be checked on any device. It is no choice for training.

None of this has run on a Blackwell GPU: docs/blackwell.md says what was checked, and how.

This module imports no Triton; native_ops.py loads the kernels when the first one runs.
"""

from functools import partial

import torch

from ..numerics import QuantizedOperand
from . import native_ops as ops
from .backend import Backend, GemmOp, Operands, OperandUse, streams_and_key
from .native_layout import from_oracle
from .reference import REFERENCE
from .triton import TRITON

_MIN_CAPABILITY = (10, 0)


def _spec(use: OperandUse | None) -> str:
    return str(use.format) if use else ""


def _quantize(
    mode: str,
    t: torch.Tensor,
    rows: OperandUse | None,
    cols: OperandUse | None,
    key: torch.Tensor | None = None,
    offs: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    offset: tuple[int, int] = (0, 0),
) -> Operands:
    streams, key = streams_and_key(rows, cols, key)
    outputs = ops.quantize(
        t, offs, _spec(rows), _spec(cols), streams, key, amax, list(offset), mode
    )
    amaxes = outputs[4]
    return (
        _operand(rows, *outputs[0:2], amaxes[0], t.shape[-1]),
        _operand(cols, *outputs[2:4], amaxes[1], t.shape[-2]),
    )


def _operand(
    use: OperandUse | None, codes: torch.Tensor, scale: torch.Tensor, amax: torch.Tensor, size: int
) -> QuantizedOperand | None:
    return QuantizedOperand(codes, scale, amax, size, use.format.format) if use else None


def _amax(
    mode: str,
    t: torch.Tensor,
    rows: OperandUse | None,
    cols: OperandUse | None,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    backend = TRITON if ops.runs_kernels(t.device, mode) else REFERENCE
    return backend.amax(t, rows, cols, offs)


def _blocked(operand: QuantizedOperand) -> QuantizedOperand:
    """An operand of experts or of a plain tensor in the native layout; itself if it is."""
    codes, scale = operand.codes, operand.block_scale
    if scale.dim() < codes.dim():
        return operand
    codes, scale = from_oracle(codes, scale, None, columns=False)
    return QuantizedOperand(codes, scale, operand.amax, operand.K, operand.format)


def _mm(
    mode: str,
    a: QuantizedOperand,
    b: QuantizedOperand,
    columns: int,
    out_dtype: torch.dtype,
    b_transposed: bool = False,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    b = _blocked(b)
    right = b.codes, b.block_scale
    if b_transposed:
        right = ops.transpose(*right, columns, mode)
    left = a.codes, a.block_scale
    if offs is not None:
        return ops.grouped_mm(*left, a.amax, *right, b.amax, offs, out_dtype, mode)
    return ops.mm(*left, a.amax, *right, b.amax, out_dtype, mode)


def _weight_shape(a_codes: torch.Tensor, a_scale, a_amax, b_codes: torch.Tensor, *_):
    return 2 * b_codes.shape[1], b_codes.shape[0]


def _wgrad(
    mode: str,
    dy: QuantizedOperand,
    x: QuantizedOperand,
    out_dtype: torch.dtype,
    offs: torch.Tensor | None = None,
) -> torch.Tensor:
    operands = (dy.codes, dy.block_scale, dy.amax, x.codes, x.block_scale, x.amax)
    if offs is not None:
        return ops.grouped_wgrad(*operands, offs, out_dtype, mode)
    return ops.mm(*operands, out_dtype, mode)


def _unavailable(device: str | None = None) -> str | None:
    """None where it can run, else why not."""
    reason = TRITON.unavailable(device)
    if reason is not None:
        return reason
    return _refusal_here() or None


def _refusal_here() -> str:
    """`refusal` of this machine's GPU, "" for none: compilers do not trace the query, they ask."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    return refusal(torch.cuda.get_device_capability(), torch.cuda.get_device_name()) or ""


# What torch.compiler.assume_constant_result does (torch 2.11 to 2.13); that imports Triton.
_refusal_here._dynamo_marked_constant = True


def refusal(capability: tuple[int, int], name: str) -> str | None:
    """Why a GPU cannot run it, None where it can."""
    if capability >= _MIN_CAPABILITY:
        return None
    major, minor = capability
    return (
        f"{name} (sm_{major}{minor}) has no FP4 tensor cores; they came with Blackwell, sm_100; "
        "backend = 'triton' emulates them"
    )


def _backend(name: str, mode: str) -> Backend:
    return Backend(
        name=name,
        unavailable=_unavailable,
        quantize=partial(_quantize, mode),
        amax=partial(_amax, mode),
        mm=partial(_mm, mode),
        wgrad=partial(_wgrad, mode),
        dequantize=REFERENCE.dequantize,
        gemm=GemmOp("nvfp4_titan::native_mm", _weight_shape),
        key_on_device=True,
    )


NATIVE = _backend("native", "hardware")
NATIVE_SOFTWARE_SR = _backend("native_software_sr", "software_sr")
STAND_IN = _backend("native_stand_in", "stand_in")
