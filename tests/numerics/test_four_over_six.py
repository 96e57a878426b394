"""NVFP4 variants: four-over-six block scaling, and a single level of scales."""

from dataclasses import replace

import pytest
import torch
from support import WINDOW_DB, sqnr

from nvfp4_titan.formats import NVFP4_46
from nvfp4_titan.numerics import dequantize, quantize, rht

ALWAYS_SIX = replace(NVFP4_46, name="always_six", block_targets=(6.0,))
VARIANTS = {
    "1x16": {},
    "16x16": {"block": (16, 16)},
    "RHT": {"rht": True},
}


def blocks_of(*rows: list[float]) -> torch.Tensor:
    """Blocks of 16 that begin with the given values, after one that makes the global scale 1."""
    x = torch.zeros(1 + len(rows), 16)
    x[0, 0] = 1536.0
    for i, row in enumerate(rows):
        x[i + 1, : len(row)] = torch.tensor(row)
    return x


def test_hand_worked_blocks():
    x = blocks_of(
        [4.0, 3.0, -2.0, 0.5],  # on the grid at scale 1: 4 wins (6 would take 0.6875)
        [6.0, 4.0, -3.0, 0.5],  # on the grid at scale 1: 6 wins
        [12.0],  # 6 * 2 and 4 * 3: a tie, 6 wins
        [],
    )
    operand = quantize(x, format="nvfp4_46")
    assert operand.block_scale.float().flatten().tolist() == [256.0, 1.0, 1.0, 2.0, 0.0]
    assert operand.codes[1, :2].tolist() == [6 | (5 << 4), (8 + 4) | (1 << 4)]
    assert torch.equal(dequantize(operand), x)


def test_the_block_that_holds_amax_fits_when_scaled_to_four():
    x = torch.tensor([[1536.0, 1152.0, 768.0, 384.0] * 4])
    operand = quantize(x, format="nvfp4_46")
    assert operand.block_scale.float().item() == 384.0
    assert torch.equal(dequantize(operand), x)


@pytest.mark.parametrize("exponent", [-30, 0, 30])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_block_errs_more_than_scaled_to_six(variant, exponent):
    kwargs = VARIANTS[variant]
    x = torch.randn(72, 256) * torch.logspace(-3, 0, 256) * 10.0**exponent
    x[:, 40:56] = 0
    exact = (rht(x).float() if "rht" in kwargs else x).double()
    rows = kwargs.get("block", (1, 16))[0]

    def errors(format):
        square = (dequantize(quantize(x, format=format, **kwargs)).double() - exact).square()
        square = torch.nn.functional.pad(square, (0, 0, 0, -72 % rows))
        return square.view(-1, rows, 16, 16).sum((1, 3))

    ours, six = errors("nvfp4_46"), errors(ALWAYS_SIX)
    # The choice is made in fp32: candidates that differ by its rounding count as equal.
    assert (ours <= six * (1 + 1e-5)).all()
    assert (ours < 0.999 * six).any()


@pytest.mark.parametrize(
    ("format", "kwargs", "target"),
    [
        ("nvfp4_46", {}, 21.21),
        ("nvfp4_46", {"rounding": "sr"}, 17.54),
        ("nvfp4_46", {"rht": True}, 21.21),
        ("nvfp4_46", {"block": (16, 16)}, 19.08),
        ("nvfp4_single", {}, 20.44),
        ("nvfp4_46_single", {}, 21.21),
    ],
)
def test_windows(format, kwargs, target):
    values = []
    for seed in range(5):
        x = torch.randn(512, 512, generator=torch.Generator().manual_seed(seed))
        operand = quantize(x, format=format, seed=seed, **kwargs)
        values.append(sqnr(dequantize(operand), rht(x).float() if "rht" in kwargs else x))
    assert abs(sum(values) / 5 - target) <= WINDOW_DB


def test_the_choice_does_not_see_the_random_bits():
    x = torch.randn(64, 256)
    scales = [
        quantize(x, format="nvfp4_46", rounding=rounding, seed=1).block_scale.float()
        for rounding in ("rtne", "sr")
    ]
    assert torch.equal(*scales)


def test_special_values_stay_special():
    for value in (torch.nan, torch.inf):
        for format in ("nvfp4_46", "nvfp4_single"):
            x = torch.randn(4, 32)
            x[1, 3] = value
            assert not dequantize(quantize(x, format=format))[1, :16].isfinite().any()


def test_a_single_level_has_no_scale_per_tensor():
    x = torch.randn(8, 64)
    operand = quantize(x, format="nvfp4_single", amax=torch.tensor(123.0))
    assert operand.amax is None and operand.global_scale is None
    outlier = torch.cat((x, torch.full((1, 64), 1e30)))
    assert torch.equal(quantize(outlier, format="nvfp4_single").codes[:8], operand.codes)
    # 6 * 448 is the largest value; smaller than 6 * 2**-10 is zero.
    assert dequantize(quantize(outlier, format="nvfp4_single"))[8, 0] == 2688
    assert not dequantize(quantize(torch.full((1, 16), 1e-3), format="nvfp4_single")).any()
    amaxes = x.view(8, 4, 16).abs().amax(-1) * (1 / 6)
    assert torch.equal(operand.block_scale.float(), amaxes.to(torch.float8_e4m3fn).float())
