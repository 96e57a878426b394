"""The native kernels in Triton's interpreter, without Blackwell's conversions.

A program costs half a second there, and every 64 rows of a group are four.
"""

import pytest
import torch
from backend_checks import draw
from native_checks import check_native_gemms, check_native_quantize
from support import differing

from nvfp4_titan import RECIPES
from nvfp4_titan.backends import BACKENDS, OperandUse, native_launch, native_ops
from nvfp4_titan.backends.native import STAND_IN
from nvfp4_titan.backends.native_layout import from_oracle
from nvfp4_titan.recipe import OperandFormat

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and overflow
SR, SR_COLS = OperandFormat(rounding="sr"), OperandFormat(rounding="sr", rht=True)
X, X_RHT, W = OperandFormat(), OperandFormat(rht=True), OperandFormat(block=(16, 16))


@pytest.mark.parametrize(
    ("shape", "dtype", "rows", "cols"),
    [
        ((17, 20), torch.float32, SR, SR_COLS),
        ((5, 70), torch.bfloat16, X_RHT, X),
        ((2, 5, 130), torch.bfloat16, W, W),  # two tiles of scales
    ],
    ids=str,
)
def test_native_operands(shape, dtype, rows, cols, monkeypatch):
    # Results must not depend on it: two tiles for the second, one for the others.
    monkeypatch.setattr(native_launch, "MAX_COLUMNS", 64 if shape[-1] == 70 else 256)
    check_native_quantize(STAND_IN, draw(shape, dtype), rows, cols, "cpu")


def test_native_groups():
    offs = torch.tensor([0, 5], dtype=torch.int32)
    check_native_quantize(STAND_IN, draw((7, 20), torch.bfloat16), X, SR_COLS, "cpu", offs)


@pytest.mark.parametrize("shape", [(33, 130), (2, 20, 33)])
def test_native_transposed_weights(shape):
    w, _ = BACKENDS["reference"].quantize(draw(shape, torch.bfloat16), OperandUse(W, 0), None)
    codes, scale = from_oracle(w.codes, w.block_scale, None, columns=False)
    mine = native_launch.transpose_native(codes, scale, shape[-1])
    wanted = native_ops.transposed_by_oracle(codes, scale, shape[-1])
    assert all(differing(a, b) == 0 for a, b in zip(mine, wanted, strict=True))


def test_native_gemms():
    x, w, dy = (draw(shape, torch.float32) for shape in ((5, 20), (24, 20), (5, 24)))
    recipe = RECIPES["nvfp4"].switched(sr=False)  # dear here, and tested above
    check_native_gemms(STAND_IN, x, w, dy, "cpu", 1e-6, recipe=recipe)


def test_native_rows_of_no_group_are_cleared():
    y, offs = torch.ones(5, 1100), torch.tensor([1, 3], dtype=torch.int32)  # two programs a row
    native_launch.clear_tail_native(y, offs)
    assert y[:3].all() and not y[3:].any()
