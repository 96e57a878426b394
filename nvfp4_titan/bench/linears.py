"""The linear's and the experts' three GEMMs with all quantizing, against bf16 in the same run."""

from collections.abc import Callable

import torch

from ..backends import BACKENDS, triton_ops
from ..training import grouped_mm, key_tensor, linear
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


def triton_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Ours, (M, K), (N, K) -> (M, N)."""
    return linear(x, w, backend=BACKENDS["triton"], key=KEY)


def step(forward: Forward, dy: torch.Tensor, *leaves: torch.Tensor) -> Callable[[], object]:
    """Forward and backward of y = forward(*leaves) with gradient dy."""
    return lambda: torch.autograd.grad(forward(*leaves), leaves, dy)


def _leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    options = {"device": "cuda", "dtype": torch.bfloat16}
    return [torch.randn(shape, **options).requires_grad_() for shape in shapes]


def linear_rows(k: int, n: int, peers: dict[str, Forward]) -> list[BenchRow]:
    """Forward and backward of one linear."""
    x, w = _leaves((TOKENS, k), (n, k))
    dy = torch.randn(TOKENS, n, device="cuda", dtype=torch.bfloat16)
    forwards = {
        "bf16": torch.nn.functional.linear,
        "triton": triton_linear,
        "triton compiled": torch.compile(triton_linear, fullgraph=True),
        **peers,
    }
    times = measure({name: step(forward, dy, x, w) for name, forward in forwards.items()})
    return _rows("linear", {"M": TOKENS, "K": k, "N": n}, times, 6 * TOKENS * k * n)


def qkv_rows() -> list[BenchRow]:
    """Forward and backward of three linears that read the same x, compiled together."""
    k = QKV[0]
    x, *weights = _leaves((TOKENS, k), *((n, k) for n in QKV))
    dy = torch.randn(TOKENS, sum(QKV), device="cuda", dtype=torch.bfloat16)
    times = {}
    for name, one in (("bf16", torch.nn.functional.linear), ("triton", triton_linear)):

        def forward(x, *weights, one=one):
            return torch.cat([one(x, w) for w in weights], dim=1)

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

    def ours(x, w):
        return grouped_mm(x, w.transpose(1, 2), offs, backend=BACKENDS["triton"], key=KEY)

    times = measure({"bf16": step(bf16, dy, x, w), "triton": step(ours, dy, x, w)})
    shape = {"M": m, "K": EXPERT_K, "N": EXPERT_N, "E": len(sizes)}
    return _rows(f"grouped {kind}", shape, times, 6 * m * EXPERT_K * EXPERT_N)


def skewed(tokens: int, experts: int) -> list[int]:
    """Group sizes that fall by a constant factor, multiples of 16, the largest 8 times the mean."""
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
