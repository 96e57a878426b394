"""CUDA graphs: one for a block's forward and one for its backward, stochastic rounding included."""

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from nvfp4_titan.training import NVFP4Linear

pytestmark = pytest.mark.gpu


def step(block, model, x, dy):
    torch.compiler.cudagraph_mark_step_begin()
    block(x).backward(dy)
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
            p.grad = None


def test_a_block_is_two_graphs_with_eager_bits():
    sizes = ((256, 512), (512, 256))
    linears = [NVFP4Linear(*s, False, name=f"{s}", backend="triton") for s in sizes]
    eager = nn.Sequential(linears[0], nn.ReLU(), linears[1]).to("cuda", torch.bfloat16)
    assert all(linear.key.is_cuda for linear in linears)
    graphed = copy.deepcopy(eager)
    compiled = torch.compile(graphed, mode="reduce-overhead", fullgraph=True)
    batches = torch.randn(6, 2, 128, 256, device="cuda", dtype=torch.bfloat16)
    for x, dy in batches[:5]:  # warm-up, recording, replay
        step(eager, eager, x, dy)
        step(compiled, graphed, x, dy)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step(compiled, graphed, *batches[5])
    step(eager, eager, *batches[5])
    launches = {event.key: event.count for event in seen.key_averages()}
    assert launches.get("cudaGraphLaunch") == 2
    for ours, theirs in zip(graphed.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours, theirs)
