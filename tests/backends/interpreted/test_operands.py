"""The kernels' operands equal the oracle's bit for bit, in Triton's interpreter."""

import pytest
import torch
from backend_checks import DTYPES, FORMATS, TOKEN_FORMATS, check_quantize, draw, uses
from hypothesis import given, settings
from hypothesis import strategies as st
from support import same_operand

from nvfp4_titan.backends import BACKENDS, triton_launch
from nvfp4_titan.recipe import OperandFormat

SIZES = st.integers(1, 34)
X, SR = OperandFormat(), OperandFormat(rounding="sr")
X_COLS, SR_COLS = OperandFormat(rht=True), OperandFormat(rounding="sr", rht=True)
W = OperandFormat(block=(16, 16))
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and overflow


@settings(max_examples=4, deadline=None)
@given(
    SIZES,
    SIZES,
    DTYPES,
    st.sampled_from([None, *FORMATS]),
    st.sampled_from(FORMATS),
    st.floats(-38, 37.9),
    st.integers(0, 9),
)
def test_any_shape_format_and_magnitude(rows, columns, dtype, row_use, col_use, exponent, seed):
    check_quantize(draw((rows, columns), dtype, exponent, seed), row_use, col_use, "cpu")


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_format(fmt):
    check_quantize(draw((17, 20), torch.bfloat16), fmt, fmt, "cpu")


@pytest.mark.parametrize(
    "special",
    [0.0, float("nan"), -float("inf"), 1e-45, 3e38],
)
def test_special_values(special):
    for base, pair in ((0.0, (X, SR_COLS)), (1.0, (W, X_COLS))):
        x = draw((16, 20), torch.float32) * base
        x[3, 5] = special
        check_quantize(x, *pair, "cpu")


@pytest.mark.parametrize("special", [2.0, float("inf"), float("nan")])
def test_an_amax_from_outside(special):
    # Smaller than what a block holds, as it never should be: saturates, but NaN and Inf stay.
    x = draw((16, 20), torch.float32)
    x[3, 5] = special
    check_quantize(x, SR, X_COLS, "cpu", amax=torch.tensor([0.25, 0.5]))


def test_columns_of_a_wider_tensor():
    """Whole tiles, whose width is compiled in, but rows that are further apart."""
    x = draw((32, 64), torch.bfloat16)[:, :32]
    check_quantize(x, X, X_COLS, "cpu")
    check_quantize(x, W, SR_COLS, "cpu")


def test_a_shard_counts_from_its_place():
    x = draw((20, 37), torch.bfloat16)
    check_quantize(x, SR, SR_COLS, "cpu", offset=(32, 48))


def test_subnormal_tensors():
    for exponent in (-44, -38):
        x = (draw((16, 20), torch.float64) * 10.0**exponent).float()
        check_quantize(x, SR, X, "cpu")
        check_quantize(x.bfloat16(), SR, X_COLS, "cpu")


def test_results_do_not_depend_on_the_tile(monkeypatch):
    x = draw((17, 36), torch.bfloat16)
    results = []
    for columns in (16, 64):
        monkeypatch.setattr(triton_launch, "MAX_COLUMNS", columns)
        monkeypatch.setattr(triton_launch, "_QUANTIZED", triton_launch.Plans())
        results.append(BACKENDS["triton"].quantize(x, *uses(SR, SR_COLS), torch.tensor(3)))
    for operands in results[1:]:
        for mine, first in zip(operands, results[0], strict=True):
            assert same_operand(mine, first) and torch.equal(mine.values, first.values)


@pytest.mark.parametrize("sizes", [[0, 5, 0, 17], [0, 0]])
def test_groups(sizes):
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    t = draw((sum(sizes) + 3, 20), torch.bfloat16) * torch.logspace(-3, 0, sum(sizes) + 3)[:, None]
    check_quantize(t.bfloat16(), SR, SR_COLS, "cpu", offs)


@settings(max_examples=2, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=3),
    st.integers(1, 34),
    st.sampled_from(TOKEN_FORMATS),
    st.sampled_from(TOKEN_FORMATS),
)
def test_any_groups(sizes, columns, rows, cols):
    offs = torch.tensor(sizes).cumsum(0).to(torch.int32)
    check_quantize(draw((sum(sizes) + 2, columns), torch.bfloat16), rows, cols, "cpu", offs)


@pytest.mark.parametrize("fmt", [W, X, SR], ids=str)
def test_experts(fmt):
    w = draw((2, 17, 20), torch.bfloat16) * torch.tensor([1.0, 0.0])[:, None, None]
    check_quantize(w.bfloat16(), fmt, fmt, "cpu")


def test_shards_of_groups_and_experts():
    offs = torch.tensor([5, 5, 22], dtype=torch.int32)
    amax = torch.tensor([[4.0, 1.0, 9.0], [8.0, 1.0, 7.0]])
    t = draw((24, 20), torch.bfloat16)
    check_quantize(t, SR, SR_COLS, "cpu", offs, amax=amax, offset=(0, 48))
    w = draw((3, 17, 20), torch.bfloat16)
    check_quantize(w, SR, W, "cpu", amax=amax, offset=(32, 48))


@pytest.mark.parametrize("shape", [(0, 20), (1, 1), (1, 33), (33, 1)])
def test_small_and_empty(shape):
    check_quantize(torch.ones(shape), X, X_COLS, "cpu")


def test_amax_alone():
    x = draw((20, 37), torch.bfloat16)
    for pair in ((SR, SR_COLS), (X, None), (None, X_COLS)):
        mine, wanted = (BACKENDS[n].amax(x, *uses(*pair)) for n in ("triton", "reference"))
        assert torch.equal(mine, wanted)
    offs = torch.tensor([5, 5, 18], dtype=torch.int32)
    for t, ends in ((x, offs), (draw((3, 17, 20), torch.bfloat16), None)):
        backends = (BACKENDS[n] for n in ("triton", "reference"))
        mine, wanted = (b.amax(t, *uses(SR, X_COLS), ends) for b in backends)
        assert torch.equal(mine, wanted)


def test_strided_input():
    x = draw((20, 40), torch.bfloat16)
    for view in (x[:, :24], x[::2], x[:10].T):
        check_quantize(view, X, X_COLS, "cpu")
