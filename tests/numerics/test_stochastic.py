"""Stochastic rounding: unbiased within the contract's bound, and a pure function."""

import pytest
import torch

from nvfp4_titan.formats import NVFP4
from nvfp4_titan.numerics import dequantize, quantize
from nvfp4_titan.numerics.quantize import block_amaxes, block_scales


@pytest.mark.parametrize("block", [(1, 16), (16, 16)])
def test_unbiased(block):
    x = torch.randn(64, 64)
    n = 512
    total = torch.zeros_like(x, dtype=torch.float64)
    for seed in range(n):
        total += dequantize(quantize(x, block=block, rounding="sr", seed=seed))
    error = (total / n - x).abs()
    # |mean - x| <= step * (1/256 + z * 0.5 / sqrt(n)), clamped elements left out.
    block_amax = block_amaxes(x, block[0])
    amax = x.abs().amax()
    scale, encode = block_scales(block_amax, amax)
    scaled = (x.view(64, 4, 16) * encode.unsqueeze(-1)).abs()
    grid = torch.tensor(NVFP4.values)
    step = torch.where(scaled < 2, 0.5, torch.where(scaled < 4, 1.0, 2.0))
    step = (step * (scale.float() * amax / 2688).unsqueeze(-1)).view_as(x)
    kept = (scaled <= grid[-1]).view_as(x)
    bound = step * (1 / 256 + 4.5 * 0.5 / n**0.5)
    assert (error <= bound)[kept].all()
    # And the mean error over all elements is the bias of the truncation, no more.
    assert ((total / n - x).abs() / step)[kept].mean() < 1 / 256 + 0.5 / n**0.5


def test_same_call_same_bits():
    x = torch.randn(40, 72)
    first = quantize(x, rounding="sr", seed=11)
    torch.rand(10)  # no hidden generator
    second = quantize(x.clone(), rounding="sr", seed=11)
    other = quantize(x, rounding="sr", seed=12)
    assert torch.equal(first.codes, second.codes)
    assert not torch.equal(first.codes, other.codes)


def test_noise_differs_from_row_to_row():
    x = torch.full((64, 64), 0.3)
    x[:, 0] = 1.0
    codes = quantize(x, rounding="sr", seed=0).codes
    assert len({bytes(row.tolist()) for row in codes}) == 64


def test_noise_is_uncorrelated_between_elements():
    x = torch.full((4096, 16), 0.3)
    x[:, 15] = 1.0
    noise = dequantize(quantize(x, rounding="sr", seed=0))[:, :15] - 0.3
    correlation = torch.corrcoef(noise.T) - torch.eye(15)
    assert correlation.abs().max() < 5 / 4096**0.5


def test_a_shard_is_rounded_like_the_whole():
    x = torch.randn(64, 128)
    whole = quantize(x, rounding="sr", seed=4)
    for rows, blocks in ((slice(16, 48), slice(2, 6)), (slice(0, 64), slice(0, 3))):
        part = quantize(
            x[rows, blocks.start * 16 : blocks.stop * 16],
            rounding="sr",
            seed=4,
            amax=whole.amax,
            first_row=rows.start,
            first_block=blocks.start,
        )
        expected = whole.codes[rows, blocks.start * 8 : blocks.stop * 8]
        assert torch.equal(part.codes, expected)
