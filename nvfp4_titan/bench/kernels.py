"""Bandwidth of the quantize and amax kernels, as a share of a copy's in the same run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..backends import triton_launch as launch
from ..formats import BLOCK, NVFP4
from .peers import RECIPE, compiled_quantize, modelopt_fake_quant
from .rows import BenchRow, ratios
from .timing import measure

M = 8192
COLUMNS = (4096, 14336)
EXPERTS = 16
SETS = 4
"""Sets of tensors that a measurement goes through: none is left in the L2 cache by the one before,
and what a kernel leaves there to be written back is charged to it."""
USES = {
    "x": (
        launch.Use(square=False, sr=False, rht=False, packed=False, values=True),
        launch.Use(square=False, sr=False, rht=True, packed=True, values=False),
    ),
    "dy": (
        launch.Use(square=False, sr=True, rht=False, packed=False, values=True),
        launch.Use(square=False, sr=True, rht=True, packed=False, values=True),
    ),
    "w": (launch.Use(square=True, sr=False, rht=False, packed=False, values=True), None),
}
"""What the recipe writes of each tensor (training/functions.py)."""


@dataclass(frozen=True)
class Kernel:
    """A kernel to measure: what to call and the bytes that it must move."""

    run: Callable[[], object]
    bytes: int


def written(use: launch.Use | None, elements: int) -> int:
    """Bytes that a use of so many elements writes."""
    if use is None:
        return 0
    return packed_bytes(elements) * use.packed + 2 * elements * use.values


def packed_bytes(elements: int) -> int:
    """Bytes of so many elements' codes and block scales."""
    return elements // 2 + elements // BLOCK


def quantize_kernels(t: torch.Tensor, offs: torch.Tensor | None) -> dict[str, Kernel]:
    """The amax, quantize and unpack kernels on t (M, K) bf16, by name."""
    slots = launch.Slots.of(t.shape, offs)
    rows, elements = 16 * slots.blocks, t.numel()
    new = torch.empty
    outputs = [
        new(s, dtype=d, device=t.device)
        for r in (t.shape[0], rows)
        for s, d in (
            ((r * t.shape[1] // 2,), torch.uint8),
            ((r * t.shape[1] // BLOCK,), torch.float8_e4m3fn),
            ((r * t.shape[1],), torch.bfloat16),
        )
    ]
    key = torch.tensor(12345678901234, device=t.device)
    kernels = {}
    for name, uses in USES.items():
        if offs is not None and name == "w":
            continue
        take = partial(launch.amax_triton, t, offs, *uses, (2, slots.groups))
        amax = take()

        def quantize(uses=uses, amax=amax):
            launch.quantize_triton(t, offs, *uses, amax, outputs, [0, 1], key, (0, 0))

        moved = 2 * elements + sum(written(use, elements) for use in uses)
        kernels[f"triton quantize {name}"] = Kernel(quantize, moved)
        if name != "dy":
            kernels[f"triton amax {name}"] = Kernel(take, 2 * elements)
    for name, (codes, scale, values), along_rows in (
        ("w", outputs[:3], False),
        ("x", outputs[3:], True),
    ):
        if offs is not None and not along_rows:
            continue

        def unpack(operand=(codes, scale), values=values, along_rows=along_rows, amax=amax):
            launch.unpack_triton(*operand, amax[0], values, slots, along_rows, NVFP4)

        moved = packed_bytes(elements) + 2 * elements
        kernels[f"triton unpack {name}"] = Kernel(unpack, moved)
    return kernels


def bench_quantize(modelopt: bool) -> list[BenchRow]:
    """Measure everything; rows with ms, GB/s and ratio_to_copy.

    Args:
        modelopt: Whether to compare with ModelOpt's kernel.

    Raises:
        UnsupportedError: ModelOpt is asked for and cannot run.
    """
    fake_quant = modelopt_fake_quant() if modelopt else None
    plain = compiled_quantize(RECIPE.fprop.left)
    offs = torch.arange(1, EXPERTS + 1, device="cuda", dtype=torch.int32) * (M // EXPERTS)
    rows = []
    for k in COLUMNS:
        tensors = [torch.randn(M, k, device="cuda", dtype=torch.bfloat16) for _ in range(SETS)]
        peers = [_peers(t, plain, fake_quant) for t in tensors]
        for kind, ends in (("plain", None), (f"{EXPERTS} groups", offs)):
            sets = [
                {**_copy(t), **quantize_kernels(t, ends), **(others if ends is None else {})}
                for t, others in zip(tensors, peers, strict=True)
            ]
            rows += _rows(kind, sets, {"M": M, "K": k})
    return ratios(rows, "copy", "ratio_to_copy", lambda row: row.values["gb_per_s"])


def _copy(t: torch.Tensor) -> dict[str, Kernel]:
    target = torch.empty_like(t)
    return {"copy": Kernel(lambda: target.copy_(t), 4 * t.numel())}


def _peers(t: torch.Tensor, plain: Callable, fake_quant: Callable | None) -> dict[str, Kernel]:
    # Two reads, one of them for the amax.
    peers = {"peer torch.compile quantize x": Kernel(lambda: plain(t), 6 * t.numel())}
    if fake_quant is not None:
        amax = t.abs().amax().float()
        peers["peer modelopt fake quant"] = Kernel(lambda: fake_quant(t, amax), 4 * t.numel())
    return peers


def _rows(kind: str, sets: list[dict[str, Kernel]], sizes: dict[str, int]) -> list[BenchRow]:
    case = f"{kind} {'x'.join(map(str, sizes.values()))}"
    runs = {name: lambda name=name: [kernels[name].run() for kernels in sets] for name in sets[0]}
    rows = []
    for name, ms in measure(runs).items():
        ms /= len(sets)
        values = {"ms": ms, "gb_per_s": sets[0][name].bytes / ms / 1e6}
        rows.append(BenchRow(name, case, sizes, values))
    return rows
