"""The oracle on a GPU: the CPU's bits, GEMMs within a bf16 rounding, nothing that waits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TOLERANCES, relative_error, same_operand

from nvfp4_titan.numerics import QuantizedOperand, dequantize, quantize
from nvfp4_titan.training import NVFP4Linear, grouped_mm, key_tensor, linear

pytestmark = pytest.mark.gpu

VARIANTS = [
    {},
    {"rounding": "sr", "seed": 123456789012345},
    {"rht": True},
    {"rht": True, "rounding": "sr", "seed": -5},
    {"block": (16, 16)},
    {"block": (16, 16), "rounding": "sr", "seed": 7},
]


def to_cpu(operand: QuantizedOperand) -> QuantizedOperand:
    fields = (operand.codes, operand.block_scale, operand.amax)
    return QuantizedOperand(*(t.cpu() for t in fields), operand.K, operand.format)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(VARIANTS),
    st.floats(-30, 30),
    st.integers(0, 99),
)
def test_same_bits_as_the_cpu(rows, columns, dtype, kwargs, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    limit = torch.finfo(dtype).max
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 10.0**exponent
    x = x.clamp(-limit, limit).to(dtype)
    cpu, gpu = quantize(x, **kwargs), quantize(x.cuda(), **kwargs)
    assert same_operand(to_cpu(gpu), cpu)
    assert torch.equal(dequantize(gpu).cpu(), dequantize(cpu))


def gemms(function, x, w, dy):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = function(x, w)
    y.backward(dy)
    return y.detach(), x.grad, w.grad


def test_linear_and_grouped_equal_the_cpu_within_rounding():
    x, w, dy = torch.randn(512, 384), torch.randn(256, 384), torch.randn(512, 256)
    key = key_tensor(1, "layer")
    plain = lambda x, w: linear(x, w, backend="reference", key=key)  # noqa: E731
    cpu = gemms(plain, x, w, dy)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, TOLERANCES["bf16_output"])):
        if dtype == torch.bfloat16:
            cpu = gemms(plain, *(t.bfloat16().float() for t in (x, w, dy)))
        gpu = gemms(plain, *(t.to("cuda", dtype) for t in (x, w, dy)))
        for actual, expected in zip(gpu, cpu, strict=True):
            assert relative_error(actual.cpu(), expected) < tolerance
    offs = torch.tensor([100, 100, 333, 500], dtype=torch.int32)
    w = torch.randn(4, 256, 384)
    grouped = lambda x, w: grouped_mm(  # noqa: E731
        x, w.transpose(1, 2), offs.to(x.device), backend="reference", key=key
    )
    cpu, gpu = gemms(grouped, x, w, dy), gemms(grouped, x.cuda(), w.cuda(), dy.cuda())
    for actual, expected in zip(gpu, cpu, strict=True):
        assert relative_error(actual.cpu(), expected) < 1e-5


def test_nothing_waits_for_the_device():
    x = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(4, 64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    offs = torch.tensor([10, 100, 100, 250], dtype=torch.int32, device="cuda")
    dy = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16)
    module = NVFP4Linear(128, 64, device="cuda", dtype=torch.bfloat16, backend="reference")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x).backward(dy)
        grouped_mm(x, w.transpose(1, 2), offs, backend="reference").backward(dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_by_inductor_equals_eager():
    module = NVFP4Linear(128, 64, device="cuda", dtype=torch.bfloat16, backend="reference")
    compiled = torch.compile(module, fullgraph=True)
    x, dy = (torch.randn(96, n, device="cuda", dtype=torch.bfloat16) for n in (128, 64))
    results = []
    for function in (module, compiled):
        module.zero_grad()
        leaf = x.detach().requires_grad_()
        function(leaf).backward(dy)
        results.append((leaf.grad, module.weight.grad.clone(), module.bias.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
