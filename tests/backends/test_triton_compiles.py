"""Every kernel compiles ahead of time for Ampere, Hopper and Blackwell, without a GPU.

No division may be approximate (div.full flips midpoints), and the kernels that training runs must
not spill, nor use more registers than leave room for what hides their loads.
"""

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvfp4_titan.backends import triton_grouped_gemm, triton_launch, triton_unpack
from nvfp4_titan.backends.triton_amax import _amax_kernel
from nvfp4_titan.backends.triton_int_groups import _int_groups_kernel
from nvfp4_titan.backends.triton_quantize import _quantize_kernel
from nvfp4_titan.backends.triton_unpack import _unpack_kernel
from nvfp4_titan.formats import MXFP8, NVFP4
from nvfp4_titan.recipe import FORMATS

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LEVELS = {80: 80, 90: 89, 100: 89}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WARPS = {"alpha": 1}  # 4 for others


# Whole tiles or not, by whether there are groups.
WIDTH = ({"WHOLE": True, "WIDTH": 4096}, {"WHOLE": False, "WIDTH": 0})


def targets(formats):
    return max(len(FORMATS[fmt].block_targets) for fmt in formats)


def quantize(rows="", cols="", groups=0, dtype="bf16", formats=("nvfp4", "nvfp4")):
    """Constants of the quantize kernel for uses such as "sr rht values"."""
    height = FORMATS[formats[1]].block if cols else 16
    constants = {"GROUPS": groups or 1, "ROUND": dtype != "bf16", **WIDTH[bool(groups)]}
    share = height // 16 * targets(formats)
    constants |= {"ROWS": height, "C": 512 // share}
    for name, use, fmt in zip(("ROW", "COL"), (rows, cols), formats, strict=True):
        constants |= {name: bool(use), f"{name}_FORMAT": FORMATS[fmt]}
        for field in ("square", "sr", "rht", "packed", "values"):
            constants[f"{name}_{field.upper()}"] = field in use
    return constants


def unpack(fmt, columns):
    """Constants of the unpack kernel."""
    groups = 16 if columns and fmt.tensor_scale else 0
    return {"GROUPS": groups, "FORMAT": fmt, "COLUMNS": columns, "C": 1024}


MX, MIXED, BEST = ("mxfp8", "mxfp8"), ("nvfp4", "mxfp8"), ("nvfp4_46", "nvfp4_46")
NVFP4S = {"A_FORMAT": NVFP4, "B_FORMAT": NVFP4}

# Kernel, dtype of its input, constants, most registers on sm_90 (spills are never allowed).
INTEGERS = {
    "SIZE": 4096, "LARGEST": 127.5, "EPS": 0.0078125, "LOW": -128.0, "HIGH": 127.0, "ROUND": True,
    "COUNT": 1, "C": 4096,
}  # fmt: skip
GROUPS_OF_32 = {"SIZE": 32, "LARGEST": 7.5, "LOW": -8.0, "HIGH": 7.0, "COUNT": 128, "C": 32}
AMAX = {"GROUPS": 1, "ROW": True, "ROW_RHT": False, "COL": True, "COL_RHT": True, "ROUND": False}
CASES = {
    "amax": (_amax_kernel, "bf16", {**AMAX, "C": 512, **WIDTH[False]}, 96),
    "amax of groups": (_amax_kernel, "bf16", {**AMAX, "GROUPS": 16, "C": 512, **WIDTH[True]}, 96),
    "x": (_quantize_kernel, "bf16", quantize("values", "rht packed"), 128),
    "dy": (_quantize_kernel, "bf16", quantize("sr values", "sr rht values"), 168),
    "w": (_quantize_kernel, "bf16", quantize("square values packed"), 168),
    "groups of x": (_quantize_kernel, "bf16", quantize("values", "rht packed", 16), 128),
    "fp32 x": (_quantize_kernel, "fp32", quantize("values", "rht packed"), 168),
    "mxfp8 x": (_quantize_kernel, "bf16", quantize("values", "packed", formats=MX), 128),
    "mxfp8 dy": (_quantize_kernel, "bf16", quantize("values", "values", formats=MX), 128),
    "nvfp4 and mxfp8 x": (
        _quantize_kernel,
        "bf16",
        quantize("values", "packed", formats=MIXED),
        128,
    ),
    "nvfp4 and mxfp8 w": (
        _quantize_kernel,
        "bf16",
        quantize("square values", "values", formats=MIXED),
        128,
    ),
    "four over six dy": (
        _quantize_kernel,
        "bf16",
        quantize("sr values", "sr rht values", formats=BEST),
        168,
    ),
    "four over six w": (
        _quantize_kernel,
        "bf16",
        quantize("square values packed", formats=BEST),
        168,
    ),
    "unpack rows": (_unpack_kernel, "u8", unpack(NVFP4, False), 96),
    "unpack columns": (_unpack_kernel, "u8", unpack(NVFP4, True), 96),
    "unpack mxfp8 columns": (_unpack_kernel, "u8", unpack(MXFP8, True), 96),
    "dequantize": (_unpack_kernel, "u8", unpack(NVFP4, False), 96),
    "alpha": (triton_unpack._alpha_kernel, "fp32", NVFP4S, 32),
    "scale": (triton_unpack._scale_kernel, "fp32", {"C": 1024}, 64),
    "int rows": (_int_groups_kernel, "bf16", INTEGERS, 128),
    "int groups": (_int_groups_kernel, "bf16", {**INTEGERS, **GROUPS_OF_32}, 128),
    "grouped fprop": (
        triton_grouped_gemm._grouped_mm_kernel,
        "bf16",
        {"TRANSPOSED": True, **NVFP4S},
        255,
    ),
    "grouped dgrad": (
        triton_grouped_gemm._grouped_mm_kernel,
        "bf16",
        {"TRANSPOSED": False, **NVFP4S},
        255,
    ),
    "grouped wgrad": (triton_grouped_gemm._grouped_wgrad_kernel, "bf16", NVFP4S, 255),
}
# Variants of a kernel that says enough on one architecture.
HOPPER_ONLY = (
    *("amax of groups", "x", "groups of x", "fp32 x", "mxfp8 x", "nvfp4 and mxfp8 x"),
    *("nvfp4 and mxfp8 w", "four over six w", "unpack mxfp8 columns", "dequantize"),
    *("int rows", "grouped dgrad"),
)


DIVISIBLE = (
    "stride",
    "stride_a",
    "stride_b",
    "stride_expert",
    "rows",
    "columns",
    "inner",
    "columns_in_all",
    "N",
    "K",
)
"""Integers that are multiples of 16 in training."""


def pointer_type(name: str, dtype: str, case: str) -> str:
    """Type of a pointer argument; dtype is that of the kernel's input."""
    if name in ("x_ptr", "a_ptr", "b_ptr", "dy_ptr"):
        return f"*{dtype}"
    if "amax" in name or "alpha" in name or name == "acc_ptr":
        return "*fp32"
    if name in ("offs_ptr", "key_ptr"):
        return "*i32" if name == "offs_ptr" else "*i64"
    if "values" in name:
        return "*bf16" if case == "dequantize" else "*i16"
    return "*u8" if "codes" in name or "scale" in name else "*bf16"


def compiled(case, arch):
    """A kernel compiled as it is launched."""
    kernel, dtype, constants, _ = CASES[case]
    options = {"enable_fp_fusion": False, "num_warps": WARPS.get(case, 4)}
    if kernel is _quantize_kernel:
        options["maxnreg"] = triton_launch.max_registers(
            DTYPES[dtype],
            LEVELS[arch],
            constants["GROUPS"] > 1,
            constants["ROW_SR"] or constants["COL_SR"],
        )
    if case.startswith("grouped"):
        tile = asdict(triton_grouped_gemm.HOPPER if arch >= 90 else triton_grouped_gemm.AMPERE)
        constants = {**constants, **tile, "WHOLE": True, "GROUPS": 16}
        options |= {name: tile[name] for name in ("num_warps", "num_stages")}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    if "PTX" in kernel.arg_names:
        constants["PTX"] = LEVELS[arch]
    if constants.get("GROUPS") in (0, 1):
        constants["offs_ptr"] = None
    if kernel is _quantize_kernel and not (constants["ROW_SR"] or constants["COL_SR"]):
        constants["key_ptr"] = None
    for name in ("ROW", "COL") if kernel is _quantize_kernel else ():
        for part, written in (("codes", "PACKED"), ("scale", "PACKED"), ("values", "VALUES")):
            if not constants[f"{name}_{written}"]:
                constants[f"{name.lower()}_{part}_ptr"] = None
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = pointer_type(name, dtype, case) if name.endswith("_ptr") else "i32"
        if name.endswith("_ptr") or name in DIVISIBLE:
            attributes[(i,)] = [["tt.divisibility", 16]]
    indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, indices, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(cubin: bytes, path: Path) -> dict[str, int]:
    """Registers and bytes of stack (spills) of a kernel."""
    path.write_bytes(cubin)
    command = [CUOBJDUMP, "--dump-resource-usage", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


@pytest.mark.parametrize(
    ("case", "arch"),
    [(case, arch) for case in CASES for arch in LEVELS if arch == 90 or case not in HOPPER_ONLY],
)
def test_compiles(case, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = compiled(case, arch)
    assert "div.full" not in result.asm["ptx"] and "div.approx" not in result.asm["ptx"]
    used = resources(result.asm["cubin"], tmp_path / "kernel.cubin")
    print(case, arch, used)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, used
    if arch == 90:
        assert used["REG"] <= CASES[case][3], used
