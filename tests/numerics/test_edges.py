"""Hand-worked blocks, special values, the Hadamard transform, layouts, errors."""

import math

import pytest
import torch
from support import sylvester

from nvfp4_titan.errors import ConfigError
from nvfp4_titan.formats import RHT_SIGNS
from nvfp4_titan.numerics import dequantize, from_blocked, quantize, rht, to_blocked
from nvfp4_titan.numerics.quantize import scaled_values


def test_hand_worked_block():
    # amax 500: s_enc = 2688 / 500 = 5.376; S_b = e4m3(500 * 5.376 / 6) = e4m3(448) = 448.
    # enc_b = 5.376 / 448 = 0.012: 500 -> 6, 125 -> 1.5, 20.83.. * 0.012 = 0.25 -> tie to 0.
    x = torch.zeros(1, 16)
    x[0, :4] = torch.tensor([500.0, -125.0, 300.0, 0.5])
    operand = quantize(x)
    assert operand.block_scale.float().item() == 448
    assert operand.amax.item() == 500
    # codes: 6 -> 7; -1.5 -> 8 + 3; 3.6 -> 4 (code 6); 0.006 -> 0
    assert operand.codes[0].tolist() == [7 | (11 << 4), 6, 0, 0, 0, 0, 0, 0]
    expected = torch.tensor([6.0, -1.5, 4.0, 0.0]) * 448 * torch.tensor(500 / 2688)
    assert torch.equal(dequantize(operand)[0, :4], expected)


@pytest.mark.parametrize("rounding", ["rtne", "sr"])
def test_parameters_are_quantized_as_the_values_they_hold(rounding):
    p = torch.nn.Parameter(torch.randn(20, 40))
    ours, theirs = (quantize(t, rounding=rounding, seed=1) for t in (p, p.detach()))
    assert torch.equal(ours.codes, theirs.codes) and not ours.amax.requires_grad
    assert torch.equal(rht(p[:16]), rht(p.detach()[:16]))


@pytest.mark.parametrize("shape", [(0,), (4, 0)])
def test_nothing_to_contract(shape):
    with pytest.raises(ConfigError, match="no contraction dim"):
        quantize(torch.zeros(shape))


def test_zeros():
    for kwargs in ({}, {"rht": True}, {"block": (16, 16)}, {"rounding": "sr", "seed": 1}):
        operand = quantize(torch.zeros(20, 40), **kwargs)
        assert not operand.codes.any() and not operand.block_scale.float().any()
        assert operand.amax == 0 and not dequantize(operand).any()


def test_block_that_underflows_becomes_zero():
    x = torch.ones(2, 16)
    x[1] = 1e-9  # S_b below half of e4m3's smallest subnormal
    operand = quantize(x)
    assert operand.block_scale[1].float() == 0 and not operand.codes[1].any()
    assert not dequantize(operand)[1].any() and dequantize(operand)[0].all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kwargs", [{}, {"rht": True}, {"block": (16, 16)}, {"rounding": "sr"}])
def test_special_values_stay_special(value, kwargs):
    x = torch.randn(32, 48)
    x[3, 5] = value
    if "rounding" in kwargs:
        kwargs = {**kwargs, "seed": 0}
    result = dequantize(quantize(x, **kwargs))
    # amax carries it everywhere: no element of the tensor looks like a plausible number.
    assert not result[3, :16].isfinite().any()
    assert (~result.isfinite() | (result == 0)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_value_with_a_finite_amax_from_outside(value):
    # An amax from outside may not know of it; the block must.
    x = torch.randn(2, 32)
    x[0, 0] = value
    result = dequantize(quantize(x, amax=torch.tensor(4.0)))
    assert not result[0, :16].isfinite().any() and result[1].isfinite().all()


def test_rht_is_the_matrix_product():
    x = torch.randn(48, 64).bfloat16()
    matrix = torch.diag(torch.tensor(RHT_SIGNS, dtype=torch.float64)) @ sylvester(16) / 4
    expected = (x.double().view(-1, 16) @ matrix).view(48, 64)
    assert torch.equal(rht(x), expected.to(torch.bfloat16))
    assert torch.equal(rht(x.T, dim=0), rht(x).T)


def test_rht_cancels():
    a, b = torch.randn(8, 64), torch.randn(8, 64)
    product = rht(a).float() @ rht(b).float().T
    assert (product - a @ b.T).abs().max() < 0.25  # two bf16 roundings


def test_rht_is_finite_up_to_8e37():
    assert rht(torch.full((1, 16), 8e37)).isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 5), (300, 9), (33, 64)])
def test_blocked_layout(shape):
    scale = torch.randint(0, 255, shape, dtype=torch.uint8)
    blocked = to_blocked(scale)
    columns = -(-shape[1] // 4)
    for m, k in ((0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2)):
        index = (
            ((m // 128) * columns + k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4
        )
        assert blocked[index] == scale[m, k]
    assert blocked.numel() == -(-shape[0] // 128) * 128 * columns * 4
    assert blocked.sum(dtype=torch.int64) == scale.sum(dtype=torch.int64)
    assert torch.equal(from_blocked(blocked, *shape), scale)


def test_blocked_layout_equals_torchao():
    from torchao.prototype.mx_formats.utils import to_blocked as torchao_to_blocked

    for shape in ((128, 4), (130, 5), (300, 9)):
        scale = torch.rand(shape).to(torch.float8_e4m3fn)
        theirs = torchao_to_blocked(scale).view(torch.uint8).flatten()
        assert torch.equal(to_blocked(scale).view(torch.uint8), theirs)


def test_products_are_exact_in_bf16():
    scales = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = torch.arange(256, dtype=torch.uint8).view(1, 32, 8).expand(0x7F, 32, 8)
    block_scale = scales.view(-1, 1).expand(0x7F, 32).contiguous()
    codes = codes.reshape(0x7F, 256)
    exact = scaled_values(codes, block_scale, torch.float32)
    assert torch.equal(scaled_values(codes, block_scale, torch.bfloat16).float(), exact)


@pytest.mark.parametrize(
    ("kwargs", "fragment"),
    [
        ({"block": (1, 32)}, "use (1, 16) or (16, 16)"),
        ({"rounding": "nearest"}, "use 'rtne' or 'sr'"),
        ({"rounding": "sr"}, "needs seed="),
    ],
)
def test_errors_name_the_fix(kwargs, fragment):
    with pytest.raises(ConfigError, match=fragment.replace("(", r"\(").replace(")", r"\)")):
        quantize(torch.zeros(16, 16), **kwargs)


def test_wrong_tensors():
    with pytest.raises(ConfigError, match="cast the input first"):
        quantize(torch.zeros(16, 16, dtype=torch.int32))
    with pytest.raises(ConfigError, match="takes a 2D"):
        quantize(torch.zeros(2, 16, 16), block=(16, 16))
    with pytest.raises(ConfigError, match="1D or higher"):
        quantize(torch.tensor(1.0))


def test_leading_dims():
    x = torch.randn(2, 3, 40)
    operand = quantize(x)
    assert operand.codes.shape == (2, 3, 24) and operand.block_scale.shape == (2, 3, 3)
    assert operand.shape == x.shape == dequantize(operand).shape
    flat = quantize(x.view(6, 40))
    assert torch.equal(operand.codes.view(6, 24), flat.codes)
