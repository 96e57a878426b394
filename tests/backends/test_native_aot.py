"""The native kernels compile ahead of time for Blackwell: opcodes, divisions, registers, spills.

Prints what a kernel uses (pytest -s); docs/blackwell.md quotes it.
"""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import test_triton_compiles as aot
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nvfp4_titan.backends.native_quantize import _native_quantize_kernel
from nvfp4_titan.backends.native_transpose import _clear_tail_kernel, _transpose_kernel

POINTERS = {
    "x_ptr": "*bf16",
    "offs_ptr": "*i32",
    "amax_ptr": "*fp32",
    "key_ptr": "*i64",
    "y_ptr": "*bf16",
    "row_codes_ptr": "*i16",
    "col_codes_ptr": "*i64",
    "out_codes_ptr": "*i64",
}  # "*u8" for others
RN, RS = "cvt.rn.satfinite.e2m1x2.f32", "cvt.rs.satfinite.e2m1x4.f32"
SASS = "F2FP.SATFINITE.E2M1.F32.PACK_AB_MERGE_C"


def quantize(rows="", cols="", groups=0, **options):
    """Constants of the quantize kernel for uses such as "sr rht"."""
    constants = {"GROUPS": groups, "ROUND": False, "HARDWARE_SR": False, "C": 512}
    for name, use in (("ROW", rows), ("COL", cols)):
        constants[name] = bool(use)
        for field in ("square", "sr", "rht"):
            constants[f"{name}_{field.upper()}"] = field in use
    return constants | options


ALL = (90, 100, 103, 120)
HARDWARE = {"HARDWARE_SR": True}
# Kernel, constants, architectures, most registers (measured, and some room; 255 is all there are).
CASES = {
    "x": (_native_quantize_kernel, quantize("plain", "rht"), (100, 120), 128),
    "dy": (_native_quantize_kernel, quantize("sr", "sr rht", **HARDWARE), (100,), 168),
    "columns of dy": (_native_quantize_kernel, quantize("", "sr rht", **HARDWARE), (103,), 168),
    "columns of dy, software SR": (_native_quantize_kernel, quantize("", "sr rht"), (120,), 168),
    "w": (_native_quantize_kernel, quantize("square"), ALL, 96),
    "groups of x": (_native_quantize_kernel, quantize("plain", groups=16), (100,), 96),
    "transpose": (_transpose_kernel, {"C": 512}, ALL, 64),
    "clear tail": (_clear_tail_kernel, {"C": 1024}, ALL, 32),
}
LEVELS = {90: 89, 100: 100, 103: 100, 120: 100}
"""Targets and the PTX level that native_launch.levels gives them (90: the stand-in's)."""


def compiled(case: str, arch: int, level: int):
    """A kernel compiled as it is launched."""
    kernel, constants = CASES[case][:2]
    constants = {"PTX": level, **constants}
    if constants.get("GROUPS") == 0:
        constants["offs_ptr"] = None
    for name in ("row", "col"):
        if constants.get(name.upper()) is False:
            constants |= {f"{name}_codes_ptr": None, f"{name}_scale_ptr": None}
    if not (constants.get("ROW_SR") or constants.get("COL_SR")):
        constants["key_ptr"] = None
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = POINTERS.get(name, "*u8") if name.endswith("_ptr") else "i32"
        if name.endswith("_ptr") or name in aot.DIVISIBLE:
            attributes[(i,)] = [["tt.divisibility", 16]]
    indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, indices, attributes)
    options = {"enable_fp_fusion": False, "num_warps": 4}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@cache
def quoted_registers() -> dict[str, list[str]]:
    """Cells of the docs' table of registers by kernel, in the order of ALL."""
    text = (Path(__file__).parents[2] / "docs" / "blackwell.md").read_text()
    lines = text.partition("| kernel | sm_90")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.partition(" (")[0]: cells for name, *cells in rows}


def sass(path) -> str | None:
    """Disassembly; None where the disassembler is older than the architecture (triton 3.6's)."""
    command = [aot.CUOBJDUMP.with_name("nvdisasm"), path]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Cannot decode architecture 'SM103a'" in done.stderr:
        return None
    done.check_returncode()
    return done.stdout


@pytest.mark.parametrize(
    ("case", "arch"), [(case, arch) for case, (*_, targets, _) in CASES.items() for arch in targets]
)
def test_aot(case, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _, constants, _, most = CASES[case]
    result = compiled(case, arch, LEVELS[arch])
    ptx, cubin = result.asm["ptx"], tmp_path / "kernel.cubin"
    used = aot.resources(result.asm["cubin"], cubin)
    print(f"{case}, sm_{arch}: {used}")
    assert "div.full" not in ptx and "div.approx" not in ptx
    # One scalar may wait on the stack while a division's subroutine runs.
    assert used["STACK"] <= 8 and used["LOCAL"] == 0, used
    assert used["REG"] <= most, used
    # The table names what its figures were made with; another compiler counts otherwise.
    if triton.__version__.startswith("3.9.") and case in quoted_registers():
        assert str(used["REG"]) == quoted_registers()[case][ALL.index(arch)]
    machine = sass(cubin)
    rounds = constants.get("ROW", False) and not constants["ROW_SR"]
    rounds |= constants.get("COL", False) and not constants["COL_SR"]
    expected = arch != 90 and rounds, constants.get("HARDWARE_SR", False)
    assert (RN in ptx, RS in ptx) == expected
    assert machine is None or (SASS in machine, SASS + ".RS" in machine) == (
        any(expected),
        expected[1],
    )


@pytest.mark.parametrize(("case", "arch"), [("w", 90), ("columns of dy", 120)])
def test_native_aot_is_refused_where_the_instruction_is_missing(case, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with pytest.raises(Exception, match="e2m1|ptxas|PTX"):
        compiled(case, arch, 100)
