"""Launching the Triton kernels: which groups, tiles and instructions a tensor gets.

Nothing here reads a device tensor, and nothing depends on values.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton

from ..errors import UnsupportedError
from ..formats import BLOCK, NVFP4, BlockFormat
from ..numerics.grouped import padded_rows
from .triton_amax import _amax_kernel
from .triton_call import Launch, Plans, cdiv, launch, next_power_of_2
from .triton_quantize import _quantize_kernel
from .triton_unpack import _alpha_kernel, _scale_kernel, _unpack_kernel

# 16 rows by 4 columns a thread: fewer columns load too little at a time, more spill registers.
MAX_COLUMNS = 512
COLUMNS_PER_WARP = 128
MAX_REGISTERS = 128
"""Four programs of 128 threads on a multiprocessor: fewer do not hide their loads."""


@dataclass(frozen=True)
class Slots:
    """How a tensor's rows are cut into groups and blocks of 16 (triton_layout.py).

    Attributes:
        offs: Group ends on the device, for tokens, else None.
        rows: Rows of each group (of all, for tokens).
        columns: Columns.
        groups: E.
        groups_bound: What the kernels call GROUPS (triton_layout.locate).
        blocks: Blocks of slots.
        block: Slots of a block.
    """

    offs: torch.Tensor | None
    rows: int
    columns: int
    groups: int
    groups_bound: int
    blocks: int
    block: int = BLOCK

    @staticmethod
    def of(shape: torch.Size, offs: torch.Tensor | None, block: int = BLOCK) -> "Slots":
        """Of (M, K), of (M, K) tokens with offs, or of (E, N, K) experts."""
        *experts, rows, columns = shape
        if offs is not None:
            groups = offs.shape[0]
            blocks = padded_rows(rows, groups, block) // block
            bound = max(2, next_power_of_2(groups))
            return Slots(offs, rows, columns, groups, bound, blocks, block)
        groups = experts[0] if experts else 1
        blocks = groups * cdiv(rows, block)
        return Slots(None, rows, columns, groups, int(groups == 1), blocks, block)

    def tile_columns(self, most: int, least: int = BLOCK) -> int:
        """Columns of a tile, a power of two from `least`. Results do not depend on it."""
        if self.columns % most and self.columns % (most // 2) == 0:
            return max(least, most // 2)
        return max(least, min(most, next_power_of_2(self.columns)))

    def tile(self, t: torch.Tensor, columns: int) -> dict[str, int]:
        """What a kernel that reads t (R, K) in tiles of so many columns is compiled for.

        Where every tile lies in one group with all its rows and columns, the tensor's width too:
        models have few.
        """
        rows = self.offs is None and self.rows % self.block == 0
        whole = rows and self.columns % columns == 0 and t.stride(0) == self.columns
        return {"C": columns, "WHOLE": whole, "WIDTH": self.columns if whole else 0}


@dataclass(frozen=True, eq=False)
class Use:
    """How one use of a tensor is quantized and what is written of it.

    Compared by identity, which is what a look-up at every launch can afford.
    """

    square: bool
    sr: bool
    rht: bool
    packed: bool
    values: bool
    format: BlockFormat = NVFP4

    @property
    def scaled(self) -> bool:
        """Whether it has a scale per tensor, and so needs an amax."""
        return self.format.tensor_scale


@cache
def ptx_level(device: torch.device) -> int:
    """What `PTX` may be on a device: 0 in the interpreter.

    Raises:
        UnsupportedError: kernels cannot run there.
    """
    if triton.knobs.runtime.interpret:
        return 0
    if device.type != "cuda":
        raise UnsupportedError(
            f"backend 'triton' got a tensor on '{device.type}': move it to a GPU, or use "
            "backend = 'reference'"
        )
    return 89 if torch.cuda.get_device_capability(device) >= (8, 9) else 80


def _flat(t: torch.Tensor) -> torch.Tensor:
    """(M, K) with columns next to each other."""
    if t.dim() == 3:
        return t.reshape(-1, t.shape[2]).contiguous()
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _programs(slots: Slots, columns: int, width: int) -> int:
    return slots.blocks * cdiv(width, columns)


def _warps(columns: int, share: int = 1) -> int:
    return max(1, columns * share // COLUMNS_PER_WARP)


def amax_triton(
    t: torch.Tensor,
    offs: torch.Tensor | None,
    rows: Use | None,
    cols: Use | None,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Amaxes of a tensor's two uses.

    Args:
        t: (M, K) or (E, N, K), fp32, bf16 or fp16.
        offs: Group ends of tokens, or None.
        rows: Its use along the last dim, or None.
        cols: Its use along the dim before, or None.
        shape: (2, ...) of 2E elements.

    Returns:
        fp32 of that shape, 0 where a use is None or has no scale per tensor.
    """
    amax = torch.zeros(shape, dtype=torch.int32, device=t.device)
    flat = _flat(t)
    if flat.numel():
        kind = (*_kind(t, flat, offs), rows, cols)
        taken = _AMAXES.get(kind) or _AMAXES.make(
            kind, _amax_launch, flat, Slots.of(t.shape, offs), rows, cols
        )
        if taken.sizes:
            taken(flat, flat.stride(0), offs, amax, *taken.sizes)
    return amax.view(torch.float32)


_AMAXES, _QUANTIZED, _UNPACKED = Plans(), Plans(), Plans()


def _kind(t: torch.Tensor, flat: torch.Tensor, offs: torch.Tensor | None) -> tuple:
    """What launches over t, seen as (R, K), depend on."""
    groups = None if offs is None else offs.shape[0]
    return t.shape, flat.stride(0), t.dtype, t.device, groups


def _amax_launch(flat: torch.Tensor, slots: Slots, rows: Use | None, cols: Use | None) -> Launch:
    """How amaxes are taken; without sizes where there are none to take."""
    rows, cols = (use if use and use.scaled else None for use in (rows, cols))
    ptx_level(flat.device)  # refuses what no kernel runs on
    columns = slots.tile_columns(MAX_COLUMNS)
    constants = {
        "GROUPS": slots.groups_bound,
        "ROW": rows is not None,
        "ROW_RHT": rows is not None and rows.rht,
        "COL": cols is not None,
        "COL_RHT": cols is not None and cols.rht,
        "ROUND": flat.dtype != torch.bfloat16,
        **slots.tile(flat, columns),
    }
    return Launch(
        _amax_kernel,
        _programs(slots, columns, slots.columns),
        constants,
        (slots.rows, slots.columns, slots.groups) if rows or cols else (),
        num_warps=_warps(columns),
    )


def tile_rows(rows: Use | None, cols: Use | None) -> int:
    """Rows of the quantize kernel's tiles: of the blocks that run along them."""
    if cols is not None:
        return cols.format.block
    return rows.format.block if rows.square else BLOCK


def quantize_triton(
    t: torch.Tensor,
    offs: torch.Tensor | None,
    rows: Use | None,
    cols: Use | None,
    amax: torch.Tensor | None,
    outputs: list[torch.Tensor | None],
    streams: list[int],
    key: torch.Tensor | None,
    offset: tuple[int, int],
) -> None:
    """Quantize a tensor for its uses.

    Args:
        t: (M, K) or (E, N, K), fp32, bf16 or fp16.
        offs: Group ends of tokens, or None.
        rows: Its use along the last dim, or None.
        cols: Its use along the dim before, or None.
        amax: (2, E) fp32; None where no use has a scale per tensor.
        outputs: Codes, scales (of the formats' dtypes), values (bf16) of the row operand, then of
            the column operand, in the layout of triton_quantize.py; None where unused.
        streams: SR streams of the two uses.
        key: SR key, int64 on t's device; None without SR.
        offset: Global (row, column) of t's first element.
    """
    if not t.numel():
        return
    flat = _flat(t)
    kind = (*_kind(t, flat, offs), rows, cols)
    launches = _QUANTIZED.get(kind) or _QUANTIZED.make(
        kind, _quantize_launches, t.shape, flat, offs, rows, cols
    )
    # None where nothing is written, as the kernel is compiled ahead of time, too.
    pointers = [o if o is None else _as_integers(o) for o in outputs]
    counters = (*offset, *streams, key)
    for part in launches:
        part(flat, flat.stride(0), offs, amax, *pointers, *part.sizes, *counters)


def _as_integers(t: torch.Tensor) -> torch.Tensor:
    """Codes and scales as bytes, values (bf16) as 16 bits."""
    if t.dtype == torch.uint8:
        return t
    return t.view(torch.int16 if t.dtype == torch.bfloat16 else torch.uint8)


def _quantize_launches(
    shape: torch.Size,
    flat: torch.Tensor,
    offs: torch.Tensor | None,
    rows: Use | None,
    cols: Use | None,
) -> list[Launch]:
    height = tile_rows(rows, cols)
    if rows and rows.square and rows.format.block > height:
        # Its squares do not fit into the tiles that the column operand needs.
        return [
            _quantize_launches(shape, flat, offs, *uses)[0] for uses in ((rows, None), (None, cols))
        ]
    slots = Slots.of(shape, offs, height)
    least = max(use.format.block for use in (rows, cols) if use)
    # Tiles of the same size for every height; half of it where a thread tries two scales.
    targets = max(len(use.format.block_targets) for use in (rows, cols) if use)
    share = height // BLOCK * targets
    columns = slots.tile_columns(MAX_COLUMNS // share, least)
    # A short last dim: padding is written, so the tile must reach it.
    width = cdiv(slots.columns, least) * least
    constants = {
        "GROUPS": slots.groups_bound,
        **_use_constants(rows, cols),
        "ROUND": flat.dtype != torch.bfloat16,
        "ROWS": height,
        **slots.tile(flat, columns),
        "PTX": ptx_level(flat.device),
    }
    whole = Launch(
        _quantize_kernel,
        _programs(slots, columns, width),
        constants,
        (slots.rows, slots.columns, slots.groups),
        num_warps=_warps(columns, share),
        maxnreg=max_registers(
            flat.dtype,
            constants["PTX"],
            offs is not None,
            any(use.sr for use in (rows, cols) if use),
        ),
    )
    return [whole]


@cache
def _use_constants(rows: Use | None, cols: Use | None) -> dict[str, bool | BlockFormat]:
    constants = {}
    for name, use in (("ROW", rows), ("COL", cols)):
        constants[name] = use is not None
        use = use or Use(False, False, False, False, False)
        constants[f"{name}_FORMAT"] = use.format
        for field in ("square", "sr", "rht", "packed", "values"):
            constants[f"{name}_{field.upper()}"] = getattr(use, field)
    return constants


def max_registers(dtype: torch.dtype, level: int, grouped: bool, sr: bool) -> int | None:
    """Limit for the quantize kernel; None where it needs none, or would spill with it.

    Args:
        dtype: Of its input.
        level: What PTX is.
        grouped: Whether it works on tokens in groups, with masks.
        sr: Whether a use is rounded stochastically.
    """
    return MAX_REGISTERS if grouped and not sr and dtype == torch.bfloat16 and level >= 89 else None


def unpack_triton(
    codes: torch.Tensor,
    scale: torch.Tensor,
    amax: torch.Tensor,
    values: torch.Tensor,
    slots: Slots,
    along_rows: bool,
    fmt: BlockFormat,
    dequantize: bool = False,
) -> None:
    """Unpack an operand to bf16 values, or to what it stands for.

    Args:
        codes: Of the format's dtype, in the layout of triton_quantize.py.
        scale: Likewise.
        amax: (E,) fp32; None for formats without a scale per tensor.
        values: bf16, written; any dtype of an input with `dequantize`.
        slots: Groups of the values: (R, Kp) of a row operand, (P, K) of a column operand.
        along_rows: Whether it is a column operand, whose blocks run along rows.
        fmt: The operand's format.
        dequantize: Write x_hat; of row operands.
    """
    if not values.numel():
        return
    sizes = (slots.rows, slots.columns, slots.groups)
    kind = (*sizes, slots.groups_bound, slots.blocks, fmt, along_rows, values.device, values.dtype)
    kind += (dequantize,)
    unpack = _UNPACKED.get(kind) or _UNPACKED.make(
        kind, _unpack_launch, slots, fmt, along_rows, values.device
    )
    written = values if dequantize else values.view(torch.int16)
    unpack(_as_integers(codes), _as_integers(scale), amax, slots.offs, written, *sizes)


def _unpack_launch(
    slots: Slots, fmt: BlockFormat, along_rows: bool, device: torch.device
) -> Launch:
    columns = slots.tile_columns(2 * MAX_COLUMNS, fmt.block)
    constants = {
        "GROUPS": slots.groups_bound,
        "FORMAT": fmt,
        "COLUMNS": along_rows,
        "C": columns,
        "PTX": ptx_level(device),
    }
    return Launch(
        _unpack_kernel,
        _programs(slots, columns, slots.columns),
        constants,
        num_warps=max(1, _warps(columns) // 2),
    )


def alpha_triton(
    a_amax: torch.Tensor | None,
    b_amax: torch.Tensor | None,
    formats: tuple[BlockFormat, BlockFormat],
    device: torch.device,
) -> torch.Tensor:
    """(2,) fp32: alpha of a GEMM, and 0.

    Args:
        a_amax: fp32 scalar; None for a format without a scale per tensor.
        b_amax: Likewise.
        formats: Of the two operands.
        device: Where the GEMM runs.
    """
    alpha = torch.empty(2, dtype=torch.float32, device=device)
    _alpha_launch(formats)(a_amax, b_amax, alpha)
    return alpha


@cache
def _alpha_launch(formats: tuple[BlockFormat, BlockFormat]) -> Launch:
    constants = dict(zip(("A_FORMAT", "B_FORMAT"), formats, strict=True))
    return Launch(_alpha_kernel, 1, constants, num_warps=1)


def scale_triton(acc: torch.Tensor, alpha: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Products of acc (fp32, contiguous) with alpha[0], rounded once to out_dtype."""
    out = torch.empty_like(acc, dtype=out_dtype)
    if acc.numel():
        constants = {"C": 1024, "PTX": ptx_level(acc.device)}
        programs = cdiv(acc.numel(), constants["C"])
        launch(_scale_kernel, programs, (acc, alpha, out, acc.numel()), constants, num_warps=4)
    return out
