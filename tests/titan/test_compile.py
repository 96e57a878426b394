"""A compiled run: one graph per kind of block, no break, no recompilation, the losses of eager.

Steps of numerics telemetry run eagerly in between and leave no graph.
"""

import json

import pytest
import torch
from support import logged_scalars

ARGV = (
    "--model.name=llama3",
    "--model.flavor=debugmodel",
    "--model.converters=nvfp4",
    "--training.dataset=stdlib",
    "--training.steps=20",
    "--lr_scheduler.warmup_steps=20",
)


@pytest.mark.slow
def test_compiled_losses_and_graphs(train, single_rank):
    eager = train(*ARGV, folder="eager")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = train(
        *ARGV, "--compile.enable", "--compile.components=model", "--nvfp4.numerics_log_freq=10",
        folder="compiled",
    )  # fmt: skip
    assert all(abs(compiled[step] / loss - 1) < 1e-3 for step, loss in eager.items())
    assert not counters["graph_break"]
    # Five converted blocks share one graph; the bf16 block at the end is the one recompilation.
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
    tag = "numerics/layers.0.attention.wq.weight/dgrad/sqnr_db"
    logged = logged_scalars(single_rank / "compiled", tag)
    assert list(logged) == [1, 10, 20] and all(12 < value < 30 for value in logged.values())
    assert not logged_scalars(single_rank / "eager", tag)
    numerics = json.loads((single_rank / "compiled" / "numerics.json").read_text())
    assert numerics["warnings"] == []
    # Five of the six blocks, seven linears each: three GEMMs, and x twice, w, dy twice.
    assert len(numerics["last"]) == 5 * 7 * (3 + 5)
