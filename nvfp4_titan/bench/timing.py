"""Timing GPU work: CUDA graphs, variants in random order, medians."""

import random
from collections.abc import Callable, Mapping
from statistics import median

import torch

from ..errors import UnsupportedError

WARMUPS, SAMPLES = 3, 25
# Larger than any GPU's L2 cache: what a variant left there must not help the next.
FLUSH_BYTES = 256 << 20


def require_gpu() -> None:
    """Check that there is something to measure.

    Raises:
        UnsupportedError: no CUDA GPU, or one older than sm_80.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError("benchmarks need a CUDA GPU: there is none here")
    if torch.cuda.get_device_capability() < (8, 0):
        raise UnsupportedError(f"benchmarks need sm_80 or newer: {torch.cuda.get_device_name()}")


def schedule(names: list[str], samples: int, seed: int) -> list[str]:
    """Order of measurements: every variant once a round, in a new random order each round."""
    generator = random.Random(seed)
    order = []
    for _ in range(samples):
        order += generator.sample(names, len(names))
    return order


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """A CUDA graph of a function's GPU work, warmed up; call it to replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure(
    variants: Mapping[str, Callable[[], object]], *, samples: int = SAMPLES, seed: int = 0
) -> dict[str, float]:
    """Median milliseconds of each variant.

    Args:
        variants: GPU work by name; none may wait for the device.
        samples: Measurements of each.
        seed: Of the order.
    """
    graphs = {name: captured(function) for name, function in variants.items()}
    # Read, not written: lines left to be written back would be charged to the next variant.
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for name in schedule(list(graphs), samples, seed):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.max()
        start.record()
        graphs[name]()
        end.record()
        end.synchronize()
        times[name].append(start.elapsed_time(end))
    return {name: median(values) for name, values in times.items()}
