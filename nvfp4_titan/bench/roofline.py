"""The least time of linears and experts on Blackwell, computed from bytes and FLOPs. Not measured.

A GEMM takes max(FLOPs / peak, bytes / bandwidth); quantize kernels take bytes / bandwidth; nothing
overlaps, nothing else costs time. So the ratios are bounds that no implementation of this plan
passes. Bytes an element:

                bf16            MXFP8                    NVFP4
    x, dy       -               read 2, write 2 x 1.03   read 2 (amax), read 2, write 2 x 0.56
    w           -               read 2, write 2 x 1.03   read 2 (amax), read 2, write 0.56,
                                                         transpose: read 0.56, write 0.56
    GEMM        read 2 + 2      read 1.03 + 1.03         read 0.56 + 0.56; all write 2

"fused" is NVFP4 with amaxes that cost nothing (taken by what produces the tensor, or by the
optimizer step for w).

Sources of the peaks: NVIDIA's HGX B200 and HGX B300 specifications, an eighth of the system's,
dense; bandwidth 8 TB/s of HBM3e.
"""

from dataclasses import dataclass

from ..command import markdown_table

NVFP4_BYTES, MXFP8_BYTES, BF16_BYTES = 0.5 + 1 / 16, 1 + 1 / 32, 2.0


@dataclass(frozen=True)
class Machine:
    """Dense peaks in FLOP/s, bandwidth in bytes/s."""

    name: str
    bf16: float
    fp8: float
    fp4: float
    bandwidth: float = 8e12


MACHINES = {
    (10, 0): Machine("B200", 2.25e15, 4.5e15, 9e15),
    (10, 3): Machine("B300", 2.25e15, 4.5e15, 13.1e15),
}
"""By capability."""


@dataclass(frozen=True)
class Shape:
    """A weight (N, K) = (outputs, inputs)."""

    name: str
    inputs: int
    outputs: int


LLAMA3_8B = (
    Shape("wq, wo", 4096, 4096),
    Shape("wk, wv", 4096, 1024),
    Shape("w1, w3", 4096, 14336),
    Shape("w2", 14336, 4096),
)
DEEPSEEK_V3 = (
    Shape("wq_a", 7168, 1536),
    Shape("wq_b", 1536, 24576),
    Shape("wkv_a", 7168, 576),
    Shape("wkv_b", 512, 32768),
    Shape("wo", 16384, 7168),
    Shape("dense w1, w3", 7168, 18432),
    Shape("dense w2", 18432, 7168),
    Shape("expert w1, w3", 7168, 2048),
    Shape("expert w2", 2048, 7168),
)
MODELS = {"Llama3-8B": LLAMA3_8B, "DeepSeekV3-671B": DEEPSEEK_V3}


@dataclass(frozen=True)
class Times:
    """Seconds of forward and backward of a linear: quantize kernels and the three GEMMs."""

    quantize: float
    gemms: float

    @property
    def total(self) -> float:
        """Both."""
        return self.quantize + self.gemms


def gemm_bytes(tokens: int, shape: Shape, element: float) -> float:
    """Bytes that the three GEMMs move, operands of `element` bytes and bf16 results."""
    x, w, y = tokens * shape.inputs, shape.inputs * shape.outputs, tokens * shape.outputs
    # Each tensor is an operand of two GEMMs and the result of one.
    return (x + w + y) * (2 * element + BF16_BYTES)


def gemm_flops(tokens: int, shape: Shape) -> float:
    """FLOPs of the three GEMMs."""
    return 6 * tokens * shape.inputs * shape.outputs


def _gemms(machine: Machine, tokens: int, shape: Shape, element: float, peak: float) -> float:
    x, w, y = tokens * shape.inputs, shape.inputs * shape.outputs, tokens * shape.outputs
    compute = gemm_flops(tokens, shape) / 3 / peak
    seconds = 0.0
    for left, right, result in ((x, w, y), (y, w, x), (y, x, w)):
        moved = (left + right) * element + result * BF16_BYTES
        seconds += max(compute, moved / machine.bandwidth)
    return seconds


def quantize_bytes(tokens: int, shape: Shape, recipe: str) -> float:
    """Bytes that the quantize kernels of a recipe ("bf16", "mxfp8", "nvfp4", "fused") move."""
    x, w, y = tokens * shape.inputs, shape.inputs * shape.outputs, tokens * shape.outputs
    if recipe == "bf16":
        return 0.0
    if recipe == "mxfp8":
        return (x + w + y) * (BF16_BYTES + 2 * MXFP8_BYTES)
    reads = BF16_BYTES if recipe == "fused" else 2 * BF16_BYTES
    return (x + y) * (reads + 2 * NVFP4_BYTES) + w * (reads + 3 * NVFP4_BYTES)


def times(machine: Machine, tokens: int, shape: Shape, recipe: str) -> Times:
    """Least times of forward and backward.

    Args:
        machine: GPU.
        tokens: M.
        shape: K and N.
        recipe: "bf16", "mxfp8", "nvfp4" or "fused".
    """
    element, peak = {
        "bf16": (BF16_BYTES, machine.bf16),
        "mxfp8": (MXFP8_BYTES, machine.fp8),
    }.get(recipe, (NVFP4_BYTES, machine.fp4))
    quantize = quantize_bytes(tokens, shape, recipe) / machine.bandwidth
    return Times(quantize, _gemms(machine, tokens, shape, element, peak))


def break_even(machine: Machine, shape: Shape, recipe: str, other: str) -> int | None:
    """Fewest tokens, in steps of 16, from which a recipe is the faster one up to 65,536 tokens."""
    best = None
    for tokens in range(1 << 16, 0, -16):
        ours, theirs = (times(machine, tokens, shape, r).total for r in (recipe, other))
        if ours >= theirs:
            break
        best = tokens
    return best


def markdown(tokens: int = 8192) -> str:
    """Tables for docs/blackwell.md."""
    lines = []
    for model, shapes in MODELS.items():
        lines += [f"{model}, {tokens:,} tokens a GPU (experts: a GPU's expert), fwd + bwd:", ""]
        rows = [_row(machine, shape, tokens) for shape in shapes for machine in MACHINES.values()]
        lines += [*markdown_table(_HEAD, rows), ""]
    lines += ["Fewest tokens per expert from which NVFP4 is the faster one:", ""]
    pairs = (("nvfp4", "bf16"), ("nvfp4", "mxfp8"), ("fused", "bf16"))
    rows = [
        (
            _name(shape),
            machine.name,
            *(break_even(machine, shape, *pair) or "never" for pair in pairs),
        )
        for shape in DEEPSEEK_V3[-2:]
        for machine in MACHINES.values()
    ]
    head = ("DeepSeekV3 expert", "GPU", "than bf16", "than MXFP8", "fused, than bf16")
    lines += markdown_table(head, rows)
    return "\n".join(lines) + "\n"


_HEAD = (
    *("", "GPU", "GFLOP", "MB moved bf16 / NVFP4", "bf16 us", "MXFP8 us"),
    *("NVFP4 us: quantize + GEMMs", "to bf16", "to MXFP8", "fused to bf16"),
)


def _name(shape: Shape) -> str:
    return f"{shape.name} ({shape.inputs} -> {shape.outputs})"


def _row(machine: Machine, shape: Shape, tokens: int) -> tuple[str, ...]:
    bf16, mxfp8, nvfp4, fused = (
        times(machine, tokens, shape, r) for r in ("bf16", "mxfp8", "nvfp4", "fused")
    )
    moved = gemm_bytes(tokens, shape, NVFP4_BYTES) + quantize_bytes(tokens, shape, "nvfp4")
    plain = gemm_bytes(tokens, shape, BF16_BYTES)
    return (
        _name(shape),
        machine.name,
        f"{gemm_flops(tokens, shape) / 1e9:.0f}",
        f"{plain / 1e6:.0f} / {moved / 1e6:.0f}",
        f"{bf16.total * 1e6:.0f}",
        f"{mxfp8.total * 1e6:.0f}",
        f"{nvfp4.quantize * 1e6:.0f} + {nvfp4.gemms * 1e6:.0f}",
        f"{bf16.total / nvfp4.total:.2f}",
        f"{mxfp8.total / nvfp4.total:.2f}",
        f"{bf16.total / fused.total:.2f}",
    )
