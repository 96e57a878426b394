"""The integer kernel against the codecs of deployed models, bit for bit."""

import pytest
import torch

from nvfp4_titan.backends.triton_int_groups import int_groups_triton
from nvfp4_titan.deploy.codecs import INT8_TOKEN, int_group

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and overflow
CODECS = {"int8 rows": INT8_TOKEN, "int4 in 32": int_group(4, 32), "int8 in 48": int_group(8, 48)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CODECS)
def test_equals_the_codec(name, dtype):
    codec = CODECS[name]
    x = torch.randn(37, 96) * torch.logspace(-6, 6, 37)[:, None]
    # Quotients that end in one half, where fp32 and bf16 round to different integers.
    x[1] = torch.arange(96) % 16 - 7.5
    x[2] = torch.linspace(-1, 1, 96)
    x[3], x[4, 5], x[5, 7], x[6, 0] = 0.0, float("nan"), float("inf"), -0.0
    x = x.to(dtype)
    group = codec.integers.group or 96
    eps = torch.finfo(dtype).eps
    numbers = codec.integers
    ours = int_groups_triton(x, group, numbers.largest, eps, numbers.low, numbers.high)
    expected = codec.round_trip(x)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(0), expected.nan_to_num(0))
    assert not torch.equal(ours[0], x[0])
