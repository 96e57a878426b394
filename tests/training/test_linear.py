"""The linear's autograd function and module: everything nn.Linear can do."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from support import TOLERANCES, relative_error, same_operand, saved_tensors
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from nvfp4_titan import RECIPES
from nvfp4_titan.backends import BACKENDS, OperandUse, reference_ops, stream
from nvfp4_titan.errors import ConfigError, UnsupportedError
from nvfp4_titan.numerics import dequantize, quantize
from nvfp4_titan.training import NVFP4Linear, key_tensor, linear

RECIPE = RECIPES["nvfp4"]


def tensors(m=40, k=56, n=72, **kwargs):
    return (
        torch.randn(m, k, requires_grad=True, **kwargs),
        torch.randn(n, k, requires_grad=True, **kwargs),
        torch.randn(m, n, **kwargs),
    )


def run(x, w, dy, **kwargs):
    """y, dx, dw of fresh leaves."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = linear(x, w, backend="reference", **kwargs)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


def test_gemms_are_those_of_the_operands():
    x, w, dy = tensors()
    key = key_tensor(3, "layer")
    y, dx, dw = run(x, w, dy, key=key)
    x, w = x.detach(), w.detach()
    qw = quantize(w, block=(16, 16))
    assert relative_error(y, dequantize(quantize(x)) @ dequantize(qw).T) < 1e-6
    sr = {"rounding": "sr", "seed": int(key)}
    dy_rows = quantize(dy, stream=stream("dgrad", "left"), **sr)
    assert relative_error(dx, dequantize(dy_rows) @ dequantize(qw)) < 1e-6
    dy_cols = quantize(dy.T, rht=True, stream=stream("wgrad", "left"), **sr)
    x_cols = quantize(x.T, rht=True)

    # 40 tokens are padded to 48: the product runs over the padded, transformed tokens.
    def whole(operand):
        return dequantize(replace(operand, K=operand.K + 8))

    assert relative_error(dw, whole(dy_cols) @ whole(x_cols).T) < 1e-6


@pytest.mark.parametrize("name", [n for n, b in BACKENDS.items() if b.unavailable("cpu") is None])
@pytest.mark.parametrize("side", ["rows", "cols"])
@pytest.mark.parametrize("gemm", ["fprop", "dgrad", "wgrad"])
def test_backend_operands_equal_the_oracle(name, side, gemm):
    t = torch.randn(50, 70)
    fmt = getattr(RECIPE, gemm).left
    use = OperandUse(fmt, stream(gemm, "left"))
    rows, cols = (use, None) if side == "rows" else (None, use)
    operands = BACKENDS[name].quantize(t, rows, cols, key_tensor(1, "x"))
    expected = quantize(
        t if side == "rows" else t.T,
        rounding=fmt.rounding,
        rht=fmt.rht,
        seed=int(key_tensor(1, "x")),
        stream=use.stream,
    )
    assert same_operand(operands[0 if side == "rows" else 1], expected)
    amax = BACKENDS[name].amax(t, rows, cols)
    assert amax[0 if side == "rows" else 1] == expected.amax
    assert amax[1 if side == "rows" else 0] == 0


def test_a_shard_with_reduced_amax_and_offset_equals_its_part_of_the_whole():
    backend = BACKENDS["reference"]
    dy, key = torch.randn(64, 96), key_tensor(1, "x")
    rows = OperandUse(RECIPE.dgrad.left, stream("dgrad", "left"))
    cols = OperandUse(RECIPE.wgrad.left, stream("wgrad", "left"))
    whole = backend.quantize(dy, rows, cols, key)
    amax = torch.maximum(backend.amax(dy[:, :48], rows, cols), backend.amax(dy[:, 48:], rows, cols))
    part = backend.quantize(dy[:, 48:], rows, cols, key, amax=amax, offset=(0, 48))
    assert torch.equal(part[0].codes, whole[0].codes[:, 24:])
    assert torch.equal(part[1].codes, whole[1].codes[48:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    x, w, dy = tensors()
    expected = run(x, w, dy)
    actual = run(x.to(dtype), w.to(dtype), dy.to(dtype))
    assert all(a.dtype == dtype for a in actual)
    if dtype == torch.float32:
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    else:  # other operands are quantized, so only the size of the noise agrees
        assert relative_error(actual[0], expected[0]) < 0.1


def test_bf16_output_is_one_rounding_of_the_fp32_result():
    x, w, dy = (t.to(torch.bfloat16) for t in tensors())
    exact = run(x.float(), w.float(), dy.float())
    for a, e in zip(run(x, w, dy), exact, strict=True):
        assert relative_error(a, e) < TOLERANCES["bf16_output"]
        assert torch.equal(a, e.to(torch.bfloat16))


def test_leading_dims_and_strides():
    x, w, dy = tensors(m=24)
    y, dx, dw = run(x, w, dy)
    shaped = x.detach().view(2, 3, 4, 56).requires_grad_()
    out = linear(shaped, w.detach(), backend="reference")
    assert out.shape == (2, 3, 4, 72) and torch.equal(out.view(24, 72), y)
    strided = x.detach().T.contiguous().T
    assert not strided.is_contiguous() and torch.equal(run(strided, w, dy)[0], y)
    # A gradient that is expanded or transposed must not matter either.
    leaf = x.detach().requires_grad_()
    linear(leaf, w.detach(), backend="reference").backward(dy.T.contiguous().T)
    assert torch.equal(leaf.grad, dx)


def test_bias_gradient_comes_from_the_unquantized_dy():
    x, w, dy = tensors()
    bias = torch.randn(72, requires_grad=True)
    y = linear(x, w, bias, backend="reference")
    assert torch.equal(y, linear(x, w, backend="reference") + bias)
    y.backward(dy)
    assert torch.equal(bias.grad, dy.sum(0))


def test_saved_for_backward_is_packed():
    x, w, _ = tensors(m=256, k=128, n=64)
    saved = [t for t in saved_tensors(linear(x, w, backend="reference")) if t is not None]
    assert all(t.dtype in (torch.uint8, torch.float8_e4m3fn) or t.numel() == 1 for t in saved)
    size = sum(t.numel() * t.element_size() for t in saved)
    assert size <= 0.6 * (x.numel() + w.numel())


def count_quantized(monkeypatch):
    """Shapes of what is quantized from now on, with the uses asked for."""
    calls = []
    op = reference_ops.quantize
    monkeypatch.setattr(
        reference_ops,
        "quantize",
        lambda t, rows, cols, *rest: (
            calls.append((bool(rows), bool(cols))) or op(t, rows, cols, *rest)
        ),
    )
    return calls


def test_frozen_weight_and_input_cost_no_work(monkeypatch):
    x, w, dy = tensors()
    calls = count_quantized(monkeypatch)
    linear(x, w.detach(), backend="reference").backward(dy)
    assert calls == [(True, False), (True, False), (True, False)] and x.grad is not None
    calls.clear()
    linear(x.detach(), w, backend="reference").backward(dy)
    assert calls == [(True, True), (True, False), (False, True)]
    calls.clear()
    with torch.no_grad():
        y = linear(x, w, backend="reference")
    assert calls == [(True, False), (True, False)] and not y.requires_grad


def test_double_use_of_a_weight_adds_gradients():
    x, w, dy = tensors(n=56)
    key = key_tensor(0, "")
    first, second = run(x, w, dy), run(x * 2, w, dy)
    shared = w.detach().requires_grad_()
    (linear(x.detach(), shared, backend="reference", key=key)).backward(dy)
    (linear(x.detach() * 2, shared, backend="reference", key=key)).backward(dy)
    assert torch.equal(shared.grad, first[2] + second[2])


def test_autocast():
    x, w, dy = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, w, backend="reference")
    assert y.dtype == torch.bfloat16
    y.backward(dy.to(torch.bfloat16))
    assert x.grad.dtype == w.grad.dtype == torch.float32
    expected = run(x.bfloat16(), w.bfloat16(), dy.bfloat16())
    assert torch.equal(y, expected[0])
    assert torch.equal(x.grad, expected[1].float())
    # The weight's gradient is not rounded to bf16 on its way to the fp32 master weight.
    assert torch.equal(w.grad.bfloat16(), expected[2])
    assert not torch.equal(w.grad, w.grad.bfloat16().float())


@pytest.mark.parametrize("shape", [(0, 32, 48), (1, 1, 1), (17, 5, 3)])
def test_small_and_empty(shape):
    m, k, n = shape
    y, dx, dw = run(*tensors(m, k, n))
    assert y.shape == (m, n) and dx.shape == (m, k) and dw.shape == (n, k)
    assert all(t.isfinite().all() for t in (y, dx, dw))
    if m == 0:
        assert not dw.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "w", "dy"])
def test_special_values_reach_every_dependent_result(value, where):
    named = dict(zip(("x", "w", "dy"), tensors(), strict=True))
    named[where] = named[where].detach().clone()
    named[where][3, 5] = value
    y, dx, dw = run(**named)
    depends = {"x": (y, dw), "w": (y, dx), "dy": (dx, dw)}[where]
    for result in depends:
        assert not result.isfinite().any()
    for result in (y, dx, dw):
        if not any(result is other for other in depends):
            assert result.isfinite().all()


def test_zeros():
    y, dx, dw = run(*(torch.zeros_like(t) for t in tensors()))
    assert not y.any() and not dx.any() and not dw.any()


def test_repeatable_and_keyed_by_layer():
    x, w, dy = tensors()
    first = run(x, w, dy, key=key_tensor(0, "a"))
    again = run(x, w, dy, key=key_tensor(0, "a"))
    other = run(x, w, dy, key=key_tensor(0, "b"))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_a_key_outlives_moving_its_module():
    backend = replace(BACKENDS["reference"], key_on_device=True)
    module = NVFP4Linear(32, 32, device="meta", name="layer", backend=backend)
    assert int(module.to_empty(device="cpu").key) == int(key_tensor(0, "layer"))


def test_recomputation_gives_the_same_bits():
    module = NVFP4Linear(56, 72, name="layer", backend="reference")
    x = torch.randn(40, 56, requires_grad=True)

    def step(function):
        module.zero_grad()
        x.grad = None
        function(x).square().sum().backward()
        return x.grad, module.weight.grad

    plain = step(module)
    recomputed = step(lambda t: checkpoint(module, t, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_module_is_a_drop_in(tmp_path):
    plain = nn.Linear(56, 72)
    module = NVFP4Linear.from_linear(
        copy.deepcopy(plain), recipe=RECIPE, backend=BACKENDS["reference"], name="x", seed=0
    )
    assert list(module.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in module.named_buffers()] == []
    module.load_state_dict(plain.state_dict())
    copied = copy.deepcopy(module)
    stream_ = io.BytesIO()
    torch.save(module.state_dict(), stream_)
    x = torch.randn(40, 56)
    assert torch.equal(copied(x), module(x))
    assert copied.key == module.key
    assert "recipe=nvfp4" in repr(module)


def test_meta_then_empty_keeps_the_key():
    with torch.device("meta"):
        module = NVFP4Linear(16, 16, name="layer", backend="reference")
    assert module.key.device.type == "cpu"
    key = int(module.key)
    module.to_empty(device="cpu")
    nn.init.ones_(module.weight)
    nn.init.zeros_(module.bias)
    assert int(module.key) == key
    assert module(torch.ones(2, 16)).isfinite().all()


def test_compiled_layers_share_one_graph_and_give_the_same_bits():
    torch._dynamo.reset()
    modules = [NVFP4Linear(56, 72, name=str(i), backend="reference") for i in range(10)]
    x = torch.randn(40, 56, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for module in modules:
            compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
            results = []
            for function in (module, compiled):
                module.zero_grad()
                y = function(x)
                y.square().sum().backward()
                results.append((y.detach(), module.weight.grad.clone()))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layers_that_read_the_same_input_share_its_codes_when_compiled():
    a, b = (NVFP4Linear(32, 48, False, name=n, backend="reference") for n in "ab")
    graph = make_fx(lambda t: a(t) + b(t))(torch.randn(16, 32))
    merged = fx_graph_cse(graph.graph)
    target = torch.ops.nvfp4_titan.reference_quantize.default
    before = sum(node.target is target for node in graph.graph.nodes)
    after = sum(node.target is target for node in merged.nodes)
    assert (before, after) == (4, 3)


def test_unquantized_recipe_is_the_plain_linear():
    x, w, _ = tensors()
    assert torch.equal(linear(x, w, recipe="bf16"), nn.functional.linear(x, w))


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (lambda: linear(torch.ones(2, 8), torch.ones(4, 9)), "do not fit"),
        (lambda: linear(torch.ones(2, 8), torch.ones(4, 8), torch.ones(1)), r"bias \(1,\) and w"),
        (lambda: linear(torch.ones(2, 8), torch.ones(4, 8).bfloat16()), "cast one"),
        (lambda: linear(torch.ones(2, 8), torch.ones(4, 8), recipe="fp3"), "use one of nvfp4"),
        (lambda: linear(torch.ones(2, 8), torch.ones(4, 8), backend="cuda"), "use one of auto"),
        (lambda: linear(torch.ones(2, 8).double(), torch.ones(4, 8).double()), "float16"),
        (lambda: linear(torch.ones(2, 0), torch.ones(4, 0)), "size 0"),
        (
            lambda: linear(torch.ones(2, 8), torch.ones(4, 8), weight_amax=torch.tensor(1.0)),
            "amax_in_dtypes",
        ),
    ],
)
def test_errors_name_the_fix(call, fragment):
    with pytest.raises(ConfigError, match=fragment):
        call()


def test_a_second_derivative_is_refused():
    x, w, _ = tensors()
    y = linear(x, w, backend="reference")
    with pytest.raises(UnsupportedError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_the_function_compiles_and_runs_on_meta():
    torch._dynamo.reset()
    x, w, _ = tensors()
    compiled = torch.compile(lambda x, w: linear(x, w), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, w), linear(x, w))
    module = NVFP4Linear(16, 32, device="meta", backend="reference")
    assert module(torch.ones(3, 16, device="meta")).shape == (3, 32)


@pytest.mark.parametrize(("small", "large"), [(1.57e-41, 7.2e8), (1e38, 1e38), (1e-30, 1e-30)])
def test_alpha_outside_the_range_of_fp32(small, large):
    acc = torch.tensor([[17.7]])
    a, b = torch.tensor(small), torch.tensor(large)
    exact = acc.double() * (a / 2688).double() * (b / 2688).double()
    result = reference_ops.apply_alpha(acc.clone(), a, b)
    assert torch.allclose(result.double(), exact, rtol=1e-6) or result == exact.float()


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_mxfp8", "nvfp4_bf16"])
def test_requantized_weights_are_not_kept_and_give_the_same_bits(recipe):
    results = []
    for requantize in (False, True):
        torch.manual_seed(0)
        x, w = torch.randn(32, 48, requires_grad=True), torch.randn(64, 48, requires_grad=True)
        y = linear(x, w, recipe=recipe, backend="reference", requantize=requantize)
        kept = saved_tensors(y)[6:]
        assert (kept[0].data_ptr() == w.data_ptr()) == requantize
        y.backward(torch.ones_like(y))
        results.append((y, x.grad, w.grad))
    assert all(map(torch.equal, *results))


def test_a_compiler_does_not_keep_requantized_codes():
    kept = {}

    def boxed(graph, inputs):
        return make_boxed_func(graph.forward)

    def partition(graph, joint_inputs, **kwargs):
        forward, backward = min_cut_rematerialization_partition(graph, joint_inputs, **kwargs)
        outputs = next(n for n in forward.graph.nodes if n.op == "output").args[0]
        kept[requantize] = [n.meta["val"].dtype for n in outputs if hasattr(n, "meta")]
        return forward, backward

    for requantize in (False, True):
        torch._dynamo.reset()
        module = NVFP4Linear(48, 64, backend="reference")
        module.requantize = requantize
        compiler = aot_autograd(fw_compiler=boxed, partition_fn=partition)
        compiled = torch.compile(module, backend=compiler, fullgraph=True)
        compiled(torch.randn(32, 48, requires_grad=True)).sum().backward()
    assert kept[False].count(torch.uint8) == 2  # codes of x and of w
    assert kept[True].count(torch.uint8) == 1
