"""The kernels' PTX forms equal their portable forms on a GPU, over every number that decides."""

import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import triton
import triton.language as tl

from nvfp4_titan.backends import triton_call, triton_codes, triton_launch, triton_mxfp8
from nvfp4_titan.backends import triton_rounding as kernels

pytestmark = pytest.mark.gpu

SIZE = 1024


@triton.jit
def _kernel(
    x_ptr, random_ptr, forms_ptr, count, WHAT: tl.constexpr, PTX: tl.constexpr, SIZE: tl.constexpr
):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    word = tl.load(random_ptr + index).to(tl.uint32, bitcast=True)
    one = tl.full((SIZE,), 1.0, tl.float32)
    for form in tl.static_range(2):
        if WHAT == "bf16":
            result = kernels.bits(kernels.round_bf16(x, PTX * form))
        elif WHAT == "e4m3":
            result = kernels.e4m3_rtne(x, PTX * form)
        elif WHAT == "e4m3 codes":
            result = triton_mxfp8.e4m3_codes(x, one, PTX * form).to(tl.int32)
        elif WHAT == "e4m3 values":
            result = triton_mxfp8.e4m3_values(x, one, one, PTX * form).to(tl.int32)
        elif WHAT == "reciprocal":
            result = kernels.bits(kernels.reciprocal(x, 1.0, PTX * form))
        elif WHAT == "pack":
            lanes = (x.to(tl.int32, bitcast=True) & 0x81C0).to(tl.int16)
            other = (word & 0x81C0).to(tl.int16)
            result = triton_codes.pack_codes(lanes, other, PTX * form).to(tl.int32)
        elif WHAT == "unpack":
            # Sum of different shares of both: one differing bit shows.
            factor = triton_codes.gemm_factor_bits(one * 1.625, 1024.0)
            byte = (word & 0xFF).to(tl.uint8)
            even, odd = triton_codes.unpack_codes(byte, factor, PTX * form)
            result = even.to(tl.int32) * 65599 + odd.to(tl.int32)
        else:
            lanes = triton_codes.e2m1(
                x, one, word, index & 3, WHAT == "sr", WHAT != "rtne of values", PTX * form
            )
            result = lanes.to(tl.int32)
            if WHAT == "rtne of values":
                result = tl.where(result & 0x7FFF == 0, 0, result)
        tl.store(forms_ptr + form * count + index, result)


def differing(what: str, x: torch.Tensor) -> int:
    """Numbers whose PTX and portable results differ; x: fp32, a multiple of SIZE."""
    random = torch.randint(-(2**31), 2**31, x.shape, dtype=torch.int64, device="cuda").int()
    forms = torch.empty((2, x.numel()), dtype=torch.int32, device="cuda")
    level = triton_launch.ptx_level(x.device)
    _kernel[(x.numel() // SIZE,)](
        x, random, forms, x.numel(), what, level, SIZE, **triton_call.EXACT
    )
    return int((forms[0] != forms[1]).sum())


def numbers(first: int, last: int) -> torch.Tensor:
    """All fp32 numbers between two bit patterns, padded to a multiple of SIZE with the last."""
    bits = torch.arange(first, last, dtype=torch.int64, device="cuda").to(torch.int32)
    return torch.cat((bits, bits[-1:].expand(-bits.numel() % SIZE))).view(torch.float32)


def bits(x: float) -> int:
    return int(torch.tensor(x).view(torch.int32))


def test_reciprocal_of_every_mantissa():
    for exponent in (-20, -1, 0, 9):
        assert (
            differing("reciprocal", numbers(bits(2.0**exponent), bits(2.0 ** (exponent + 1)))) == 0
        )


def test_e4m3_of_every_number():
    # From below half the smallest subnormal to above what saturates.
    for exponent in range(-12, 10):
        assert differing("e4m3", numbers(bits(2.0**exponent), bits(2.0 ** (exponent + 1)))) == 0
    special = torch.tensor([0.0, float("nan"), float("inf"), 1e-45, 3e38], device="cuda")
    assert differing("e4m3", special.repeat(SIZE)) == 0


@pytest.mark.parametrize("what", ["rtne", "rtne of values", "sr"])
def test_e2m1_of_every_number(what):
    for sign in (1, -1):
        assert differing(what, sign * torch.zeros(SIZE, device="cuda")) == 0
        for exponent in (*range(-16, 4), 20, -126, -140):
            x = numbers(bits(2.0**exponent), bits(2.0 ** (exponent + 1)))
            assert differing(what, sign * x) == 0


@pytest.mark.parametrize("what", ["pack", "unpack"])
def test_codes(what):
    x = torch.randint(-(2**31), 2**31, (1 << 20,), device="cuda", dtype=torch.int64).int()
    assert differing(what, x.view(torch.float32)) == 0


def test_bf16_of_many_numbers():
    x = torch.randint(-(2**31), 2**31, (1 << 26,), device="cuda", dtype=torch.int64)
    x = x.to(torch.int32).view(torch.float32)
    assert differing("bf16", torch.where(x.isnan(), 1.0, x)) == 0


@pytest.mark.parametrize("what", ["e4m3 codes", "e4m3 values"])
def test_mxfp8_elements_of_every_number(what):
    for sign in (1, -1):
        for exponent in (*range(-12, 10), 20, -126, -140):
            x = numbers(bits(2.0**exponent), bits(2.0 ** (exponent + 1)))
            assert differing(what, sign * x) == 0
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45, 3e38], device="cuda")
    assert differing(what, special.repeat(SIZE)) == 0
