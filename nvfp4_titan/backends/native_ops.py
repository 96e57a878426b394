"""The native backend's custom ops, plain and grouped.

Importing this module imports no Triton. Ops take and return contiguous tensors in the layout of
native_layout.py. `mode` says how an op runs:

    hardware      the hardware's conversions, stochastic rounding included where it has it; torch's
                  GEMMs
    software_sr   the same, but stochastic rounding is the oracle's bits
    stand_in      kernels without Blackwell's instructions (on a CPU the oracle), and the GEMMs of
                  native_standin.py: checks everything else, on any device
"""

from functools import cache

import torch

from ..errors import UnsupportedError
from ..recipe import OperandFormat
from .backend import OperandUse, key_on
from .native_gemm import (
    TORCH,
    GemmOperand,
    Gemms,
    multiply,
    multiply_groups,
    multiply_slots,
    whole_columns,
)
from .native_layout import from_oracle, operand_shapes, slot_ends
from .native_standin import STAND_IN
from .reference import REFERENCE
from .reference_ops import no_operand
from .registration import fake_of, functional_op
from .triton_ops import _groups, _module

_T = torch.Tensor
CONVERSIONS = {"hardware": "hardware", "software_sr": "software_sr", "stand_in": "portable"}
"""Modes, and the conversions that their kernels use (native_launch.levels)."""


def runs_kernels(device: torch.device, mode: str) -> bool:
    """Whether tensors on a device are for the kernels; a CPU's are for the oracle, as stand-in.

    Raises:
        UnsupportedError: a tensor on the CPU, and not the stand-in.
    """
    if device.type != "cpu" or _interpreted():
        return True
    if mode != "stand_in":
        raise UnsupportedError(
            "backend 'native' got a tensor on 'cpu': move it to a GPU, or use backend = 'reference'"
        )
    return False


@cache
def _interpreted() -> bool:
    # Known where kernels were asked for before: importing Triton only to ask costs seconds.
    from .triton import _INTERPRETED

    return _INTERPRETED


def _gemms(mode: str) -> Gemms:
    return STAND_IN if mode == "stand_in" else TORCH


@functional_op("native_quantize")
def quantize(
    t: torch.Tensor,
    offs: torch.Tensor | None,
    rows: str,
    cols: str,
    streams: list[int],
    key: torch.Tensor | None,
    amax: torch.Tensor | None,
    offset: list[int],
    mode: str,
) -> tuple[_T, _T, _T, _T, _T]:
    """Quantize (M, K), tokens (M, K) with offs, or experts (E, N, K), along both dims.

    Codes and scales of the row use and of the column use, and the amaxes of both.
    """
    shape = (2, *_groups(t, offs))
    if runs_kernels(t.device, mode):
        options = (amax, tuple(offset), CONVERSIONS[mode])
        outputs, amaxes = _module("native_launch").quantize_native(
            t, offs, rows, cols, streams, key_on(key, t.device), *options
        )
        return (*outputs, amaxes.view(shape))
    uses = [
        OperandUse(OperandFormat.parse(spec), stream) if spec else None
        for spec, stream in zip((rows, cols), streams, strict=True)
    ]
    operands = REFERENCE.quantize(t, *uses, key, offs, amax, tuple(offset))
    amaxes = t.new_zeros(shape, dtype=torch.float32)
    outputs = []
    for i, operand in enumerate(operands):
        if operand is None:
            outputs += no_operand(t)
            continue
        outputs += from_oracle(operand.codes, operand.block_scale, offs, columns=i == 1)
        amaxes[i] = operand.amax
    return (*outputs, amaxes)


@fake_of("native_quantize")
def _(t, offs, rows, cols, streams, key, amax, offset, mode):
    groups = None if offs is None else offs.shape[0]
    outputs = []
    for i, spec in enumerate((rows, cols)):
        if not spec:
            outputs += no_operand(t)
            continue
        codes, scale = operand_shapes(t.shape, groups, columns=i == 1)
        outputs.append(t.new_empty(codes, dtype=torch.uint8))
        outputs.append(t.new_empty(scale, dtype=torch.float8_e4m3fn))
    return (*outputs, t.new_empty((2, *_groups(t, offs)), dtype=torch.float32))


@functional_op("native_transpose")
def transpose(codes: torch.Tensor, scale: torch.Tensor, size: int, mode: str) -> tuple[_T, _T]:
    """The operand of w.T (.., size, Np / 2) from that of w (.., N, Kp / 2), of square blocks."""
    if runs_kernels(codes.device, mode):
        return _module("native_launch").transpose_native(codes, scale, size)
    return transposed_by_oracle(codes, scale, size)


@fake_of("native_transpose")
def _(codes, scale, size, mode):
    new_codes, new_scale = operand_shapes(torch.Size((*codes.shape[:-1], size)), None, True)
    return codes.new_empty(new_codes), scale.new_empty(new_scale)


def transposed_by_oracle(
    codes: torch.Tensor, scale: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`transpose` in plain PyTorch."""
    from ..numerics import from_blocked, to_blocked
    from ..numerics.rounding import pack_codes, unpack_codes

    if codes.dim() == 3:
        pairs = [transposed_by_oracle(*pair, size) for pair in zip(codes, scale, strict=True)]
        return tuple(torch.stack(part) for part in zip(*pairs, strict=True))
    rows = codes.shape[0]
    (_, width), _ = operand_shapes(torch.Size((rows, size)), None, columns=True)
    plain = from_blocked(scale, rows, codes.shape[1] // 8).view(torch.uint8)
    new_scale = plain[::16, : -(-size // 16)].repeat_interleave(16, dim=1)[:, :size].T
    new_scale = torch.nn.functional.pad(new_scale, (0, width // 8 - new_scale.shape[1]))
    new_codes = unpack_codes(codes)[:, :size].T
    new_codes = torch.nn.functional.pad(new_codes, (0, 2 * width - rows))
    # Not contiguous(): that leaves a single row's strides as they are.
    new_codes = new_codes.clone(memory_format=torch.contiguous_format)
    return pack_codes(new_codes), to_blocked(new_scale).view(scale.dtype)


@functional_op("native_mm")
def mm(
    a_codes: torch.Tensor,
    a_scale: torch.Tensor,
    a_amax: torch.Tensor,
    b_codes: torch.Tensor,
    b_scale: torch.Tensor,
    b_amax: torch.Tensor,
    out_dtype: torch.dtype,
    mode: str,
) -> torch.Tensor:
    """(M, K) @ (N, K).T -> (M, N)."""
    m, n = a_codes.shape[0], b_codes.shape[0]
    if 0 in (m, n, a_codes.shape[1]):
        return a_codes.new_zeros((m, n), dtype=out_dtype)
    b = whole_columns(GemmOperand(b_codes, b_scale, b_amax))
    y = multiply(_gemms(mode), GemmOperand(a_codes, a_scale, a_amax), b, out_dtype)
    return y[:, :n].contiguous()


@fake_of("native_mm")
def _(a_codes, a_scale, a_amax, b_codes, b_scale, b_amax, out_dtype, mode):
    return a_codes.new_empty((a_codes.shape[0], b_codes.shape[0]), dtype=out_dtype)


@functional_op("native_grouped_mm")
def grouped_mm(
    a_codes: torch.Tensor,
    a_scale: torch.Tensor,
    a_amax: torch.Tensor,
    b_codes: torch.Tensor,
    b_scale: torch.Tensor,
    b_amax: torch.Tensor,
    offs: torch.Tensor,
    out_dtype: torch.dtype,
    mode: str,
) -> torch.Tensor:
    """Per group (m, K) @ (N, K).T -> (m, N); rows of no group give 0."""
    m, n = a_codes.shape[0], b_codes.shape[1]
    if not m:
        return a_codes.new_zeros((m, n), dtype=out_dtype)
    a = GemmOperand(a_codes, a_scale, a_amax)
    b = whole_columns(GemmOperand(b_codes, b_scale, b_amax))
    y = multiply_groups(_gemms(mode), a, b, offs, out_dtype)[:, :n].contiguous()
    if runs_kernels(y.device, mode):
        _module("native_launch").clear_tail_native(y, offs)
    else:
        y[offs[-1] :] = 0
    return y


@fake_of("native_grouped_mm")
def _(a_codes, a_scale, a_amax, b_codes, b_scale, b_amax, offs, out_dtype, mode):
    return a_codes.new_empty((a_codes.shape[0], b_codes.shape[1]), dtype=out_dtype)


@functional_op("native_grouped_wgrad")
def grouped_wgrad(
    dy_codes: torch.Tensor,
    dy_scale: torch.Tensor,
    dy_amax: torch.Tensor,
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    x_amax: torch.Tensor,
    offs: torch.Tensor,
    out_dtype: torch.dtype,
    mode: str,
) -> torch.Tensor:
    """Per group (N, p) @ (K, p).T -> (E, N, K)."""
    k = x_codes.shape[0]
    dy = GemmOperand(dy_codes, dy_scale, dy_amax)
    x = whole_columns(GemmOperand(x_codes, x_scale, x_amax))
    dw = multiply_slots(_gemms(mode), dy, x, slot_ends(offs), out_dtype)
    return dw[..., :k].contiguous()


@fake_of("native_grouped_wgrad")
def _(dy_codes, dy_scale, dy_amax, x_codes, x_scale, x_amax, offs, out_dtype, mode):
    shape = (offs.shape[0], dy_codes.shape[0], x_codes.shape[0])
    return dy_codes.new_empty(shape, dtype=out_dtype)
