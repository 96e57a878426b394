"""The native backend on a GPU: refused before Blackwell, its kernels and call path everywhere."""

import pytest
import torch
from backend_checks import FORMATS, TOKEN_FORMATS, draw
from native_checks import check_native_gemms, check_native_quantize
from support import TOLERANCES

from nvfp4_titan.backends import BACKENDS, resolve
from nvfp4_titan.backends.native import STAND_IN
from nvfp4_titan.errors import UnsupportedError

pytestmark = pytest.mark.gpu
OFFS = torch.tensor([0, 130, 135, 300], dtype=torch.int32)
SHAPES = ((512, 1024), (513, 1000), (33, 40), (130, 70))


def test_native_on_hopper_is_an_error_and_auto_picks_triton():
    if torch.cuda.get_device_capability() >= (10, 0):
        assert resolve("auto").name == "native"
        return
    with pytest.raises(UnsupportedError, match="no FP4 tensor cores.*backend = 'triton' emulates"):
        resolve("native")
    assert resolve("auto").name == "triton"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_native_stand_in_operands(shape, fmt):
    check_native_quantize(STAND_IN, draw(shape, torch.bfloat16), fmt, fmt, "cuda")


@pytest.mark.parametrize("fmt", TOKEN_FORMATS, ids=str)
def test_native_stand_in_groups_and_experts(fmt):
    check_native_quantize(STAND_IN, draw((303, 200), torch.bfloat16), fmt, fmt, "cuda", OFFS)
    check_native_quantize(STAND_IN, draw((3, 130, 200), torch.bfloat16), fmt, fmt, "cuda")


@pytest.mark.parametrize("offs", [None, OFFS], ids=["linear", "grouped"])
def test_native_stand_in_gemms(offs):
    experts = () if offs is None else (4,)
    shapes = ((303, 200), (*experts, 144, 200), (303, 144))
    tensors = (draw(shape, torch.bfloat16) for shape in shapes)
    check_native_gemms(STAND_IN, *tensors, "cuda", TOLERANCES["bf16_output"], offs)


@pytest.mark.sm100
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_native_operands_on_blackwell(shape, fmt):
    backend = BACKENDS["native_software_sr"]
    check_native_quantize(backend, draw(shape, torch.bfloat16), fmt, fmt, "cuda")


@pytest.mark.sm100
@pytest.mark.parametrize("offs", [None, OFFS], ids=["linear", "grouped"])
def test_native_gemms_on_blackwell(offs):
    experts = () if offs is None else (4,)
    shapes = ((303, 200), (*experts, 144, 200), (303, 144))
    tensors = (draw(shape, torch.bfloat16) for shape in shapes)
    backend = BACKENDS["native_software_sr"]
    check_native_gemms(backend, *tensors, "cuda", TOLERANCES["bf16_output"], offs)
