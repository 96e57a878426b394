"""The Triton backend on a GPU: the oracle's bits, GEMMs within a rounding, nothing that waits."""

from dataclasses import replace

import pytest
import torch
from backend_checks import (
    DTYPES,
    FORMATS,
    KEY,
    OTHER_FORMATS,
    TOKEN_FORMATS,
    check_gemms,
    check_quantize,
    draw,
    gemms,
    uses,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TOLERANCES, relative_error, same_operand

from nvfp4_titan import RECIPES
from nvfp4_titan.backends import BACKENDS, cublas, resolve, stream
from nvfp4_titan.numerics import QuantizedOperand, dequantize
from nvfp4_titan.numerics.quantize import global_scale
from nvfp4_titan.recipe import OperandFormat
from nvfp4_titan.training import NVFP4Linear, grouped_mm, linear

pytestmark = pytest.mark.gpu

RECIPE = RECIPES["nvfp4"]
BF16 = TOLERANCES["bf16_output"]
SR, SR_COLS = OperandFormat(rounding="sr"), OperandFormat(rounding="sr", rht=True)
X, X_COLS = OperandFormat(), OperandFormat(rht=True)
TRITON = BACKENDS["triton"]


def test_it_runs_here():
    assert TRITON.unavailable() is None and resolve("triton", device="cuda") is TRITON


# A format a case: every pair of formats and dtypes is a kernel to compile, in parallel.
@pytest.mark.parametrize("col_use", FORMATS, ids=str)
@settings(max_examples=200 // len(FORMATS), deadline=None)
@given(
    rows=st.integers(1, 700),
    columns=st.integers(1, 700),
    dtype=DTYPES,
    row_use=st.sampled_from([None, *FORMATS]),
    exponent=st.floats(-38, 37.9),
    seed=st.integers(0, 99),
)
def test_oracle_bits(rows, columns, dtype, row_use, col_use, exponent, seed):
    check_quantize(draw((rows, columns), dtype, exponent, seed), row_use, col_use, "cuda")


@pytest.mark.parametrize("col_use", TOKEN_FORMATS, ids=str)
@settings(max_examples=100 // len(TOKEN_FORMATS), deadline=None)
@given(
    sizes=st.lists(st.integers(0, 100), min_size=1, max_size=20),
    columns=st.integers(1, 700),
    dtype=DTYPES,
    row_use=st.sampled_from(TOKEN_FORMATS),
)
def test_oracle_bits_of_groups(sizes, columns, dtype, row_use, col_use):
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    t = draw((sum(sizes) + 5, columns), dtype)
    check_quantize(t, row_use, col_use, "cuda", offs)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_oracle_bits_of_experts(fmt):
    check_quantize(draw((5, 100, 300), torch.bfloat16), fmt, fmt, "cuda")


@pytest.mark.parametrize("col_use", OTHER_FORMATS, ids=str)
@settings(max_examples=100 // len(OTHER_FORMATS), deadline=None)
@given(
    rows=st.integers(1, 700),
    columns=st.integers(1, 700),
    dtype=DTYPES,
    row_use=st.sampled_from([None, X, *OTHER_FORMATS]),
    exponent=st.floats(-38, 37.9),
)
def test_oracle_bits_of_other_formats(rows, columns, dtype, row_use, col_use, exponent):
    check_quantize(draw((rows, columns), dtype, exponent), row_use, col_use, "cuda")


@pytest.mark.parametrize("fmt", OTHER_FORMATS, ids=str)
def test_oracle_bits_of_groups_and_experts_in_other_formats(fmt):
    offs = torch.tensor([5, 5, 90, 300], dtype=torch.int32)
    if fmt.block[0] == 1:
        check_quantize(draw((310, 200), torch.bfloat16), fmt, fmt, "cuda", offs)
    check_quantize(draw((5, 100, 300), torch.bfloat16), fmt, fmt, "cuda")


@pytest.mark.parametrize("columns", [16, 64, 256, 512, 1024, 4096])
@pytest.mark.parametrize("fmt", [f for f in OTHER_FORMATS if f.block[0] == 1], ids=str)
def test_oracle_bits_of_other_formats_at_every_width(fmt, columns):
    check_quantize(draw((64, columns), torch.bfloat16), fmt, fmt, "cuda")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("grouped", [False, True])
def test_every_recipe_against_the_reference(name, grouped):
    # fp32: dequantized operands are rounded to the dtype.
    offs = torch.tensor([50, 50, 95], dtype=torch.int32) if grouped else None
    w = torch.randn(*((3,) if grouped else ()), 72, 136)
    recipe = RECIPES[name]
    if recipe.quantized and not (grouped and None in (recipe.fprop, recipe.dgrad, recipe.wgrad)):
        check_gemms(torch.randn(100, 136), w, torch.randn(100, 72), "cuda", 1e-5, offs, recipe)


@pytest.mark.parametrize("columns", [16, 64, 256, 512, 1024, 4096])
def test_oracle_bits_at_every_width(columns):
    # ptxas has miscompiled conversions to e4m3 at some tile widths and not at others.
    t = draw((48, columns), torch.bfloat16)
    check_quantize(t, X, X_COLS, "cuda")
    check_quantize(t, SR, SR_COLS, "cuda")
    check_quantize(t, RECIPE.fprop.right, None, "cuda")


@pytest.mark.parametrize(
    "special", [0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 1e-39, 3e38, -0.0]
)
def test_special_values(special):
    for base in (0.0, 1.0):
        t = draw((33, 70), torch.float32) * base
        t[3, 5] = special
        for fmt in FORMATS:
            check_quantize(t, fmt, fmt, "cuda")


def test_subnormal_tensors_and_amaxes_from_outside():
    for exponent in (-44, -40, -38):
        t = (draw((33, 70), torch.float64) * 10.0**exponent).float()
        check_quantize(t, SR, SR_COLS, "cuda")
    t = draw((33, 70), torch.float32)
    check_quantize(t, SR, X_COLS, "cuda", amax=torch.tensor([0.25, 0.5]), offset=(64, 32))


@pytest.mark.parametrize("shape", [(512, 384, 256), (100, 72, 40), (33, 70, 50), (1, 1, 1)])
@pytest.mark.parametrize("gemm", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("packed", [False, True])
def test_gemm_against_float64(shape, gemm, packed):
    m, n, k = shape
    t = torch.randn(m, k, device="cuda").bfloat16()
    w = torch.randn(n, k, device="cuda").bfloat16()
    dy = torch.randn(m, n, device="cuda").bfloat16()
    left, right = {"fprop": (t, w), "dgrad": (dy, w), "wgrad": (dy, t)}[gemm]
    formats = getattr(RECIPE, gemm)
    side = 1 if gemm == "wgrad" else 0
    pairs = []
    for tensor, fmt in ((left, formats.left), (right, formats.right)):
        use = uses(fmt, None) if side == 0 else uses(None, fmt)
        pairs.append(TRITON.quantize(tensor, *use, KEY)[side])
    a, b = pairs
    exact = [dequantize_double(o, slots=16 * -(-m // 16) if side else None) for o in pairs]
    if packed:
        a, b = (replace(o, values=None) for o in (a, b))
    for dtype, tolerance in ((torch.bfloat16, BF16), (torch.float32, 1e-5), (torch.float16, 1e-3)):
        if gemm == "wgrad":
            result, expected = TRITON.wgrad(a, b, dtype), exact[0] @ exact[1].T
        elif gemm == "dgrad":
            result, expected = TRITON.mm(a, b, k, dtype, True), exact[0] @ exact[1]
        else:
            result, expected = TRITON.mm(a, b, n, dtype), exact[0] @ exact[1].T
        assert result.dtype == dtype and relative_error(result, expected) < tolerance


def dequantize_double(operand, slots=None):
    """x_hat in float64, with the padding of tokens where `slots` says how many."""
    K = operand.K if slots is None else slots
    packed = (operand.codes.contiguous(), operand.block_scale.contiguous())
    unit = QuantizedOperand(*packed, torch.full_like(operand.amax, 2688.0), K, operand.format)
    return dequantize(unit).double() * global_scale(operand.amax).double()


@pytest.mark.parametrize("scale", [1e-36, 1e-15, 1e17])
def test_alpha_keeps_its_range(scale):
    x, w, dy = torch.randn(64, 48), torch.randn(80, 48), torch.randn(64, 80)
    check_gemms(x * scale, w / scale, dy, "cuda", 1e-5)


@pytest.mark.parametrize("cublas_found", [True, False])
def test_linear_against_the_reference(cublas_found, monkeypatch):
    assert cublas.library() is not None
    if not cublas_found:
        monkeypatch.setattr(cublas, "library", lambda: None)
    for m, n, k in ((512, 256, 384), (100, 40, 72), (33, 50, 70)):
        x, w, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        check_gemms(x, w, dy, "cuda", 1e-5)
        check_gemms(x.bfloat16(), w.bfloat16(), dy.bfloat16(), "cuda", BF16)
        recipe = RECIPE.switched(weights_2d=False)
        check_gemms(x, w, dy, "cuda", 1e-5, recipe=recipe)


@pytest.mark.parametrize("sizes", [[512, 300, 0, 212], [5, 0, 23, 1], [0, 0], [7]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_against_the_reference(sizes, dtype):
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    m, e = sum(sizes) + 9, len(sizes)
    # Whole tiles in all three GEMMs, in some, in none.
    for n, k in ((256, 512), (256, 384), (50, 70), (1, 33)):
        x, w, dy = (torch.randn(s).to(dtype) for s in ((m, k), (e, n, k), (m, n)))
        check_gemms(x, w, dy, "cuda", 1e-5 if dtype == torch.float32 else BF16, offs)


def modules(k=128, n=64, count=1):
    made = [
        NVFP4Linear(k, n, device="cuda", dtype=torch.bfloat16, name=str(i), backend="triton")
        for i in range(count)
    ]
    return made if count > 1 else made[0]


def test_nothing_waits_for_the_device():
    x = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(4, 64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    offs = torch.tensor([10, 100, 100, 250], dtype=torch.int32, device="cuda")
    dy = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16)
    module = modules()

    def step():
        module(x).backward(dy)
        grouped_mm(x, w.transpose(1, 2), offs, backend="triton").backward(dy)

    step()  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_the_same_bits():
    x, w = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((256, 128), (64, 128)))
    dy = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16)
    function = lambda x, w: linear(x, w, backend="triton", key=KEY)  # noqa: E731
    expected = gemms(function, x, w, dy)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gemms(function, x, w, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = gemms(function, x, w, dy)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_modes_of_the_handle_are_restored(monkeypatch):
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    before = x @ x
    y, matmul = x.float(), torch.backends.cuda.matmul
    monkeypatch.setattr(matmul, "allow_tf32", True)
    tf32 = y @ y
    linear(x, x, backend="triton")
    assert torch.equal(x @ x, before) and torch.equal(y @ y, tf32)
    monkeypatch.setattr(matmul, "allow_tf32", False)
    linear(x, x, backend="triton")
    assert not torch.equal(y @ y, tf32)


@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_compiled_by_inductor_equals_eager(kind):
    torch._dynamo.reset()
    x, dy = (torch.randn(96, n, device="cuda", dtype=torch.bfloat16) for n in (128, 64))
    w = torch.randn(3, 64, 128, device="cuda", dtype=torch.bfloat16)
    offs = torch.tensor([10, 10, 90], dtype=torch.int32, device="cuda")
    if kind == "linear":
        w = w[0].contiguous()
        function = lambda x, w: linear(x, w, backend="triton", key=KEY)  # noqa: E731
    else:
        function = lambda x, w: grouped_mm(x, w.mT, offs, backend="triton", key=KEY)  # noqa: E731
    eager = gemms(function, x, w, dy)
    compiled = gemms(torch.compile(function, fullgraph=True), x, w, dy)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_compiled_layers_share_one_graph():
    torch._dynamo.reset()
    x = torch.randn(96, 128, device="cuda", dtype=torch.bfloat16)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for module in modules(count=3):
            torch.compile(module, fullgraph=True)(x).sum().backward()


def test_large_operands_are_counted_in_64_bits():
    # More than 2**31 elements: 4 GiB of bf16.
    rows, columns = 70000, 32768
    t = torch.randn(16, columns, device="cuda", dtype=torch.bfloat16).repeat(rows // 16, 1)
    rows_use, cols_use = uses(X, X_COLS)
    whole, _ = TRITON.quantize(t, rows_use, None)
    part, _ = TRITON.quantize(t[:16].contiguous(), rows_use, None)
    assert torch.equal(whole.codes[-16:], part.codes)
    _, whole = TRITON.quantize(t, None, cols_use)
    _, part = TRITON.quantize(t[:16].contiguous(), None, cols_use)
    assert torch.equal(whole.codes[:, -8:], part.codes)


def test_repeatable():
    t = torch.randn(300, 200, device="cuda", dtype=torch.bfloat16)
    use = uses(SR, SR_COLS)
    first, second = (TRITON.quantize(t, *use, KEY) for _ in range(2))
    assert all(same_operand(a, b) for a, b in zip(first, second, strict=True))
    assert stream("dgrad", "left") != stream("wgrad", "left")
