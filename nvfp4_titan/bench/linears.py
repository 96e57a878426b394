"""The linear's and the experts' three GEMMs with all quantizing, against bf16 in the same run.

Rows "triton" quantize everything in each call, the weight and its amax too. Training knows more:

    triton known amax    the weight's amax, which a sweep over all weights takes once a step
    triton kept weight   the weight's operand, kept until the optimizer steps (nvfp4.keep_weights)
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..backends import BACKENDS, triton_ops
from ..distributed import amax_in_dtypes
from ..numerics import QuantizedOperand
from ..numerics.grouped import padded_rows
from ..recipe import RECIPES
from ..training import grouped_mm, key_tensor, linear
from ..training.functions import KeptWeight
from .peers import FakeQuantLinear, compiled_linear, modelopt_fake_quant
from .rows import BenchRow, ratios
from .timing import measure

TOKENS = 8192
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
"""(K, N)."""
QKV = (4096, 1024, 1024)
"""Output features of Llama3-8B's q, k and v, which read the same 4096 features."""
PEAK = 8192
EXPERTS, EXPERT_TOKENS, EXPERT_K, EXPERT_N = 16, 16384, 2048, 1408
KEY = key_tensor(0, "bench")
Forward = Callable[..., torch.Tensor]
RECIPE = RECIPES["nvfp4"]
OTHER_RECIPES = ("nvfp4_46", "nvfp4_mxfp8", "nvfp4_bf16", "bf16_nvfp4", "mxfp8")


def triton_linear(x: torch.Tensor, w: torch.Tensor, **known) -> torch.Tensor:
    """Ours, (M, K), (N, K) -> (M, N); `known`: recipe, and of the weight, as `linear` has them."""
    return linear(x, w, backend=BACKENDS["triton"], key=KEY, **known)


def known_of(w: torch.Tensor) -> dict[str, dict]:
    """What may be known of a weight, (N, K) or (E, N, K), by variant."""
    w = w.detach()
    amax = amax_in_dtypes(w.abs().amax((-2, -1)).float())
    kept = KeptWeight.of(w, RECIPE, BACKENDS["triton"], w.dtype, amax)
    return {
        "triton": {},
        "triton known amax": {"weight_amax": amax},
        "triton kept weight": {"kept_weight": kept},
    }


def step(
    forward: Callable, dy: torch.Tensor | Sequence[torch.Tensor], *leaves: torch.Tensor
) -> Callable[[], object]:
    """Forward and backward of y = forward(*leaves), or several of them, with gradient dy."""
    return lambda: torch.autograd.grad(forward(*leaves), leaves, dy)


def _leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    options = {"device": "cuda", "dtype": torch.bfloat16}
    return [torch.randn(shape, **options).requires_grad_() for shape in shapes]


def linear_rows(k: int, n: int, peers: dict[str, Forward]) -> list[BenchRow]:
    """Forward and backward of one linear."""
    x, w = _leaves((TOKENS, k), (n, k))
    dy = torch.randn(TOKENS, n, device="cuda", dtype=torch.bfloat16)
    ours = {name: partial(triton_linear, **known) for name, known in known_of(w).items()}
    ours |= {f"triton {name}": partial(triton_linear, recipe=name) for name in OTHER_RECIPES}
    forwards = {
        "bf16": torch.nn.functional.linear,
        **ours,
        "triton compiled": torch.compile(triton_linear, fullgraph=True),
        **peers,
    }
    times = measure({name: step(forward, dy, x, w) for name, forward in forwards.items()})
    return _rows("linear", {"M": TOKENS, "K": k, "N": n}, times, 6 * TOKENS * k * n)


def qkv_rows() -> list[BenchRow]:
    """Forward and backward of three linears that read the same x, compiled together."""
    k = QKV[0]
    x, *weights = _leaves((TOKENS, k), *((n, k) for n in QKV))
    dy = [torch.randn(TOKENS, n, device="cuda", dtype=torch.bfloat16) for n in QKV]
    ours = [known_of(w) for w in weights]
    variants = {"bf16": [torch.nn.functional.linear] * len(weights)}
    for name in ours[0]:
        variants[name] = [partial(triton_linear, **known[name]) for known in ours]
    times = {}
    for name, linears in variants.items():

        def forward(x, *weights, linears=linears):
            return [one(x, w) for one, w in zip(linears, weights, strict=True)]

        times[name] = step(torch.compile(forward, fullgraph=True), dy, x, *weights)
    sizes = {"M": TOKENS, "K": k, "N": sum(QKV)}
    return _rows("qkv", sizes, measure(times), 6 * TOKENS * k * sum(QKV))


def gemm_rows() -> list[BenchRow]:
    """The emulated GEMM alone, operands ready, alpha included."""
    a, b = (t.detach() for t in _leaves((PEAK, PEAK), (PEAK, PEAK)))
    amax = torch.ones((), device="cuda")
    gemm = lambda: triton_ops.gemm(  # noqa: E731
        a, b, amax, amax, False, True, PEAK, torch.bfloat16, "nvfp4,nvfp4"
    )
    times = measure({"bf16": lambda: a @ b.T, "triton": gemm})
    return _rows("gemm", {"M": PEAK, "K": PEAK, "N": PEAK}, times, 2 * PEAK**3)


def grouped_rows(kind: str, sizes: list[int]) -> list[BenchRow]:
    """Forward and backward of experts whose groups have these sizes."""
    offs = torch.tensor(sizes, device="cuda").cumsum(0).to(torch.int32)
    m = sum(sizes)
    x, w = _leaves((m, EXPERT_K), (len(sizes), EXPERT_N, EXPERT_K))
    dy = torch.randn(m, EXPERT_N, device="cuda", dtype=torch.bfloat16)

    def bf16(x, w):
        return torch._grouped_mm(x, w.transpose(1, 2), offs=offs)

    def ours(x, w, **known):
        options = {"backend": BACKENDS["triton"], "key": KEY, **known}
        return grouped_mm(x, w.transpose(1, 2), offs, **options)

    steps = {"bf16": step(bf16, dy, x, w)}
    for name, known in known_of(w).items():
        steps[name] = step(partial(ours, **known), dy, x, w)
    shape = {"M": m, "K": EXPERT_K, "N": EXPERT_N, "E": len(sizes)}
    flops = 2 * m * EXPERT_K * EXPERT_N
    rows = _rows(f"grouped {kind}", shape, measure(steps), 3 * flops)
    for gemm, variants in grouped_gemms(x.detach(), w.detach(), dy, offs).items():
        rows += _rows(f"grouped {kind} {gemm}", shape, measure(variants), flops)
    return rows


def grouped_gemms(
    x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, offs: torch.Tensor
) -> dict[str, dict[str, Callable[[], object]]]:
    """The experts' three GEMMs alone, operands ready, by name and variant.

    Args:
        x: (M, K) bf16.
        w: (E, N, K) bf16.
        dy: (M, N) bf16.
        offs: Group ends.
    """
    triton, amax = BACKENDS["triton"], torch.ones(len(offs), device=x.device)

    def operand(values: torch.Tensor, size: int) -> QuantizedOperand:
        nothing = values.new_empty(0, dtype=torch.uint8)
        return QuantizedOperand(nothing, nothing, amax, size, RECIPE.fprop.left.format, values)

    def by_slots(t: torch.Tensor) -> QuantizedOperand:
        slots = padded_rows(t.shape[0], len(offs))
        values = t.new_zeros(slots, t.shape[1])
        values[: t.shape[0]] = t
        return operand(values.mT, t.shape[0])

    (_, k), n = x.shape, w.shape[1]
    left, weight, gradient = operand(x, k), operand(w, k), operand(dy, n)
    tokens, gradients = by_slots(x), by_slots(dy)
    bf16 = torch.bfloat16
    return {
        "fprop": {
            "bf16": lambda: torch._grouped_mm(x, w.mT, offs=offs),
            "triton": lambda: triton.mm(left, weight, n, bf16, offs=offs),
        },
        "dgrad": {
            "bf16": lambda: torch._grouped_mm(dy, w, offs=offs),
            "triton": lambda: triton.mm(gradient, weight, k, bf16, True, offs),
        },
        "wgrad": {
            "bf16": lambda: torch._grouped_mm(dy.mT, x, offs=offs),
            "triton": lambda: triton.wgrad(gradients, tokens, bf16, offs),
        },
    }


def skewed(tokens: int, experts: int) -> list[int]:
    """Group sizes, multiples of 16, that fall by a constant factor: of 16 to 6.5 means."""
    weights = [0.6**e for e in range(experts)]
    sizes = [int(tokens * w / sum(weights)) // 16 * 16 for w in weights]
    sizes[0] += tokens - sum(sizes)
    return sizes


def bench_linear(modelopt: bool) -> list[BenchRow]:
    """Measure everything; rows with ms, tflops and ratio_to_bf16.

    Args:
        modelopt: Whether to compare with fake-quantizing by ModelOpt's kernel.

    Raises:
        UnsupportedError: ModelOpt is asked for and cannot run.
    """
    peers: dict[str, Forward] = {"peer torch.compile": compiled_linear()}
    if modelopt:
        fake_quant = modelopt_fake_quant()
        peers["peer modelopt forward only"] = lambda x, w: FakeQuantLinear.apply(x, w, fake_quant)
    rows = []
    for k, n in SHAPES:
        rows += linear_rows(k, n, peers)
    rows += qkv_rows() + gemm_rows()
    rows += grouped_rows("balanced", [EXPERT_TOKENS // EXPERTS] * EXPERTS)
    rows += grouped_rows("skewed", skewed(EXPERT_TOKENS, EXPERTS))
    return ratios(rows, "bf16", "ratio_to_bf16", lambda row: 1 / row.values["ms"])


def _rows(kind: str, sizes: dict[str, int], times: dict[str, float], flops: int) -> list[BenchRow]:
    case = f"{kind} {'x'.join(str(sizes[name]) for name in 'MKN')}"
    return [
        BenchRow(name, case, sizes, {"ms": ms, "tflops": flops / ms / 1e9})
        for name, ms in times.items()
    ]
