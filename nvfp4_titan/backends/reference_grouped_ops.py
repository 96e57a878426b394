"""The oracle behind custom ops: grouped operands and GEMMs.

On a CPU each group runs the very GEMM that a linear would run on its tokens alone, so the bits
are the same. On a GPU nothing may wait for `offs`: every expert multiplies all tokens and keeps its
own, E times the work. That is for checking faster backends, not for training.
"""

from collections.abc import Callable, Iterator

import torch

from ..errors import ConfigError
from ..formats import BLOCK
from ..numerics.grouped import (
    GroupLayout,
    expert_amaxes,
    group_layout,
    padded_rows,
    quantize_experts,
    quantize_tokens,
    token_amaxes,
)
from ..recipe import OperandFormat
from .reference_ops import (
    FIVE_TENSORS,
    fake_operand,
    gemm_values,
    multiply,
    no_operand,
    operand_formats,
)


@torch.library.custom_op("nvfp4_titan::reference_grouped_amax", mutates_args=())
def grouped_amax(t: torch.Tensor, offs: torch.Tensor | None, rows: str, cols: str) -> torch.Tensor:
    """Amaxes (2, E) of the two uses of tokens (M, K), with offs, or of experts (E, N, K)."""
    groups = t.shape[0] if offs is None else offs.shape[0]
    layout = None if offs is None else _layout(offs, t.shape[0], _block(cols))
    amaxes = t.new_zeros((2, groups), dtype=torch.float32)
    for i, spec in enumerate((rows, cols)):
        if not spec or not OperandFormat.parse(spec).format.tensor_scale:
            continue
        fmt = OperandFormat.parse(spec)
        if layout is None:
            amaxes[i] = expert_amaxes(t, fmt, transpose=i == 1)
        else:
            amaxes[i] = token_amaxes(t, layout, groups, fmt, transpose=i == 1)
    return amaxes


@grouped_amax.register_fake
def _(t, offs, rows, cols):
    groups = t.shape[0] if offs is None else offs.shape[0]
    return t.new_empty((2, groups), dtype=torch.float32)


@torch.library.custom_op("nvfp4_titan::reference_quantize_tokens", mutates_args=())
def quantize_tokens_op(
    t: torch.Tensor,
    offs: torch.Tensor,
    rows: str,
    cols: str,
    streams: list[int],
    key: torch.Tensor | None,
    amax: torch.Tensor | None,
    first_column: int,
) -> FIVE_TENSORS:
    """Quantize t (M, K) group by group, along K (rows) and along tokens (cols)."""
    groups = offs.shape[0]
    layout = _layout(offs, t.shape[0], _block(cols))

    def quantize(fmt, bits, stream, transpose, amax):
        return quantize_tokens(
            t, layout, groups, fmt, bits, stream, transpose, amax, first_column
        )  # fmt: skip

    return _both_uses(t, groups, (rows, cols), streams, key, amax, quantize)


@quantize_tokens_op.register_fake
def _(t, offs, rows, cols, streams, key, amax, first_column):
    row_use = fake_operand(t, rows, *t.shape)
    slots = padded_rows(t.shape[0], offs.shape[0], _block(cols))
    col_use = fake_operand(t, cols, t.shape[1], slots)
    return (*row_use, *col_use, t.new_empty((2, offs.shape[0]), dtype=torch.float32))


@torch.library.custom_op("nvfp4_titan::reference_quantize_experts", mutates_args=())
def quantize_experts_op(
    w: torch.Tensor,
    rows: str,
    cols: str,
    streams: list[int],
    key: torch.Tensor | None,
    amax: torch.Tensor | None,
    offset: list[int],
) -> FIVE_TENSORS:
    """Quantize w (E, N, K) expert by expert, along K (rows) and along N (cols)."""

    def quantize(fmt, bits, stream, transpose, amax):
        return quantize_experts(w, fmt, bits, stream, transpose, amax, tuple(offset))

    return _both_uses(w, w.shape[0], (rows, cols), streams, key, amax, quantize)


@quantize_experts_op.register_fake
def _(w, rows, cols, streams, key, amax, offset):
    experts, n, k = w.shape
    row_use, col_use = fake_operand(w, rows, experts, n, k), fake_operand(w, cols, experts, k, n)
    return (*row_use, *col_use, w.new_empty((2, experts), dtype=torch.float32))


@torch.library.custom_op("nvfp4_titan::reference_grouped_mm", mutates_args=())
def grouped_mm(
    a_codes: torch.Tensor,
    a_scale: torch.Tensor,
    a_amax: torch.Tensor | None,
    b_codes: torch.Tensor,
    b_scale: torch.Tensor,
    b_amax: torch.Tensor | None,
    formats: str,
    offs: torch.Tensor,
    columns: int,
    out_dtype: torch.dtype,
    b_transposed: bool,
) -> torch.Tensor:
    """Per group (m, K) @ (N, K).T -> (m, N), or (m, K) @ (K, N) with b_transposed."""
    a, b = gemm_values((a_codes, b_codes), (a_scale, b_scale), formats, out_dtype)
    b = b[..., :columns] if b_transposed else b.transpose(1, 2)
    y = a.new_zeros((a.shape[0], columns), dtype=out_dtype)
    if a.device.type == "cpu":
        for e, start, end in _groups(offs):
            amaxes = _of_group(e, a_amax, b_amax)
            y[start:end] = multiply(a[start:end], b[e], *amaxes, formats, out_dtype)
        return y
    row_group = group_layout(offs, a.shape[0]).row_group.unsqueeze(1)
    for e in range(offs.shape[0]):
        part = multiply(a, b[e], *_of_group(e, a_amax, b_amax), formats, out_dtype)
        y = torch.where(row_group == e, part, y)
    return y


@grouped_mm.register_fake
def _(
    a_codes, a_scale, a_amax, b_codes, b_scale, b_amax, formats, offs, columns, out_dtype,
    b_transposed,
):  # fmt: skip
    return a_codes.new_empty((a_codes.shape[0], columns), dtype=out_dtype)


@torch.library.custom_op("nvfp4_titan::reference_grouped_wgrad", mutates_args=())
def grouped_wgrad(
    dy_codes: torch.Tensor,
    dy_scale: torch.Tensor,
    dy_amax: torch.Tensor | None,
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    x_amax: torch.Tensor | None,
    formats: str,
    offs: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Per group (N, m padded) @ (K, m padded).T -> (E, N, K)."""
    dy, x = gemm_values((dy_codes, x_codes), (dy_scale, x_scale), formats, out_dtype)
    groups, block = offs.shape[0], operand_formats(formats)[0].block
    dw = dy.new_zeros((groups, dy.shape[0], x.shape[0]), dtype=out_dtype)
    if dy.device.type == "cpu":
        slot = 0
        for e, start, end in _groups(offs):
            slots = slice(slot, slot := slot + padded_rows(end - start, 0, block))
            left, right = dy[:, slots].contiguous(), x[:, slots].contiguous()
            amaxes = _of_group(e, dy_amax, x_amax)
            dw[e] = multiply(left, right.T, *amaxes, formats, out_dtype)
        return dw
    layout = group_layout(offs, dy.shape[1] - padded_rows(0, groups, block), block)
    slot_group = layout.block_group.repeat_interleave(block)
    for e in range(groups):
        mine = slot_group == e
        # where, not a product with the mask: another group's NaN must not pass.
        left, right = (torch.where(mine, t, torch.zeros_like(t)) for t in (dy, x))
        dw[e] = multiply(left, right.T, *_of_group(e, dy_amax, x_amax), formats, out_dtype)
    return dw


@grouped_wgrad.register_fake
def _(dy_codes, dy_scale, dy_amax, x_codes, x_scale, x_amax, formats, offs, out_dtype):
    shape = (offs.shape[0], dy_codes.shape[0], x_codes.shape[0])
    return dy_codes.new_empty(shape, dtype=out_dtype)


def _both_uses(
    t: torch.Tensor,
    groups: int,
    specs: tuple[str, str],
    streams: list[int],
    key: torch.Tensor | None,
    amax: torch.Tensor | None,
    quantize: Callable,
) -> FIVE_TENSORS:
    """Codes and scales of the two uses of t and their amaxes (2, E).

    Args:
        t: Tensor that is quantized.
        groups: E.
        specs: Formats of the row and the column use.
        streams: SR streams of the two.
        key: SR key.
        amax: None, or (2, E) amaxes to use.
        quantize: (format, key, stream, transpose, amax) -> (codes, scale, amax (E,)).
    """
    amaxes = t.new_zeros((2, groups), dtype=torch.float32)
    results = []
    for i, spec in enumerate(specs):
        if not spec:
            results += no_operand(t)
            continue
        fmt = OperandFormat.parse(spec)
        bits = int(key) if fmt.rounding == "sr" else 0
        given = None if amax is None else amax[i]
        *operand, amaxes[i] = quantize(fmt, bits, streams[i], i == 1, given)
        results += operand
    return (*results, amaxes)


def _layout(offs: torch.Tensor, rows: int, block: int) -> GroupLayout:
    if offs.device.type == "cpu":
        ends = [0, *offs.tolist()]
        if sorted(ends) != ends or ends[-1] > rows:
            raise ConfigError(
                f"offs {ends[1:]} must not decrease, nor end past the {rows} rows of x"
            )
    return group_layout(offs, rows, block)


def _block(spec: str) -> int:
    """Size of a format's blocks, to which groups are padded; any serves where nobody asked."""
    return OperandFormat.parse(spec).format.block if spec else BLOCK


def _of_group(e: int, *amaxes: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if amax is None else amax[e] for amax in amaxes]


def _groups(offs: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end row) of the groups that have tokens; reads offs."""
    start = 0
    for e, end in enumerate(offs.tolist()):
        if end > start:
            yield e, start, end
        start = end
