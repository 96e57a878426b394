"""E2M1 and E4M3 rounding against NVIDIA's own host code, and against hand-worked values."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from nvfp4_titan.formats import NVFP4
from nvfp4_titan.numerics.rounding import (
    decode_codes,
    e2m1_rtne,
    e2m1_sr,
    e4m3_rtne,
    pack_codes,
    unpack_codes,
)

PROGRAM = r"""
#include <cuda_fp4.h>
#include <cuda_fp8.h>
#include <cstdio>
int main() {
  float v;
  while (fread(&v, 4, 1, stdin) == 1) {
    unsigned char out[2] = {
        (unsigned char)__nv_cvt_float_to_fp4(v, __NV_E2M1, cudaRoundNearest),
        (unsigned char)__nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3)};
    fwrite(out, 1, 2, stdout);
  }
}
"""


@pytest.fixture(scope="module")
def nvidia_codes(tmp_path_factory):
    """A function: fp32 tensor to (E2M1 codes, E4M3 codes) by NVIDIA's cuda_fp4.h and cuda_fp8.h."""
    assert shutil.which("g++"), "this test builds NVIDIA's conversions: install g++"
    folder = tmp_path_factory.mktemp("nvidia")
    (folder / "convert.cpp").write_text(PROGRAM)
    targets = [p for root in sys.path if root for p in Path(root).glob("nvidia/**/nv/target")]
    assert targets, "nvidia-cuda-cccl's headers are missing: pip install -e .[dev]"
    includes = [
        Path(triton.__file__).parent / "backends/nvidia/include",
        targets[0].parent.parent,
    ]
    flags = [f"-I{path}" for path in includes]
    program = folder / "convert"
    subprocess.run(["g++", "-O1", *flags, folder / "convert.cpp", "-o", program], check=True)

    def convert(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        done = subprocess.run(
            [program], input=values.numpy().tobytes(), capture_output=True, check=True
        )
        codes = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8).view(-1, 2)
        return codes[:, 0], codes[:, 1]

    return convert


def finite_bf16() -> torch.Tensor:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return every[every.isfinite()].to(torch.float32)


def around(points: torch.Tensor) -> torch.Tensor:
    """Each point, and 8 fp32 neighbours on either side."""
    bits = points.view(torch.int32).unsqueeze(1) + torch.arange(-8, 9, dtype=torch.int32)
    return bits.flatten().view(torch.float32)


def e2m1_points() -> torch.Tensor:
    grid = torch.tensor(NVFP4.values[1:])
    middles = (grid[1:] + grid[:-1]) / 2
    return torch.cat((grid, middles, torch.tensor([0.25])))


def e4m3_points() -> torch.Tensor:
    codes = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    return torch.cat((codes, (codes[1:] + codes[:-1]) / 2, codes[:1] / 2))


def test_e2m1_equals_nvidia(nvidia_codes):
    points = around(e2m1_points())
    values = torch.cat((finite_bf16(), points, -points))
    magnitude = values.abs().clamp(max=6)
    ours = e2m1_rtne(magnitude) | (torch.signbit(values).to(torch.uint8) << 3)
    expected, _ = nvidia_codes(values)
    assert int((ours != expected).sum()) == 0


def test_e4m3_equals_nvidia(nvidia_codes):
    bf16 = finite_bf16()
    values = torch.cat((bf16[bf16 >= 0], around(e4m3_points())))
    _, expected = nvidia_codes(values)
    assert int((e4m3_rtne(values).view(torch.uint8) != expected).sum()) == 0


def test_e2m1_ties_go_to_even():
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = torch.tensor([0, 1, 1, 2, 2, 4, 4], dtype=torch.float32)
    assert torch.equal(torch.tensor(NVFP4.values)[e2m1_rtne(values).long()], expected)


def test_e4m3_nan_and_overflow():
    codes = e4m3_rtne(torch.tensor([float("nan"), float("inf"), 449.0, 1e9])).to(torch.float32)
    assert codes[0].isnan() and (codes[1:] == 448).all()


def test_sr_goes_up_exactly_when_the_contract_says():
    # v = grid point + f * step for every 1/256 and just below it, against every random byte.
    grid = torch.tensor(NVFP4.values, dtype=torch.float64)
    low, step = grid[:-1], grid[1:] - grid[:-1]
    f = torch.arange(512, dtype=torch.float64) / 512
    v = (low[:, None] + f * step[:, None]).flatten()
    byte = torch.arange(256, dtype=torch.int16)
    codes = e2m1_sr(
        v.to(torch.float32)[:, None].expand(-1, 256), byte.expand(len(v), 256).contiguous()
    )
    up = (256 * f).floor().repeat(7)[:, None] + byte >= 256
    lower = torch.arange(7).repeat_interleave(512)[:, None]
    assert torch.equal(codes.long(), lower + up)


def test_sr_never_rounds_across_a_grid_point():
    below = around(e2m1_points()).clamp(max=6)
    byte = torch.full(below.shape, 255, dtype=torch.int16)
    value = torch.tensor(NVFP4.values)[e2m1_sr(below, byte).long()]
    grid = torch.tensor(NVFP4.values)
    next_up = grid[(below[:, None] > grid).sum(1).clamp(max=7)]
    assert (value <= next_up).all()


def test_pack_round_trip():
    codes = torch.randint(0, 16, (3, 5, 32), dtype=torch.uint8)
    packed = pack_codes(codes)
    assert packed.shape == (3, 5, 16)
    assert torch.equal(packed[..., 0], codes[..., 0] | codes[..., 1] << 4)
    assert torch.equal(unpack_codes(packed), codes)
    signed = torch.tensor(NVFP4.values + tuple(-v for v in NVFP4.values))
    assert torch.equal(decode_codes(packed), signed[codes.long()])
