"""The native kernels in Triton's interpreter, without Blackwell's conversions."""

import pytest
import torch
from backend_checks import draw
from native_checks import check_native_gemms, check_native_quantize
from support import differing

from nvfp4_titan.backends import OperandUse, native_launch, native_ops
from nvfp4_titan.backends.native import STAND_IN
from nvfp4_titan.recipe import OperandFormat

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and overflow
SR, SR_COLS = OperandFormat(rounding="sr"), OperandFormat(rounding="sr", rht=True)
X, X_COLS, W = OperandFormat(), OperandFormat(rht=True), OperandFormat(block=(16, 16))


@pytest.mark.parametrize(
    ("shape", "rows", "cols"),
    [((17, 20), SR, SR_COLS), ((130, 33), X, X_COLS), ((2, 5, 70), W, W)],
    ids=str,
)
def test_native_operands(shape, rows, cols):
    check_native_quantize(STAND_IN, draw(shape, torch.bfloat16), rows, cols, "cpu")


def test_native_groups():
    offs = torch.tensor([0, 5], dtype=torch.int32)
    check_native_quantize(STAND_IN, draw((7, 20), torch.bfloat16), X, SR_COLS, "cpu", offs)


def test_native_operands_do_not_depend_on_the_tile(monkeypatch):
    x, uses = draw((7, 70), torch.float32), (OperandUse(X, 1), OperandUse(X_COLS, 4))
    results = []
    for columns in (64, 128):
        monkeypatch.setattr(native_launch, "MAX_COLUMNS", columns)
        operands = STAND_IN.quantize(x, *uses)
        results.append([t for o in operands for t in (o.codes, o.block_scale)])
    assert all(differing(a, b) == 0 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(33, 70), (2, 20, 33)])
def test_native_transposed_weights(shape):
    w, _ = STAND_IN.quantize(draw(shape, torch.bfloat16), OperandUse(W, 0), None)
    mine = native_launch.transpose_native(w.codes, w.block_scale, shape[-1])
    wanted = native_ops.transposed_by_oracle(w.codes, w.block_scale, shape[-1])
    assert all(differing(a, b) == 0 for a, b in zip(mine, wanted, strict=True))


def test_native_gemms():
    x, w, dy = (draw(shape, torch.float32) for shape in ((5, 20), (24, 20), (5, 24)))
    check_native_gemms(STAND_IN, x, w, dy, "cpu", 1e-6)


def test_native_rows_of_no_group_are_cleared():
    y, offs = torch.ones(5, 20), torch.tensor([1, 3], dtype=torch.int32)
    native_launch.clear_tail_native(y, offs)
    assert y[:3].all() and not y[3:].any()
