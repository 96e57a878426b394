"""The verification of a Blackwell GPU, run against the stand-ins and against faults; the docs."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from nvfp4_titan.bench import blackwell, roofline
from nvfp4_titan.bench.blackwell import Target
from nvfp4_titan.errors import UnsupportedError

CPU = Target("CPU", "cpu", True, None)


def test_blackwell_verification_passes_with_the_stand_ins():
    rows = []
    checks = blackwell.verify(CPU, announce=rows.append)
    assert {check.passed for check in checks if check.name != "speed"} == {True}
    assert rows == [check.row() for check in checks]
    text = blackwell.report(CPU, checks, "abc")
    assert "STAND-INS: nothing here is about the hardware" in text and "FAIL" not in text
    assert len({line.count("|") for line in text.splitlines()[4:]}) == 1  # a table


class Faulty(Target):
    """A target whose native records were changed."""

    def record(self, backend):
        return replace(blackwell.STAND_IN, **{self.name: partial(FAULTS[self.name], backend)})


def swapped(_, t, *args, **kwargs):
    """Codes with their nibbles swapped."""
    pairs = blackwell.STAND_IN.quantize(t, *args, **kwargs)
    return tuple(o and replace(o, codes=(o.codes >> 4) | (o.codes << 4)) for o in pairs)


def biased(_, *args, **kwargs):
    return blackwell.STAND_IN.mm(*args, **kwargs) * 0.99


def shrunk(_, *args, **kwargs):
    return blackwell.STAND_IN.wgrad(*args, **kwargs) * 0.88


FAULTS = {"quantize": swapped, "mm": biased, "wgrad": shrunk}


@pytest.mark.parametrize(
    ("fault", "function"),
    [
        ("quantize", blackwell.check_operands),
        ("quantize", blackwell.check_stochastic_rounding),
        ("mm", blackwell.check_gemms),
        ("wgrad", blackwell.check_gemms),
    ],
)
def test_blackwell_verification_finds_faults(fault, function):
    checks = function(Faulty(fault, "cpu", True, None))
    assert any(check.passed is False for check in checks)


def test_blackwell_verification_names_a_torch_without_grouped_gemms(monkeypatch):
    def missing(*args, **kwargs):
        raise UnsupportedError("this build of torch has no grouped NVFP4 GEMM")

    monkeypatch.setattr(blackwell, "grouped_mm", missing)
    checks = blackwell.check_grouped_gemms(CPU)
    assert len(checks) == 3
    for check in checks:
        assert check.passed is False and "no grouped NVFP4 GEMM" in check.found


def test_blackwell_verification_does_not_judge_grouped_gemms_where_torch_has_none():
    (check,) = blackwell.check_grouped_gemms(Target("RTX", "cuda", False, (12, 0)))
    assert check.passed is None and "no FP4 for sm_120" in check.found


def test_blackwell_verification_reports_an_error_and_goes_on(monkeypatch):
    def changed(target):
        raise TypeError("scaled_mm() got an unexpected keyword argument 'swizzle_a' | 2\nmore")

    good = blackwell.Check("good", "1", "1", True)
    monkeypatch.setattr(blackwell, "CHECKS", {"changed": changed, "after": lambda target: [good]})
    checks = blackwell.verify(CPU)
    assert [check.passed for check in checks] == [False, True]
    text = blackwell.report(CPU, checks, "abc")
    assert "1 of 2 checks passed; failed: changed\n" in text
    assert (
        "| changed | TypeError: scaled_mm() got an unexpected keyword argument 'swizzle_a'" in text
    )
    assert "Traceback" in text and "more" in text  # all of it, below the table


def test_blackwell_roofline_by_hand():
    machine = roofline.Machine("round", bf16=1e15, fp8=2e15, fp4=4e15, bandwidth=1e13)
    shape = roofline.Shape("square", 1024, 1024)
    # 6 * 2**30 FLOPs a thousand tokens; operands of 2**20 elements each.
    bf16 = roofline.times(machine, 1024, shape, "bf16")
    assert bf16.quantize == 0 and bf16.gemms == pytest.approx(6 * 2**30 / 1e15)
    nvfp4 = roofline.times(machine, 1024, shape, "nvfp4")
    assert nvfp4.quantize == pytest.approx(2**20 * (2 * 5.125 + 5.6875) / 1e13)
    assert nvfp4.gemms == pytest.approx(3 * max(2 * 2**30 / 4e15, 2**20 * 3.125 / 1e13))


def test_blackwell_break_even_is_where_the_times_cross():
    machine, shape = roofline.MACHINES[(10, 0)], roofline.DEEPSEEK_V3[-1]
    tokens = roofline.break_even(machine, shape, "nvfp4", "bf16")

    def faster(tokens):
        ours, theirs = (roofline.times(machine, tokens, shape, r) for r in ("nvfp4", "bf16"))
        return ours.total < theirs.total

    assert faster(tokens) and not faster(tokens - 16)


def test_blackwell_docs_hold_the_computed_roofline():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "blackwell.md").read_text()
    assert roofline.markdown() in text


@pytest.mark.gpu
def test_blackwell_verification_on_a_gpu_with_the_stand_ins():
    target = replace(Target.current(), stand_in=True)
    checks = blackwell.verify(target)
    assert not [check for check in checks if check.passed is False]
    assert torch.cuda.get_device_name() in blackwell.report(target, checks, "abc")
