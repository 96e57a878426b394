"""Adding up a trace's kernels: overlaps once, steps as means, kinds by name."""

import json

import pytest

from nvfp4_titan.bench.profile import format_profiles, read_profile
from nvfp4_titan.errors import ConfigError


def event(name, start, duration, category="kernel"):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


STEPS = [event(f"ProfilerStep#{i}", 10_000 * i, 10_000, "user_annotation") for i in (1, 2)]
WORK = [
    event("ncclDevKernel_AllGather_RING_LL(..)", 10_000, 4000),
    event("nvjet_sm90_tst_256x128", 12_000, 3000),  # 2 ms of it beside the gather
    event("flash_fwd_kernel<cutlass::bfloat16_t>", 24_000, 500),
    event("_quantize_kernel", 13_000, 1000),  # inside of it
    event("_grouped_mm_kernel", 20_000, 1000),
    event("Memcpy DtoD", 22_000, 500, "gpu_memcpy"),
    event("aten::mm", 12_000, 9000, "cpu_op"),
    {"ph": "M", "name": "process_name"},
]


def write(folder, events):
    trace = folder / "rank0_trace.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    return trace


def test_a_mean_step(tmp_path):
    profile = read_profile(write(tmp_path, STEPS + WORK))
    assert (profile.step, profile.busy, profile.computing) == (10.0, 3.5, 2.5)
    assert profile.kernels == 3  # six in two steps
    kinds = {kind: time for kind, time in profile.by_kind.items() if time}
    assert kinds == {
        "communication": 2.0,
        "GEMMs": 2.0,
        "quantizing": 0.5,
        "attention": 0.25,
        "other": 0.25,
    }
    assert "| run | 10.0 | 3.5 | 2.5 | 3 | 2.0 | 0.5 | 0.2 | 2.0 |" in format_profiles(
        {"run": profile}
    )


@pytest.mark.parametrize("events", [STEPS, WORK])
def test_a_trace_without_steps_or_kernels(events, tmp_path):
    with pytest.raises(ConfigError, match="no step with kernels"):
        read_profile(write(tmp_path, events))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"traceEvents": [1]}'])
def test_what_is_no_trace(content, tmp_path):
    trace = tmp_path / "trace.json"
    trace.write_text(content)
    with pytest.raises(ConfigError, match="no trace of torch's profiler"):
        read_profile(trace)
