"""The whole recipe through the Triton backend, forward and backward, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
import triton
from backend_checks import KEY, check_gemms, uses
from support import TOLERANCES, saved_tensors

from nvfp4_titan import RECIPES
from nvfp4_titan.backends import BACKENDS
from nvfp4_titan.training import grouped_mm, linear

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and overflow

needs_loops = pytest.mark.skipif(
    triton.__version__.startswith("3.6."),
    reason="Triton 3.6's interpreter takes no loop bound from a tensor with numpy 2.4",
)


def tensors(*shapes, dtype=torch.float32):
    return (torch.randn(shape).to(dtype) for shape in shapes)


# The dtype's one rounding of the output.
ROUNDING = {torch.bfloat16: TOLERANCES["bf16_output"], torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_linear(dtype):
    x, w, dy = tensors((20, 37), (24, 37), (20, 24), dtype=dtype)
    check_gemms(x, w, dy, "cpu", ROUNDING[dtype])


def test_weights_in_rows_of_blocks_are_quantized_for_each_gemm():
    x, w, dy = tensors((20, 37), (24, 37), (20, 24))
    check_gemms(x, w, dy, "cpu", 1e-6, recipe=RECIPES["nvfp4"].switched(weights_2d=False))


def test_alpha_keeps_its_range():
    x, w, dy = tensors((16, 16), (16, 16), (16, 16))
    check_gemms(x * 1e-36, w * 1e36, dy, "cpu", 1e-6)


@needs_loops
@pytest.mark.parametrize(("n", "k"), [(16, 20), (32, 32)], ids=["masked", "whole tiles"])
def test_grouped(n, k):
    # More tiles than the interpreter's three programs; one group is longer than a tile.
    offs = torch.tensor([5, 5, 40], dtype=torch.int32)
    x, w, dy = tensors((42, k), (3, n, k), (42, n), dtype=torch.bfloat16)
    check_gemms(x, w, dy, "cpu", TOLERANCES["bf16_output"], offs)


@needs_loops
def test_grouped_with_one_column_and_without_square_blocks():
    offs = torch.tensor([3, 20], dtype=torch.int32)
    x, w, dy = tensors((20, 1), (2, 24, 1), (20, 24))
    check_gemms(x, w, dy, "cpu", 1e-6, offs, RECIPES["nvfp4"].switched(weights_2d=False))


@needs_loops
def test_a_group_does_not_see_its_neighbours():
    offs = torch.tensor([3, 10, 14], dtype=torch.int32)
    x, w, dy = tensors((16, 16), (3, 16, 16), (16, 16))
    results = []
    for poison in (False, True):
        if poison:
            x[6], dy[7], x[14:], dy[14:] = (float(v) for v in ("nan", "inf", "nan", "inf"))
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = grouped_mm(leaves[0], leaves[1].mT, offs, backend="triton", key=KEY)
        y.backward(dy)
        results.append((y.detach(), leaves[0].grad, leaves[1].grad))
    before, after = results
    for rows, e in ((slice(0, 3), 0), (slice(10, 14), 2)):
        assert torch.equal(before[0][rows], after[0][rows])
        assert torch.equal(before[1][rows], after[1][rows])
        assert torch.equal(before[2][e], after[2][e])
    assert not after[2][1].isfinite().any() and not after[0][14:].any()


def test_saved_for_backward_is_packed():
    x, w = torch.randn(32, 64, requires_grad=True), torch.randn(16, 64, requires_grad=True)
    saved = [t for t in saved_tensors(linear(x, w, backend="triton")) if t is not None]
    sizes = {t.dtype: t.numel() * t.element_size() for t in saved if t.numel() > 1}
    # x in codes and scales; the values of w, which dgrad multiplies as they are.
    assert sizes.pop(torch.bfloat16) == 2 * w.numel()
    assert set(sizes) == {torch.uint8, torch.float8_e4m3fn}
    assert sum(sizes.values()) <= 0.6 * x.numel()


@pytest.mark.parametrize(
    "offs",
    [None, pytest.param(torch.tensor([5, 17], dtype=torch.int32), marks=needs_loops)],
    ids=str,
)
def test_what_is_not_kept_is_not_packed_and_what_is_unpacks_to_the_same(offs):
    t = torch.randn(20, 37)
    backend, recipe = BACKENDS["triton"], RECIPES["nvfp4"]
    rows, cols = backend.quantize(t, *uses(recipe.fprop.left, recipe.wgrad.right), offs=offs)
    packed = [replace(o, values=None) for o in (rows, cols)]
    w = torch.randn(2, 8, 37) if offs is not None else torch.randn(8, 37)
    (weight, _) = backend.quantize(w, *uses(recipe.fprop.right, None))
    results = [
        (
            backend.mm(rows, weight, 8, torch.float32, offs=offs),
            backend.wgrad(cols, cols, torch.float32, offs),
        )
        for rows, cols in ((rows, cols), packed)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
