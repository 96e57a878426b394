"""Operands and GEMMs of the other formats: the oracle's bits, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
import triton
from backend_checks import OTHER_FORMATS, check_gemms, check_quantize, draw, uses
from support import TOLERANCES, differing

from nvfp4_titan import RECIPES
from nvfp4_titan.backends import BACKENDS, triton_launch
from nvfp4_titan.errors import UnsupportedError
from nvfp4_titan.formats import MXFP8, NVFP4, NVFP4_46
from nvfp4_titan.recipe import OperandFormat

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and overflow
needs_loops = pytest.mark.skipif(
    triton.__version__.startswith("3.6."),
    reason="Triton 3.6's interpreter takes no loop bound from a tensor with numpy 2.4",
)
TRITON = BACKENDS["triton"]
X, W = OperandFormat(), OperandFormat(block=(16, 16))
MX, MX_FLOOR = OTHER_FORMATS[-3:-1]
BEST, BEST_SR, BEST_W = (f for f in OTHER_FORMATS if f.format == NVFP4_46)
SINGLE_SR = next(f for f in OTHER_FORMATS if not f.format.tensor_scale and f.rounding == "sr")


@pytest.mark.parametrize("fmt", OTHER_FORMATS, ids=str)
def test_every_format(fmt):
    check_quantize(draw((37, 36), torch.bfloat16), fmt, fmt, "cpu")


@pytest.mark.parametrize("pair", [(X, MX), (MX, X), (W, MX), (BEST, BEST_SR), (MX_FLOOR, None)])
def test_two_formats_in_one_read(pair):
    check_quantize(draw((17, 40), torch.float32), *pair, "cpu")


def test_squares_that_are_higher_than_the_other_use_s_blocks():
    check_quantize(draw((40, 36), torch.bfloat16), OTHER_FORMATS[-1], X, "cpu")


@pytest.mark.parametrize("fmt", [MX, MX_FLOOR], ids=str)
def test_every_exponent_of_mxfp8(fmt):
    # A block per exponent of the largest: at 448 * 2**k, its neighbours and in between.
    bits = torch.arange(0, 256).clamp(max=254)[:, None] << 23
    mantissa = torch.tensor([0, 1, 0x5FFFFF, 0x600000, 0x600001, 0x600002, 0x7FFFFF, 12345])
    largest = (bits | mantissa).int().view(torch.float32).reshape(-1, 1)
    shares = torch.cat((torch.ones(1), torch.linspace(-1, 1, 30), torch.tensor([2.0**-12])))
    check_quantize((largest * shares).view(-1, 512), fmt, None, "cpu")


def test_every_code_of_mxfp8():
    # Each is halfway between two codes, at them, or next to that.
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat((codes, (codes[1:] + codes[:-1]) / 2)).view(torch.int32)
    x = (x[:, None] + torch.tensor([-1, 0, 1])).clamp(min=0).int().view(torch.float32).flatten()
    x = torch.nn.functional.pad(x, (0, -len(x) % 31)).view(-1, 31)
    x = torch.cat((torch.full((len(x), 1), 448.0), x), dim=1)
    check_quantize(torch.cat((x, -x)), MX, None, "cpu")
    check_quantize(torch.cat((x, -x)).T.contiguous(), None, MX, "cpu")


@pytest.mark.parametrize("special", [0.0, float("nan"), -float("inf"), 1e-45, 3e38])
def test_special_values(special):
    for base, pair in ((0.0, (MX, BEST_W)), (1.0, (SINGLE_SR, MX_FLOOR)), (1.0, (BEST, MX))):
        x = draw((16, 33), torch.float32) * base
        x[3, 5] = special
        check_quantize(x, *pair, "cpu")


def test_groups_and_experts():
    offs = torch.tensor([0, 5, 22], dtype=torch.int32)
    t = draw((23, 20), torch.bfloat16) * torch.logspace(-3, 0, 23)[:, None]
    for pair in ((X, MX), (BEST, BEST_SR)):
        check_quantize(t.bfloat16(), *pair, "cpu", offs)
    w = draw((2, 17, 20), torch.bfloat16) * torch.tensor([1.0, 0.0])[:, None, None]
    for pair in ((W, MX), (BEST_W, BEST_W)):
        check_quantize(w.bfloat16(), *pair, "cpu")


def test_a_shard_counts_from_its_place():
    x, amax = draw((20, 37), torch.bfloat16), torch.tensor([3.0, 5.0])
    check_quantize(x, SINGLE_SR, BEST_SR, "cpu", amax=amax, offset=(32, 48))


def test_results_do_not_depend_on_the_tile(monkeypatch):
    x, results = draw((20, 72), torch.bfloat16), []
    for columns in (64, 256):
        monkeypatch.setattr(triton_launch, "MAX_COLUMNS", columns)
        monkeypatch.setattr(triton_launch, "_QUANTIZED", triton_launch.Plans())
        results.append(TRITON.quantize(x, *uses(BEST, MX)))
    for mine, first in zip(*results, strict=True):
        assert differing(mine.codes.contiguous(), first.codes.contiguous()) == 0
        assert torch.equal(mine.values, first.values)


def test_no_amax_is_taken_where_none_is_needed(monkeypatch):
    monkeypatch.setattr(triton_launch, "_amax_kernel", None)
    x = draw((16, 32), torch.bfloat16)
    rows, cols = TRITON.quantize(x, *uses(MX, SINGLE_SR), torch.tensor(1))
    assert rows.amax is None and cols.amax is None
    assert not TRITON.amax(x, *uses(MX, None)).any()


def test_what_is_not_there_is_refused():
    with pytest.raises(UnsupportedError, match="lacks mxfp8:1x32:rtne:rht; use|lacks mxfp8"):
        TRITON.quantize(torch.ones(32, 32), *uses(OperandFormat(MXFP8, (1, 32), rht=True), None))


@pytest.mark.parametrize("fmt", [X, BEST, OperandFormat(NVFP4.single_level()), MX], ids=str)
def test_dequantize(fmt):
    t, reference = draw((17, 36), torch.float32), BACKENDS["reference"]
    rows, _ = TRITON.quantize(t, *uses(fmt, None))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(TRITON.dequantize(rows, dtype), reference.dequantize(rows, dtype))


def test_dequantize_groups():
    t, offs = draw((17, 20), torch.float32), torch.tensor([3, 3, 15], dtype=torch.int32)
    operand, _ = TRITON.quantize(t, *uses(X, None), offs=offs)
    mine, wanted = (BACKENDS[n].dequantize(operand, t.dtype, offs) for n in ("triton", "reference"))
    assert torch.equal(mine, wanted)


BF16 = torch.bfloat16, TOLERANCES["bf16_output"]
# Dequantized operands are rounded to the dtype: in bf16 they are not the reference's in fp32.
FP32 = torch.float32, 1e-6
LINEARS = {
    "nvfp4_46": BF16,
    "nvfp4_mxfp8": BF16,
    "nvfp4_mxfp8_dequantized": FP32,
    "nvfp4_bf16": FP32,
    "bf16_nvfp4": BF16,
    "mxfp8": BF16,
}


@pytest.mark.parametrize("name", LINEARS)
def test_linear(name):
    dtype, tolerance = LINEARS[name]
    x, w, dy = (torch.randn(s).to(dtype) for s in ((20, 37), (24, 37), (20, 24)))
    check_gemms(x, w, dy, "cpu", tolerance, recipe=name)


@needs_loops
def test_grouped():
    offs = torch.tensor([5, 5, 22], dtype=torch.int32)
    x, w, dy = (torch.randn(s).bfloat16() for s in ((24, 20), (3, 16, 20), (24, 16)))
    check_gemms(x, w, dy, "cpu", TOLERANCES["bf16_output"], offs, "nvfp4_mxfp8")


def test_linear_in_a_single_level_of_scales():
    # A GEMM of two formats: dy keeps its scale per tensor.
    x, w, dy = (torch.randn(s) for s in ((20, 37), (24, 37), (20, 24)))
    check_gemms(x, w, dy, "cpu", 1e-6, recipe=RECIPES["nvfp4"].switched(tensor_scale=False))


def test_packed_and_values_multiply_to_the_same():
    t = torch.randn(20, 37)
    rows, cols = TRITON.quantize(t, *uses(MX, MX))
    packed = [replace(o, values=None) for o in (rows, cols)]
    weight, _ = TRITON.quantize(torch.randn(8, 37), *uses(MX, None))
    for dtype in (torch.float32, torch.bfloat16):
        results = [
            (TRITON.mm(r, weight, 8, dtype), TRITON.wgrad(c, c, dtype))
            for r, c in ((rows, cols), packed)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
