"""Helpers of the kernels against the oracle's, over what decides: ties, carries, subnormals."""

import pytest
import torch
import triton
import triton.language as tl

from nvfp4_titan.backends import triton_codes
from nvfp4_titan.backends import triton_rounding as kernels
from nvfp4_titan.numerics import rounding
from nvfp4_titan.numerics.philox import philox4x32

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and overflow
SIZE = 1 << 15


def near(centres: torch.Tensor, count: int) -> torch.Tensor:
    """SIZE positive fp32 numbers: the centres, their neighbours, and others up to the largest."""
    bits = centres.float().view(torch.int32)
    close = (bits[:, None] + torch.arange(-count, count + 1, dtype=torch.int32)).flatten()
    numbers = close.clamp(min=0).view(torch.float32)
    rest = torch.rand(SIZE - numbers.numel()) ** 4 * centres.max()
    return torch.cat((numbers, rest))


@triton.jit
def _e4m3_kernel(x_ptr, code_ptr, value_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    code = kernels.e4m3_rtne(tl.load(x_ptr + index), 0)
    tl.store(code_ptr + index, code)
    tl.store(value_ptr + index, kernels.e4m3_value(code))


def test_e4m3():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = near(torch.cat((codes, (codes[1:] + codes[:-1]) / 2)), 8)
    x[-4:] = torch.tensor([float("nan"), float("inf"), 1e38, 464.0])
    code, value = torch.empty(SIZE, dtype=torch.int32), torch.empty(SIZE)
    _e4m3_kernel[(1,)](x, code, value, SIZE)
    expected = rounding.e4m3_rtne(x)
    assert torch.equal(code, expected.view(torch.uint8).int())
    assert torch.equal(value.nan_to_num(-1), expected.float().nan_to_num(-1))


@triton.jit
def _e2m1_kernel(x_ptr, random_ptr, rtne_ptr, sr_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    word = tl.load(random_ptr + index).to(tl.uint32, bitcast=True)
    tl.store(rtne_ptr + index, triton_codes.e2m1(x, 1.0, 0, 0, False, True, 0))
    tl.store(sr_ptr + index, triton_codes.e2m1(x, 1.0, word, index & 3, True, True, 0))


def test_e2m1():
    x = near(torch.arange(0, 6.0625, 1 / 512), 2).clamp(max=6)
    word = torch.randint(-(2**31), 2**31, (SIZE,), dtype=torch.int64).int()
    random = (word >> 8 * (torch.arange(SIZE) & 3)) & 0xFF
    signed = torch.where(torch.arange(SIZE) % 2 == 0, x, -x)
    rtne, sr = torch.empty(SIZE, dtype=torch.int16), torch.empty(SIZE, dtype=torch.int16)
    _e2m1_kernel[(1,)](signed, word, rtne, sr, SIZE)
    sign = torch.signbit(signed).int() << 15
    for lanes, code in (
        (rtne, rounding.e2m1_rtne(x)),
        (sr, rounding.e2m1_sr(x, random.short())),
    ):
        assert torch.equal(lanes.int() & 0xFFFF, code.int() << 6 | sign)


@triton.jit
def _bf16_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(y_ptr + index, kernels.round_bf16(tl.load(x_ptr + index), 0))


def test_bf16():
    x = torch.randint(-(2**31), 2**31, (SIZE,), dtype=torch.int64).int().view(torch.float32)
    y = torch.empty(SIZE)
    _bf16_kernel[(1,)](x, y, SIZE)
    assert torch.equal(y.nan_to_num(1.5), x.bfloat16().float().nan_to_num(1.5))


@triton.jit
def _philox_kernel(words_ptr, key_low, key_high, stream, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    words = kernels.philox(index * 3, 5, index & 0x3FFF, stream, key_low, key_high)
    for i in tl.static_range(4):
        tl.store(words_ptr + i * SIZE + index, words[i].to(tl.int32, bitcast=True))


def test_philox():
    words = torch.empty(4, 64, dtype=torch.int32)
    _philox_kernel[(1,)](words, -2, 77, 4, 64)
    index = torch.arange(64)
    counter = (index * 3, torch.full_like(index, 5), index & 0x3FFF, torch.full_like(index, 4))
    expected = torch.stack(philox4x32(counter, (2**32 - 2, 77)))
    assert torch.equal(words.long() & 0xFFFFFFFF, expected)
