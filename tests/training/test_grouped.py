"""Grouped GEMMs: every group is what the linear makes of its rows alone."""

import pytest
import torch
from support import relative_error

from nvfp4_titan import RECIPES
from nvfp4_titan.backends import BACKENDS, OperandUse
from nvfp4_titan.distributed import GatheredWeight, amax_in_dtypes
from nvfp4_titan.errors import ConfigError, UnsupportedError
from nvfp4_titan.recipe import GemmFormat, OperandFormat, Recipe
from nvfp4_titan.training import grouped_mm, key_tensor, linear

KEY = key_tensor(5, "experts.w1")
SPLITS = {
    "aligned": [16, 32, 16, 48],
    "ragged": [5, 23, 1, 40],
    "empty groups": [0, 17, 0, 0, 33, 0],
    "one token each": [1, 1, 1],
    "all in one group": [0, 64, 0],
    "nothing at all": [0, 0],
}


def tensors(sizes, trailing=0, k=56, n=40, dtype=torch.float32):
    rows = sum(sizes) + trailing
    x = torch.randn(rows, k).to(dtype).requires_grad_()
    w = torch.randn(len(sizes), n, k).to(dtype).requires_grad_()
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    # Experts see gradients of different sizes: a shared amax would show.
    return (
        x,
        w,
        offs,
        torch.randn(rows, n).to(dtype) * torch.logspace(-3, 0, rows)[:, None].to(dtype),
    )


def run(x, w, offs, dy, **kwargs):
    """y, dx, dw, with fresh leaves."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = grouped_mm(x, w.transpose(-2, -1), offs, backend="reference", key=KEY, **kwargs)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


def alone(x, w, dy, **kwargs):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = linear(x, w, backend="reference", key=KEY, **kwargs)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("weights_2d", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trailing", [0, 9])
@pytest.mark.parametrize("split", SPLITS)
def test_every_group_equals_its_linear(split, trailing, dtype, weights_2d):
    sizes = SPLITS[split]
    x, w, offs, dy = tensors(sizes, trailing, dtype=dtype)
    recipe = RECIPES["nvfp4"].switched(weights_2d=weights_2d)
    y, dx, dw = run(x, w, offs, dy, recipe=recipe)
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        expected = alone(x[rows], w[e], dy[rows], recipe=recipe)
        for name, actual, wanted in zip(
            ("y", "dx", "dw"), (y[rows], dx[rows], dw[e]), expected, strict=True
        ):
            assert torch.equal(actual, wanted), (name, e)
        start += size
    assert not y[start:].any() and not dx[start:].any()


def test_a_group_does_not_see_its_neighbours():
    sizes = [20, 30, 14]
    x, w, offs, dy = tensors(sizes, trailing=5)
    before = run(x, w, offs, dy)
    x, dy = x.detach().clone(), dy.clone()
    x[20:50] *= 1e6
    dy[21] = float("nan")
    x[64:] = float("nan")  # trailing padding
    dy[64:] = float("inf")
    after = run(x, w, offs, dy)
    for rows, e in ((slice(0, 20), 0), (slice(50, 64), 2)):
        assert torch.equal(before[0][rows], after[0][rows])
        assert torch.equal(before[1][rows], after[1][rows])
        assert torch.equal(before[2][e], after[2][e])
    assert not after[1][20:50].isfinite().any() and not after[2][1].isfinite().any()
    assert not after[0][64:].any() and not after[1][64:].any()


def test_the_order_of_experts_does_not_matter():
    # SR is keyed inside the group: EP moves an expert to another rank without changing its bits.
    sizes = [20, 30]
    x, w, offs, dy = tensors(sizes)
    y, dx, dw = run(x, w, offs, dy)
    swap = torch.cat((torch.arange(20, 50), torch.arange(20)))
    other = run(x[swap], w.flip(0), torch.tensor([30, 50], dtype=torch.int32), dy[swap])
    assert torch.equal(other[0], y[swap]) and torch.equal(other[1], dx[swap])
    assert torch.equal(other[2], dw.flip(0))


def test_gain_of_wgrad_over_64_experts():
    # A published grouped kernel had a gain of 0.88, and nobody saw it in the loss for weeks.
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(16, 400, (64,), generator=generator).tolist()
    x, w, offs, _ = tensors(sizes, k=128, n=128)
    dy = torch.randn(sum(sizes), 128)
    dw = run(x, w, offs, dy)[2].double()
    gains, cosines, start = [], [], 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        exact = dy[rows].double().T @ x[rows].double()
        gains.append((dw[e] * exact).sum() / exact.square().sum())
        cosines.append((dw[e] * exact).sum() / dw[e].norm() / exact.norm())
        start += size
    gains, cosines = torch.stack(gains), torch.stack(cosines)
    assert gains.min() >= 0.975 and gains.max() <= 1.005
    assert abs(gains.mean() - 0.991) <= 0.003
    assert cosines.min() >= 0.97


def test_frozen_weight_and_input():
    x, w, offs, dy = tensors([10, 20])
    y, dx, dw = run(x, w, offs, dy)
    only_x = x.detach().requires_grad_()
    kwargs = {"backend": "reference", "key": KEY}
    grouped_mm(only_x, w.detach().transpose(-2, -1), offs, **kwargs).backward(dy)
    assert torch.equal(only_x.grad, dx)
    only_w = w.detach().requires_grad_()
    grouped_mm(x.detach(), only_w.transpose(-2, -1), offs, **kwargs).backward(dy)
    assert torch.equal(only_w.grad, dw)


def test_weights_that_are_not_a_transposed_view():
    x, w, offs, dy = tensors([10, 20])
    contiguous = w.detach().transpose(-2, -1).contiguous()
    y = grouped_mm(x, contiguous, offs, backend="reference", key=KEY)
    assert torch.equal(y, run(x, w, offs, dy)[0])


def test_close_to_high_precision():
    x, w, offs, dy = tensors([40, 8, 100])
    y, dx, _ = run(x, w, offs, torch.randn_like(dy))
    exact = torch.cat([x[a:b] @ w[e].T for e, (a, b) in enumerate([(0, 40), (40, 48), (48, 148)])])
    assert relative_error(y, exact.detach()) < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_sizes_that_torchs_grouped_gemm_does_not_take(recipe, dtype):
    """Rows that begin anywhere, in every recipe: as its linears, group by group."""
    x = torch.randn(37, 50, dtype=dtype, requires_grad=True)
    w = torch.randn(3, 50, 23, dtype=dtype, requires_grad=True)
    ends, dy = [5, 21, 37], torch.randn(37, 23, dtype=dtype)
    y = grouped_mm(x, w, torch.tensor(ends, dtype=torch.int32), recipe=recipe, backend="reference")
    grads = torch.autograd.grad(y, (x, w), dy)
    parts = []
    for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        y_e = linear(x[start:end], w[e].T, recipe=recipe, backend="reference")
        parts.append((y_e, *torch.autograd.grad(y_e, (x, w), dy[start:end])))
    wanted = torch.cat([p[0] for p in parts]), sum(p[1] for p in parts), sum(p[2] for p in parts)
    for mine, other in zip((y, *grads), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2)


def test_saved_for_backward_is_packed():
    x, w, offs, _ = tensors([64, 192], k=128, n=64)
    y = grouped_mm(x, w.transpose(-2, -1), offs, backend="reference")
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    size = sum(t.numel() * t.element_size() for t in saved)
    assert size <= 0.6 * (x.numel() + 32 * 128 + w.numel())


def test_compiled_with_changing_token_counts():
    torch._dynamo.reset()
    sizes = [([16, 32], 0), ([7, 30], 3), ([0, 50], 5)]

    def function(x, w, offs):
        return grouped_mm(x, w.transpose(-2, -1), offs, backend="reference", key=KEY)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for split, trailing in sizes:
        x, w, offs, dy = tensors(split, trailing)
        y = compiled(x, w, offs)
        y.backward(dy)
        expected = run(x, w, offs, dy)
        assert torch.equal(y, expected[0]) and torch.equal(w.grad, expected[2])


SQUARE = OperandFormat(block=(16, 16))
NVFP4 = RECIPES["nvfp4"]


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"x": torch.ones(4, 9)}, "do not fit"),
        ({"x": torch.ones(2, 2, 8)}, "do not fit"),
        ({"w": torch.ones(2, 8, 4).bfloat16()}, "cast one"),
        ({"offs": torch.tensor([2, 4])}, "as int32"),
        ({"offs": torch.tensor([4], dtype=torch.int32)}, "2 group ends"),
        ({"offs": torch.tensor([3, 2], dtype=torch.int32)}, "must not decrease"),
        ({"offs": torch.tensor([2, 5], dtype=torch.int32)}, "4 rows of x"),
        ({"offs": torch.tensor([2, 4], dtype=torch.int32, device="meta")}, "on cpu"),
        ({"weight_amax": torch.ones(2)}, "amax_in_dtypes"),
        ({"weight_amax": torch.ones(1, 2)}, "amax_in_dtypes"),
        ({"weight_amax": torch.ones(3, 2)}, "amax_in_dtypes"),
        ({"weight_amax": torch.ones(2, 2).bfloat16()}, "amax_in_dtypes"),
        ({"weight_amax": torch.ones(2, 2, device="meta")}, "on meta"),
        ({"recipe": Recipe("sq", GemmFormat(SQUARE, SQUARE), NVFP4.dgrad, NVFP4.wgrad)}, "1x16"),
    ],
)
def test_errors_name_the_fix(change, fragment):
    arguments = {
        "x": torch.ones(4, 8),
        "w": torch.ones(2, 8, 4),
        "offs": torch.tensor([2, 4], dtype=torch.int32),
    } | change
    with pytest.raises(ConfigError, match=fragment):
        grouped_mm(**arguments, backend="reference")


def test_weights_gathered_in_codes_are_not_turned():
    """Their blocks run along K: multiplied the other way they would be other weights."""
    w, fmt = torch.randn(2, 32, 32), OperandFormat(block=(16, 16))
    operand, _ = BACKENDS["reference"].quantize(w, OperandUse(fmt, 0), None)
    parts = operand.codes, operand.block_scale, amax_in_dtypes(operand.amax), OperandFormat()
    gathered = GatheredWeight(*parts, w.shape, w.dtype)
    x, offs = torch.randn(8, 32), torch.tensor([4, 8], dtype=torch.int32)
    y = grouped_mm(x, gathered.transpose(-2, -1), offs, backend="reference")
    assert relative_error(y[:4], x[:4] @ w[0].T) < 0.3
    with pytest.raises(UnsupportedError, match="multiplied turned"):
        grouped_mm(x, gathered, offs, backend="reference")
