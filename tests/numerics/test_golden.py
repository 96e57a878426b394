"""Bit equality with vectors from TransformerEngine's own reference."""

import pytest
import torch
from support import TOLERANCES, differing, golden, relative_error

from nvfp4_titan import RECIPES
from nvfp4_titan.numerics import dequantize, quantize
from nvfp4_titan.training import linear

CASES = sorted(n[:-2] for n in golden() if n.endswith(".x") and not n.startswith("linear"))
VARIANTS = {"": {}, ".rht_t": {"rht": True}, ".w16": {"block": (16, 16)}}


def test_cases_found():
    assert len(CASES) == 12


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_equals_te(case, variant, dtype):
    data = golden()
    x = data[f"{case}.x"].to(dtype)  # bf16 values, so both dtypes hold the same
    operand = quantize(x.T if variant == ".rht_t" else x, **VARIANTS[variant])
    prefix = case + variant
    assert differing(operand.block_scale, data[f"{prefix}.block_scale"]) == 0
    amax = data.get(f"{prefix}.amax", data[f"{case}.amax"])
    assert operand.amax == amax[0]
    # Where the block scale underflows to 0, TE's codes saturate: there the values count.
    nonzero = (data[f"{prefix}.block_scale"] != 0).repeat_interleave(8, dim=1)
    assert int(((operand.codes != data[f"{prefix}.codes"]) & nonzero).sum()) == 0
    assert not operand.codes[~nonzero].any()
    if f"{prefix}.dequant" in data:
        assert torch.equal(dequantize(operand), data[f"{prefix}.dequant"])


def test_linear_equals_te():
    data = {n: golden()[f"linear_rtne.{n}"] for n in ("x", "w", "dy", "y", "dx", "dw")}
    x, w = data["x"].clone().requires_grad_(), data["w"].clone().requires_grad_()
    y = linear(x, w, recipe=RECIPES["nvfp4"].switched(sr=False), backend="reference")
    y.backward(data["dy"])
    for name, actual in (("y", y), ("dx", x.grad), ("dw", w.grad)):
        assert relative_error(actual, data[name]) < TOLERANCES["golden_gemm"], name
