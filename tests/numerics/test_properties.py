"""Any shape, any dtype, any magnitude: no crash, finite results, the format's error bound."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4_titan import RECIPES
from nvfp4_titan.numerics import dequantize, quantize, rht
from nvfp4_titan.numerics.quantize import pad_to_blocks
from nvfp4_titan.training import linear

SIZES = st.integers(1, 200)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
VARIANTS = st.sampled_from(
    [
        {},
        {"rounding": "sr", "seed": 1},
        {"rht": True},
        {"rht": True, "rounding": "sr", "seed": 1},
        {"block": (16, 16)},
        {"block": (16, 16), "rounding": "sr", "seed": 1},
    ]
)
# Relative to the block's amax: half the largest step (SR: a whole one) is 1/6 (2/6), and the e4m3
# rounding of the scale adds 1/16, or for blocks below 2^-6 of the tensor's amax / 448 its
# subnormal step.
EXAMPLES = settings(max_examples=60, deadline=None)


def draw(rows: int, columns: int, dtype: torch.dtype, exponent: float, seed: int) -> torch.Tensor:
    """N(0,1) clipped to amax 4 and scaled by 10**exponent, clipped to the dtype's range."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64).clamp(-4, 4) / 4
    limit = torch.finfo(dtype).max
    return (x * 10.0**exponent).clamp(-limit, limit).to(dtype)


@EXAMPLES
@given(SIZES, SIZES, DTYPES, VARIANTS, st.floats(-38, 37.9), st.integers(0, 99))
def test_quantize_never_crashes_and_stays_finite(rows, columns, dtype, kwargs, exponent, seed):
    x = draw(rows, columns, dtype, exponent, seed)
    operand = quantize(x, **kwargs)
    blocks = -(-columns // 16)
    assert operand.codes.shape == (rows, blocks * 8)
    assert operand.block_scale.shape == (rows, blocks)
    assert operand.block_scale.dtype == torch.float8_e4m3fn and operand.amax.dim() == 0
    result = dequantize(operand)
    assert result.shape == x.shape and result.isfinite().all()


@EXAMPLES
@given(SIZES, SIZES, DTYPES, VARIANTS, st.floats(-30, 30), st.integers(0, 99))
def test_error_bound(rows, columns, dtype, kwargs, exponent, seed):
    x = draw(rows, columns, dtype, exponent, seed)
    expected = x.float()
    if kwargs.get("rht"):
        expected = rht(pad_to_blocks(x)).float()[:, :columns]
    operand = quantize(x, **kwargs)
    error = (dequantize(operand) - expected).abs()
    held = expected
    if kwargs.get("rht"):
        # Padding takes its share of a transformed block.
        held = rht(pad_to_blocks(torch.nn.functional.pad(x, (0, 0, 0, -rows % 16)))).float()
    height, sr = kwargs.get("block", (1, 16))[0], "seed" in kwargs
    bound = error_bound(held, operand.amax, height, sr)[:rows, :columns]
    assert (error <= bound * 1.001).all()


def error_bound(
    x: torch.Tensor, amax: torch.Tensor, height: int = 1, sr: bool = False
) -> torch.Tensor:
    """How far each element of an operand may be from x, whose blocks are so many rows high."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.abs(), (0, -columns % 16, 0, -rows % 16))
    tiles = padded.view(padded.shape[0] // height, height, -1, 16)
    block_amax = tiles.amax((1, 3), keepdim=True).expand_as(tiles).reshape(padded.shape)
    step = (2 if sr else 1) / 6
    subnormal = amax / 2688 * 6 * 2.0**-10  # half of e4m3's smallest step, times 6
    return (block_amax * (step * (1 + 1 / 16) + 1 / 16) + subnormal)[:rows, :columns]


def assert_product(actual: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *uses: dict) -> None:
    """That actual is a @ b.T of operands within their bounds, rounded to its dtype."""
    a, b = a.detach().double(), b.detach().double()
    e, f = (error_bound(t, t.abs().max(), **use) for t, use in zip((a, b), uses, strict=True))
    within = a.abs() @ f.T + e @ b.abs().T + e @ f.T
    rounding = torch.finfo(actual.dtype)
    within += rounding.eps * (a.abs() @ b.abs().T) + rounding.tiny
    error = actual.double() - a @ b.T
    assert (error.abs() <= within * 1.001).all()
    # These bounds add up, errors do not: they are smaller than what zeros would miss.
    assert error.norm() <= 0.5 * (a.square() @ b.square().T).sum().sqrt() + rounding.tiny


def turned(t: torch.Tensor) -> torch.Tensor:
    """RHT(t.T), as wgrad contracts it."""
    return rht(pad_to_blocks(t.detach().T.contiguous())).float()


@EXAMPLES
@given(SIZES, SIZES, SIZES, DTYPES, st.floats(-15, 15), st.floats(-15, 15), st.integers(0, 99))
def test_linear(m, n, k, dtype, x_exponent, w_exponent, seed):
    # Exponents that keep alpha a normal fp32 and the result in fp32's (fp16's) range.
    if dtype == torch.float16:
        x_exponent, w_exponent = x_exponent / 15, w_exponent / 15
    x = draw(m, k, dtype, x_exponent, seed).requires_grad_()
    w = draw(n, k, dtype, w_exponent, seed + 1).requires_grad_()
    y = linear(x, w, backend="reference")
    dy = draw(m, n, dtype, 0, seed + 2)
    y.backward(dy)
    for result, like in ((y, dy), (x.grad, x), (w.grad, w)):
        assert result.shape == like.shape and result.dtype == dtype and result.isfinite().all()
    assert_product(y, x, w, {}, {"height": 16})
    # dgrad multiplies the very codes of fprop: blocks of 16 rows and 16 columns, turned.
    assert_product(x.grad, dy, w.T.contiguous(), {"sr": True}, {"height": 16})
    assert_product(w.grad, turned(dy), turned(x), {"sr": True}, {})


@EXAMPLES
@given(st.floats(-38, 37.9), st.floats(-38, 37.9), st.integers(0, 9))
def test_gemm_stays_finite_while_its_result_is(a_exponent, b_exponent, seed):
    k = 48
    if a_exponent + b_exponent + 2 > 38:
        return
    x = draw(20, k, torch.float32, a_exponent, seed)
    w = draw(24, k, torch.float32, b_exponent, seed + 1)
    recipe = RECIPES["nvfp4"]
    assert linear(x, w, recipe=recipe, backend="reference").isfinite().all()
