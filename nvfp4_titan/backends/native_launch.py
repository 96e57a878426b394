"""Launching the native backend's kernels."""

from functools import cache

import torch

from ..formats import BLOCK
from ..numerics.grouped import padded_rows
from .native_layout import PAD, operand_shapes, padded_size
from .native_quantize import _native_quantize_kernel
from .native_transpose import _clear_tail_kernel, _transpose_kernel
from .triton_call import cdiv, launch, next_power_of_2
from .triton_launch import (
    MAX_COLUMNS,
    Slots,
    _flat,
    _use_constants,
    _warps,
    amax_triton,
    ptx_level,
)
from .triton_ops import _use

HARDWARE_SR = ((10, 0), (10, 3))
"""Capabilities whose cvt.rs makes E2M1: ptxas refuses it for sm_110a, sm_120a and sm_121a."""


@cache
def levels(device: torch.device, conversions: str) -> tuple[int, bool]:
    """PTX and HARDWARE_SR of the kernels on a device.

    Args:
        device: A GPU, or any in Triton's interpreter.
        conversions: "hardware", "software_sr" or "portable".
    """
    level = ptx_level(device)
    if level == 0 or conversions == "portable":
        return level, False
    capability = torch.cuda.get_device_capability(device)
    if capability < (10, 0):
        return level, False
    return 100, conversions == "hardware" and capability in HARDWARE_SR


def _tile_columns(size: int) -> int:
    return max(PAD, min(MAX_COLUMNS, next_power_of_2(size)))


def _programs(blocks: int, size: int, columns: int) -> int:
    return blocks * cdiv(padded_size(size), columns)


def _empty(t: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, ragged: bool):
    # What pads a scale matrix is multiplied with zeros, or gives rows that nobody keeps; it is
    # zeroed so that an operand is the same at every call.
    make = t.new_zeros if ragged else t.new_empty
    return make(shape, dtype=dtype)


def quantize_native(
    t: torch.Tensor,
    offs: torch.Tensor | None,
    rows: str,
    cols: str,
    streams: list[int],
    key: torch.Tensor | None,
    amax: torch.Tensor | None,
    offset: tuple[int, int],
    conversions: str,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Quantize a tensor for its uses.

    Args:
        t: (M, K) or (E, N, K), fp32, bf16 or fp16.
        offs: Group ends of tokens.
        rows: Format of its use along the last dim, or "".
        cols: Format of its use along the dim before, or "".
        streams: SR streams of the two.
        key: SR key, int64 on t's device; None without SR.
        amax: Amaxes to use, or None.
        offset: Global (row, column) of t's first element.
        conversions: See `levels`.

    Returns:
        Codes and scales of the row operand and of the column operand in the layout of
        native_layout.py (empty where unused), and amaxes (2, E) fp32.
    """
    slots = Slots.of(t.shape, offs)
    uses = [_use(spec and spec + "/p") for spec in (rows, cols)]
    if amax is None:
        amaxes = amax_triton(t, offs, *uses, (2, slots.groups))
    else:
        amaxes = amax.to(torch.float32, copy=True).reshape(2, slots.groups)
    groups = None if offs is None else slots.groups
    outputs = []
    for i, use in enumerate(uses):
        shapes = operand_shapes(t.shape, groups, columns=i == 1) if use else ((0,), (0,))
        ragged = groups is not None or bool(t.shape[-1 if i else -2] % 128) or not t.numel()
        for shape, dtype in zip(shapes, (torch.uint8, torch.float8_e4m3fn), strict=True):
            outputs.append(_empty(t, shape, dtype, ragged))
    if not t.numel():
        return outputs, amaxes
    flat = _flat(t)
    columns = _tile_columns(slots.columns)
    blocks = _blocks(slots, groups)
    dtypes = (torch.int16, torch.uint8, torch.int64, torch.uint8)
    pointers = [o.view(d) if o.numel() else o for o, d in zip(outputs, dtypes, strict=True)]
    constants = {"GROUPS": 0 if offs is None else slots.groups_bound, **_use_constants(*uses)}
    constants |= {"ROUND": t.dtype != torch.bfloat16, "C": columns}
    constants |= dict(zip(("PTX", "HARDWARE_SR"), levels(t.device, conversions), strict=True))
    names = _native_quantize_kernel.arg_names
    sizes = (slots.rows, slots.columns, slots.groups)
    launch(
        _native_quantize_kernel,
        _programs(blocks, slots.columns, columns),
        (flat, flat.stride(0), offs, amaxes, *pointers, *sizes, *offset, *streams, key),
        {name: constants[name] for name in names if name in constants},
        num_warps=_warps(columns),
    )
    return outputs, amaxes


def _blocks(slots: Slots, groups: int | None) -> int:
    if groups is None:
        return slots.groups * padded_size(slots.rows) // BLOCK
    return padded_rows(slots.rows, groups, PAD) // BLOCK


def transpose_native(
    codes: torch.Tensor, scale: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operand of w.T from that of w, of square blocks.

    Args:
        codes: (N, Kp / 2) or (E, N, Kp / 2) uint8.
        scale: Blocked.
        size: K.
    """
    *outer, rows, _ = codes.shape
    shapes = operand_shapes(torch.Size((*outer, rows, size)), None, columns=True)
    new_codes = codes.new_empty(shapes[0])
    new_scale = _empty(scale, shapes[1], scale.dtype, bool(size % 128))
    if codes.numel():
        experts = outer[0] if outer else 1
        columns = _tile_columns(size)
        scales = scale.view(torch.uint8), new_scale.view(torch.uint8)
        launch(
            _transpose_kernel,
            _programs(experts * padded_size(rows) // BLOCK, size, columns),
            (codes, scales[0], new_codes.view(torch.int64), scales[1], rows, size, experts),
            {"C": columns},
            num_warps=_warps(columns),
        )
    return new_codes, new_scale


def clear_tail_native(y: torch.Tensor, offs: torch.Tensor) -> None:
    """Zero the rows of y (M, N) that belong to no group."""
    if y.numel():
        rows, width = y.shape
        constants = {"C": min(1024, next_power_of_2(width))}
        programs = rows * cdiv(width, constants["C"])
        arguments = (y, offs, width, offs.shape[0])
        launch(_clear_tail_kernel, programs, arguments, constants, num_warps=4)
