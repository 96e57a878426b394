"""A compiled run: one graph per kind of block, no break, no recompilation, the losses of eager."""

import pytest
import torch

ARGV = (
    "--model.name=llama3",
    "--model.flavor=debugmodel",
    "--model.converters=nvfp4",
    "--training.dataset=stdlib",
    "--training.steps=20",
    "--lr_scheduler.warmup_steps=20",
)


@pytest.mark.slow
def test_compiled_losses_and_graphs(train):
    eager = train(*ARGV, folder="eager")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = train(*ARGV, "--compile.enable", "--compile.components=model", folder="compiled")
    assert all(abs(compiled[step] / loss - 1) < 1e-3 for step, loss in eager.items())
    assert not counters["graph_break"]
    # Five converted blocks share one graph; the bf16 block at the end is the one recompilation.
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
