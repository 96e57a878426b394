"""MXFP8 against torchao's `to_mx`, byte for byte, and by hand where the two must differ."""

import math

import pytest
import torch
from support import differing, sqnr
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

from nvfp4_titan.errors import ConfigError
from nvfp4_titan.numerics import dequantize, quantize

MODES = {"mxfp8": ScaleCalculationMode.RCEIL, "mxfp8_floor": ScaleCalculationMode.FLOOR}


def every_bf16_amax() -> torch.Tensor:
    """A block of 32 for each non-negative bf16 number, zero, Inf and NaN: its largest element."""
    largest = torch.arange(0x7F81, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = torch.rand(len(largest), 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x[:, :4] = torch.tensor([0.0, -0.0, 1 / 3, -1.0])
    x = (x * largest.float().unsqueeze(1)).to(torch.bfloat16)
    x[:, 7] = largest
    return x


def cases():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 256, generator=generator)
    return {
        "every bf16 amax": every_bf16_amax(),
        "N(0,1) bf16": x.bfloat16(),
        "N(0,1) fp32": x,
        "all magnitudes": x * torch.logspace(-44, 38, 64).unsqueeze(1),
        "one special": torch.where(torch.rand(64, 256, generator=generator) < 0.01, math.inf, x),
        "NaN": torch.where(torch.rand(64, 256, generator=generator) < 0.01, math.nan, x),
        "zeros": torch.zeros(2, 64),
    }


@pytest.mark.parametrize("format", MODES)
@pytest.mark.parametrize("case", cases())
def test_equals_torchao(case, format):
    x = cases()[case].contiguous()
    scale, codes = to_mx(x, torch.float8_e4m3fn, 32, MODES[format])
    operand = quantize(x, format=format)
    assert operand.codes.dtype == codes.dtype and operand.block_scale.dtype == scale.dtype
    assert operand.amax is None and operand.global_scale is None
    assert differing(operand.block_scale, scale) == 0
    # The sign of a NaN code is no information.
    ours, theirs = (c.view(torch.uint8) for c in (operand.codes, codes))
    nan = codes.float().isnan()
    assert torch.equal(operand.codes.float().isnan(), nan)
    assert int((ours != theirs)[~nan].sum()) == 0
    for dtype in (torch.float32, torch.bfloat16):
        expected = to_dtype(codes, scale, torch.float8_e4m3fn, 32, dtype)
        assert torch.equal(dequantize(operand, dtype).nan_to_num(1.5), expected.nan_to_num(1.5))


def test_scales_are_rounded_up_exactly_where_a_logarithm_is_not():
    # One ulp above 448 * 2**9: the ratio is one ulp above 2**9, and log2 of that in fp32 is 9.
    x = torch.zeros(1, 32)
    x[0, 0] = torch.nextafter(torch.tensor(448.0 * 2**9), torch.tensor(math.inf))
    theirs, _ = to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
    ours = quantize(x, format="mxfp8")
    assert theirs.float().item() == 2.0**9 and ours.block_scale.float().item() == 2.0**10


def test_hand_worked_blocks():
    # 500 / 448 = 1.116: up to 2**1, 500 / 2 = 250 -> 256 (steps of 16); down: exponent 8 - 8 = 0,
    # 500 saturates at 448.
    x = torch.zeros(1, 32)
    x[0, :3] = torch.tensor([500.0, -3.3, 1e-4])
    up, down = (quantize(x, format=format) for format in MODES)
    assert up.block_scale.float().item() == 2 and down.block_scale.float().item() == 1
    assert dequantize(up)[0, :2].tolist() == [512.0, -3.25]
    assert dequantize(down)[0, :2].tolist() == [448.0, -3.25]
    assert up.shape == (1, 32)


def test_sizes_and_square_blocks():
    x = torch.randn(40, 50)
    operand = quantize(x, format="mxfp8")
    assert operand.codes.shape == (40, 64) and operand.block_scale.shape == (40, 2)
    assert dequantize(operand).shape == x.shape
    square = quantize(x, format="mxfp8", block=(32, 32))
    scale = square.block_scale.float()
    assert (scale[:32] == scale[0]).all() and (scale[32:] == scale[32]).all()
    turned = quantize(x.T.contiguous(), format="mxfp8", block=(32, 32))
    assert torch.equal(dequantize(turned), dequantize(square).T)


@pytest.mark.parametrize(("format", "target"), [("mxfp8", 31.5), ("mxfp8_floor", 30.7)])
def test_window(format, target):
    values = []
    for seed in range(5):
        x = torch.randn(512, 512, generator=torch.Generator().manual_seed(seed))
        values.append(sqnr(dequantize(quantize(x, format=format)), x))
    assert abs(sum(values) / 5 - target) <= 0.15


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format", MODES)
def test_special_values_stay_special(value, format):
    x = torch.randn(2, 64)
    x[0, 5] = value
    result = dequantize(quantize(x, format=format))
    assert not result[0, 5].isfinite() and result[1].isfinite().all()
    others = torch.cat((result[0, :5], result[0, 6:32]))
    assert (~others.isfinite() | (others == 0)).all() and result[0, 32:].isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "fragment"),
    [
        ({"format": "mxfp9"}, "use one of nvfp4"),
        ({"rounding": "sr", "seed": 0}, "use rounding='rtne'"),
        ({"block": (1, 16)}, "use \\(1, 32\\) or \\(32, 32\\)"),
    ],
)
def test_errors_name_the_fix(kwargs, fragment):
    with pytest.raises(ConfigError, match=fragment):
        quantize(torch.zeros(32, 32), **{"format": "mxfp8", **kwargs})
