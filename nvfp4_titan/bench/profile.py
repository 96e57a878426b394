"""Where a training step's time goes, from a trace that torchtitan's profiler wrote.

A job with --profiling.enable_profiling writes profile_traces/iteration_N/rankR_trace.json into its
dump folder: Chrome's format, as torch.profiler exports it.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..command import markdown_table
from ..errors import ConfigError

COMMUNICATION, OTHER = "communication", "other"
KINDS = (
    (COMMUNICATION, r"nccl"),
    ("quantizing", r"^_\w*(amax|quantize|unpack|alpha|scale|transpose|groups)_kernel"),
    ("attention", r"flex_attention|flash|fmha"),
    ("GEMMs", r"gemm|nvjet|cutlass|^_grouped_(mm|wgrad)_kernel"),
    ("optimizer", r"multi_tensor|adam"),
)
"""Kinds of kernels, by a pattern of their names; the first that matches."""
_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}


@dataclass(frozen=True)
class StepProfile:
    """A step, in ms.

    Attributes:
        step: From its start to its end on the host; a profiled step is longer than others.
        busy: Time in which the GPU does anything.
        computing: Time in which it does anything but communicate.
        kernels: Number of kernels and copies.
        by_kind: Time of the kernels of a kind, added up.
    """

    step: float
    busy: float
    computing: float
    kernels: int
    by_kind: dict[str, float]


def read_profile(trace: Path) -> StepProfile:
    """Mean over the steps of a trace.

    Args:
        trace: File.

    Raises:
        ConfigError: it is no such trace, or holds no step with kernels.
    """
    try:
        events = json.loads(trace.read_text())["traceEvents"]
        events = [e for e in events if e.get("ph") == "X"]
        steps = [e for e in events if _is_step(e)]
        work = [e for e in events if e.get("cat") in _ON_GPU]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{trace} is no trace of torch's profiler ({error})") from error
    if not steps or not work:
        raise ConfigError(
            f"{trace} has no step with kernels: profile with --profiling.enable_profiling on a GPU"
        )
    by_kind = dict.fromkeys([*(kind for kind, _ in KINDS), OTHER], 0.0)
    for event in work:
        by_kind[_kind(event)] += event["dur"]
    each = 1e3 * len(steps)  # microseconds of all steps to ms of one
    return StepProfile(
        step=sum(e["dur"] for e in steps) / each,
        busy=_covered(work) / each,
        computing=_covered(e for e in work if _kind(e) != COMMUNICATION) / each,
        kernels=round(len(work) / len(steps)),
        by_kind={kind: time / each for kind, time in by_kind.items()},
    )


def format_profiles(profiles: dict[str, StepProfile]) -> str:
    """Profiles by name as a Markdown table, ms."""
    head = ("", "step", "GPU busy", "GPU computing", "kernels", *(k for k, _ in KINDS), OTHER)
    rows = [
        (
            name,
            *(f"{time:.1f}" for time in (p.step, p.busy, p.computing)),
            p.kernels,
            *(f"{time:.1f}" for time in p.by_kind.values()),
        )
        for name, p in profiles.items()
    ]
    return "\n".join(markdown_table(head, rows))


def _is_step(event: dict) -> bool:
    return event.get("cat") == "user_annotation" and event["name"].startswith("ProfilerStep")


def _kind(event: dict) -> str:
    name = event["name"]
    return next((kind for kind, part in KINDS if re.search(part, name)), OTHER)


def _covered(events: Iterable[dict]) -> float:
    """Time in which any of some events goes on, in their unit."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
