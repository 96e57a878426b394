"""What an owner of a Blackwell GPU runs first: is the native backend right there, and how fast.

Each check returns a `Check` with a figure and its bar; `report` assembles them to paste into an
issue. Without such a GPU the same checks run against the stand-ins (backends/native.py), which
proves that the checks work, and of the hardware nothing.

    operands   RTNE codes and block scales equal the oracle's bit for bit; software SR's do, too
    SR         frequency of rounding up against the position between two codes; same key, same codes
    GEMMs      against float64 of the same operands; grouped ones against plain ones of each group
    training   50 steps of a small model against the emulated backend
    speed      quantize kernels as a share of a copy, GEMMs as a share of the FP4 peak; on a GPU

A check that ends in an error has failed, and the others still run.
"""

import platform
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import nn

from ..backends import BACKENDS, Backend, OperandUse
from ..backends.native import NATIVE, NATIVE_SOFTWARE_SR, STAND_IN, refusal
from ..backends.native_gemm import grouped_refusal
from ..backends.native_layout import from_oracle
from ..command import markdown_row
from ..numerics import QuantizedOperand, dequantize
from ..numerics.rounding import unpack_codes
from ..recipe import OperandFormat
from ..training import convert, grouped_mm, key_tensor, linear
from .roofline import LLAMA3_8B, MACHINES
from .timing import measure

KEY = key_tensor(7, "verify")
SHAPES = ((128, 256), (257, 1000), (33, 40))
ROUNDINGS = {"RTNE": NATIVE, "SR in software": NATIVE_SOFTWARE_SR}
GEMM_BAR = 3e-3
"""Relative Frobenius error of a bf16 result; its one rounding makes 1.6e-3."""
SR_SAMPLES, SR_POSITIONS = 1 << 16, 16
GAP_BAR = 0.02
STEPS = 50


@dataclass(frozen=True)
class Check:
    """One check: what, what was found, what was expected; None where it was not judged."""

    name: str
    found: str
    bar: str
    passed: bool | None
    details: str = ""
    """Traceback of an error."""

    def row(self) -> str:
        """A row of the report's table."""
        word = {True: "pass", False: "FAIL", None: "-"}[self.passed]
        return markdown_row((self.name, self.found, self.bar, word))


@cache
def _failures() -> tuple[type[Exception], ...]:
    """What torch's and Triton's calls raise where they cannot do what they are asked."""
    errors = (RuntimeError, ValueError, TypeError, AssertionError)
    if find_spec("triton"):
        from triton.errors import TritonError

        errors += (TritonError,)
    return errors


def _attempt(name: str, function: Callable[[], list[Check]]) -> list[Check]:
    """The checks that a function makes; one that failed where it ends in an error."""
    try:
        return function()
    except _failures() as error:
        line = next(iter(str(error).splitlines()), "")
        found = f"{type(error).__name__}: {line}"[:300]
        return [Check(name, found, "no error", False, traceback.format_exc())]


@dataclass(frozen=True)
class Target:
    """What is verified: a native backend's records, and where.

    Attributes:
        name: Of the device.
        device: "cuda" or "cpu".
        stand_in: Whether the stand-ins run.
        capability: Of the GPU, None for a CPU.
    """

    name: str
    device: str
    stand_in: bool
    capability: tuple[int, int] | None

    @staticmethod
    def current(stand_in: bool = False) -> "Target":
        """This machine; without a Blackwell GPU, and if asked for, with the stand-ins."""
        if not torch.cuda.is_available():
            return Target(platform.processor() or "CPU", "cpu", True, None)
        capability, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
        return Target(name, "cuda", stand_in or refusal(capability, name) is not None, capability)

    def record(self, backend: Backend) -> Backend:
        """A native record, or what stands in for it."""
        return STAND_IN if self.stand_in else backend


def _normal(*shape: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return torch.randn(shape, generator=generator).to(device, torch.bfloat16)


def check_operands(target: Target) -> list[Check]:
    """Codes and block scales of every operand of the recipe against the oracle's."""
    checks = []
    for name, backend in ROUNDINGS.items():
        rounding = "rtne" if name == "RTNE" else "sr"
        pairs = [(OperandFormat(rounding=rounding), OperandFormat(rounding=rounding, rht=True))]
        if rounding == "rtne":
            pairs.append((OperandFormat(block=(16, 16)),) * 2)
        wrong = total = 0
        for shape in SHAPES:
            for pair in pairs:
                t = _normal(*shape, device=target.device)
                a, b = _differing(target.record(backend), t, pair)
                wrong, total = wrong + a, total + b
        found = f"{wrong} of {total} bytes differ"
        checks.append(Check(f"operands, {name}", found, "0", wrong == 0))
    return checks


def _differing(backend: Backend, t: torch.Tensor, formats) -> tuple[int, int]:
    """Bytes that differ from the oracle's, and all."""
    uses = tuple(OperandUse(fmt, stream) for fmt, stream in zip(formats, (1, 4), strict=True))
    made = backend.quantize(t, *uses, KEY)
    expected = BACKENDS["reference"].quantize(t.cpu(), *uses, KEY)
    wrong = total = 0
    for i, (mine, wanted) in enumerate(zip(made, expected, strict=True)):
        pair = from_oracle(wanted.codes, wanted.block_scale, None, columns=i == 1)
        for a, b in zip((mine.codes, mine.block_scale), pair, strict=True):
            wrong += int((a.cpu().view(torch.uint8) != b.view(torch.uint8)).sum())
            total += b.numel()
    return wrong, total


def check_stochastic_rounding(target: Target) -> list[Check]:
    """Frequencies of the native record's SR, the hardware's where it has one."""
    backend = target.record(NATIVE)
    use = OperandUse(OperandFormat(rounding="sr"), 2)
    # Between codes 2 (1.0) and 3 (1.5) of blocks whose scale is exactly 1: amax is 2688, and each
    # block's is 6. The counters hold the row: every row draws anew.
    position = torch.arange(SR_POSITIONS, device=target.device) / SR_POSITIONS
    t = torch.zeros(SR_SAMPLES, 2 * SR_POSITIONS, device=target.device)
    t[:, : SR_POSITIONS - 1] = 1 + position[1:] / 2
    t[:, SR_POSITIONS - 1] = 6
    amax = torch.full((2,), 2688.0, device=target.device)
    operand, _ = backend.quantize(t, use, None, KEY, amax=amax)
    codes = unpack_codes(operand.codes)[:, : SR_POSITIONS - 1].float()
    again, _ = backend.quantize(t, use, None, KEY, amax=amax)
    other, _ = backend.quantize(t, use, None, KEY + 1, amax=amax)
    outside = int(((codes != 2) & (codes != 3)).sum())
    error = ((codes - 2).mean(0) - position[1:]).abs().max().item()
    bar = 1 / 256 + 5 * 0.5 / SR_SAMPLES**0.5
    correlation = torch.corrcoef((codes - codes.mean(0)).T).fill_diagonal_(0).abs().max().item()
    limit = 6 / SR_SAMPLES**0.5
    same = torch.equal(operand.codes, again.codes)
    fresh = not torch.equal(operand.codes, other.codes)
    return [
        Check("SR, codes that are not neighbours", str(outside), "0", outside == 0),
        Check("SR, frequency less position, largest", f"{error:.4f}", f"{bar:.4f}", error <= bar),
        Check("SR, correlation in a block", f"{correlation:.4f}", f"{limit:.4f}",
              correlation <= limit),
        Check("SR, same key same codes, another key others", f"{same}, {fresh}", "True, True",
              same and fresh),
    ]  # fmt: skip


def check_gemms(target: Target) -> list[Check]:
    """GEMMs of the native record against float64 products of the same operands."""
    backend = target.record(NATIVE)
    device, (m, n, k) = target.device, (300, 144, 1000)
    x, w, dy = (_normal(*s, device=device) for s in ((m, k), (n, k), (m, n)))
    fmt, square = OperandFormat(), OperandFormat(block=(16, 16))
    x_rows, x_cols = backend.quantize(x, OperandUse(fmt, 0), OperandUse(fmt, 5))
    dy_rows, dy_cols = backend.quantize(dy, OperandUse(fmt, 2), OperandUse(fmt, 4))
    w_rows, _ = backend.quantize(w, OperandUse(square, 1), None)
    results = {
        "fprop": (backend.mm(x_rows, w_rows, n, torch.bfloat16), x_rows, w_rows, False),
        "dgrad": (backend.mm(dy_rows, w_rows, k, torch.bfloat16, True), dy_rows, w_rows, True),
        "wgrad": (backend.wgrad(dy_cols, x_cols, torch.bfloat16), dy_cols, x_cols, False),
    }
    checks = []
    for name, (mine, a, b, transposed) in results.items():
        left, right = _exact(a), _exact(b)
        wanted = left @ (right if transposed else right.T)
        checks.append(_gemm_check(f"GEMM, {name}", mine, wanted))
    return checks


def check_grouped_gemms(target: Target) -> list[Check]:
    """Experts, forward and backward, against linears of each group's tokens on the same record."""
    reason = target.capability and not target.stand_in and grouped_refusal(target.capability)
    if reason:
        return [Check("grouped GEMMs", f"not run: {reason}", "-", None)]
    checks = []
    for gemm in ("fprop", "dgrad", "wgrad"):
        name = f"grouped GEMM, {gemm}"
        checks += _attempt(name, lambda gemm=gemm, name=name: [_grouped_check(target, gemm, name)])
    return checks


def _grouped_check(target: Target, gemm: str, name: str) -> Check:
    device, k, n, sizes = target.device, 256, 144, (130, 0, 5, 165)
    offs = torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)
    x, w, dy = (_normal(*s, device=device) for s in ((304, k), (len(sizes), n, k), (304, n)))
    options = {"backend": target.record(NATIVE_SOFTWARE_SR), "key": KEY}
    mine = _result(gemm, lambda x, w: grouped_mm(x, w.mT, offs, **options), x, w, dy)
    parts, start = [], 0
    for e, size in enumerate(sizes):
        rows = slice(start, start := start + size)
        part = _result(gemm, lambda x, w: linear(x, w, **options), x[rows], w[e], dy[rows])
        parts.append(part)
    wanted = torch.stack(parts) if gemm == "wgrad" else torch.cat(parts)
    return _gemm_check(name, mine[: len(wanted)], wanted)


def _result(gemm: str, function: Callable, x, w, dy) -> torch.Tensor:
    """Of function(x, w): y, or dx or dw, each from a backward of that GEMM alone."""
    x, w = (t.detach().requires_grad_(gemm == g) for t, g in ((x, "dgrad"), (w, "wgrad")))
    y = function(x, w)
    if gemm == "fprop":
        return y
    return torch.autograd.grad(y, x if gemm == "dgrad" else w, dy)[0]


def _exact(operand: QuantizedOperand) -> torch.Tensor:
    return dequantize(operand).double()


def _gemm_check(name: str, mine: torch.Tensor, wanted: torch.Tensor) -> Check:
    error = ((mine.double() - wanted.double()).norm() / wanted.double().norm()).item()
    # Not `error > bar`: NaN must fail.
    return Check(f"{name}, relative error", f"{error:.1e}", f"{GEMM_BAR:.0e}", error <= GEMM_BAR)


class _Model(nn.Module):
    """A residual MLP that predicts the next of a few symbols from the last four."""

    def __init__(self, symbols: int = 64, width: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(symbols, width // 4)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                          nn.Linear(4 * width, width))
            for _ in range(2)
        )  # fmt: skip
        self.output = nn.Linear(width, symbols)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        """(B, 4) int64 to logits (B, symbols)."""
        x = self.embedding(symbols).flatten(1)
        for layer in self.layers:
            x = x + layer(x)
        return self.output(x)


def _losses(backend: Backend, device: str) -> list[float]:
    torch.manual_seed(0)
    model = _Model()
    convert(model, backend=backend, bf16_last_fraction=0.0)
    model = model.to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        symbols = torch.randint(64, (256, 4), generator=generator).to(device)
        target = (symbols[:, 3] + symbols[:, 2] % 4) % 64
        loss = nn.functional.cross_entropy(model(symbols).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_training(target: Target) -> list[Check]:
    """50 steps against the emulated backend: same weights, same data, same SR key."""
    emulated = BACKENDS["triton" if target.device == "cuda" else "reference"]
    mine, theirs = (_losses(b, target.device) for b in (target.record(NATIVE), emulated))
    last, wanted = (sum(losses[-10:]) / 10 for losses in (mine, theirs))
    gap = abs(last - wanted) / wanted
    found = f"{mine[0]:.4f} -> {last:.4f}, emulated {wanted:.4f}, gap {gap:.2%}"
    learned = last < mine[0]
    bar = f"learns, gap below {GAP_BAR:.0%}"
    return [Check(f"training, {STEPS} steps", found, bar, learned and gap <= GAP_BAR)]


def check_speed(target: Target) -> list[Check]:
    """Shares of a copy's bandwidth and of the FP4 peak; figures, without a bar."""
    if target.stand_in:
        return [Check("speed", "not run: stand-ins have none", "-", None)]
    machine = MACHINES.get(target.capability)
    checks = []
    for shape in LLAMA3_8B:
        m, k, n = 8192, shape.inputs, shape.outputs
        x, w = (_normal(*s, device="cuda") for s in ((m, k), (n, k)))
        fmt = OperandFormat()
        uses = OperandUse(fmt, 0), OperandUse(OperandFormat(rht=True), 5)
        amax = NATIVE.amax(x, *uses)
        a, _ = NATIVE.quantize(x, uses[0], None)
        b, _ = NATIVE.quantize(w, OperandUse(OperandFormat(block=(16, 16)), 1), None)
        target_copy = torch.empty_like(x)
        medians = measure(
            {
                "copy": lambda x=x, t=target_copy: t.copy_(x),
                "quantize": lambda x=x, u=uses, s=amax: NATIVE.quantize(x, *u, amax=s),
                "gemm": lambda a=a, b=b, n=n: NATIVE.mm(a, b, n, torch.bfloat16),
                "bf16": lambda x=x, w=w: x @ w.T,
            }
        )
        rates = {name: 2 * m * k * n / medians[name] / 1e9 for name in ("gemm", "bf16")}
        # Bytes: read 2, written 2 * 0.5625; the copy reads and writes 2.
        share = (3.125 / medians["quantize"]) / (4 / medians["copy"])
        peak = f", {rates['gemm'] * 1e12 / machine.fp4:.0%} of peak" if machine else ""
        found = (
            f"quantize {share:.0%} of copy, GEMM {rates['gemm']:.0f} TFLOP/s{peak}, "
            f"{rates['gemm'] / rates['bf16']:.2f}x bf16"
        )
        checks.append(Check(f"speed, {shape.name}", found, "-", None))
    return checks


CHECKS: dict[str, Callable[[Target], list[Check]]] = {
    "operands": check_operands,
    "SR": check_stochastic_rounding,
    "GEMMs": check_gemms,
    "training": check_training,
    "speed": check_speed,
    # Last: the youngest of torch's GEMMs, and a crash of a kernel fails all that comes after it.
    "grouped GEMMs": check_grouped_gemms,
}


def verify(target: Target, announce: Callable[[str], None] = lambda row: None) -> list[Check]:
    """All checks on a target.

    Args:
        target: What to verify.
        announce: Called with each row of the report as it is found.
    """
    checks = []
    for name, function in CHECKS.items():
        for check in _attempt(name, lambda function=function: function(target)):
            announce(check.row())
            checks.append(check)
    return checks


def report(target: Target, checks: list[Check], commit: str) -> str:
    """Markdown to paste into an issue."""
    what = "STAND-INS: nothing here is about the hardware" if target.stand_in else "native"
    capability = "-" if target.capability is None else "sm_{}{}".format(*target.capability)
    triton = version("triton") if find_spec("triton") else "none"
    judged = [check for check in checks if check.passed is not None]
    failed = [check.name for check in judged if not check.passed]
    lines = [
        f"verify_blackwell: {target.name} ({capability}), {what}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton}, Python "
        f"{platform.python_version()}, nvfp4_titan {commit}",
        f"{len(judged) - len(failed)} of {len(judged)} checks passed"
        + (f"; failed: {'; '.join(failed)}" if failed else ""),
        "",
        "| check | found | bar | |",
        "|---|---|---|---|",
        *(check.row() for check in checks),
    ]
    for check in checks:
        if check.details:
            lines += ["", f"{check.name}:", "", "```", check.details.rstrip(), "```"]
    return "\n".join(lines) + "\n"
