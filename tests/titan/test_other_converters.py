"""torchtitan's own float8 converter beside ours: each for other modules, never both for one."""

import copy

import pytest
import torch
from torch import nn

from nvfp4_titan import convert
from nvfp4_titan.errors import ConfigError
from nvfp4_titan.training import NVFP4Linear

FLOAT8 = "quantize.linear.float8"
DEBUG = (
    "--model.name=llama3",
    "--model.flavor=debugmodel",
    "--training.dataset=stdlib",
    f"--model.converters={FLOAT8},nvfp4",
    f"--{FLOAT8}.emulate",
    f"--{FLOAT8}.filter_fqns=output,feed_forward",
)


def converted_model(*argv):
    """The debug model after the converters of a job, and ours' report."""
    from torchtitan.distributed import ParallelDims
    from torchtitan.models.llama3 import Transformer, llama3_args
    from torchtitan.protocols.model_converter import build_model_converters

    from nvfp4_titan.titan.trainer import parse

    job = parse([*DEBUG, *argv])
    dims = ParallelDims(1, 1, 1, 1, 1, 1, 1, 1)
    args = copy.deepcopy(llama3_args["debugmodel"])
    args.update_from_config(job)
    with torch.device("meta"):
        model = Transformer(args)
    converters = build_model_converters(job, dims)
    converters.convert(model)
    return model, converters.converters[-1].report


def test_what_float8_converted_is_left_alone_and_reported(single_rank):
    model, report = converted_model()
    block = model.layers["0"]
    assert type(block.attention.wq).__name__ == "Float8Linear"
    assert isinstance(block.feed_forward.w1, NVFP4Linear)
    reasons = {entry.fqn: entry.reason for entry in report.entries}
    assert "is a Float8Linear" in reasons["layers.0.attention.wq"]
    assert "layers.0.feed_forward.w1" in report.converted


@pytest.mark.slow
def test_both_train(train):
    losses = train(*DEBUG, "--training.steps=2", "--lr_scheduler.warmup_steps=1")
    assert list(losses) == [1, 2]


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--nvfp4.rules=layers.0.attention.wq=nvfp4"], "which is a Float8Linear"),
        ([f"--{FLOAT8}.filter_fqns=output"], "nothing to convert"),
        ([f"--model.converters=nvfp4,{FLOAT8}"], "list nvfp4 last"),
    ],
)
def test_one_module_cannot_be_both(argv, fragment, single_rank):
    with pytest.raises(ConfigError, match=fragment):
        converted_model(*argv)


def test_weights_that_are_already_quantized_are_kept():
    class Quantized(torch.Tensor):
        pass

    def parameter(*shape):
        return nn.Parameter(torch.randn(shape).as_subclass(Quantized))

    model = nn.Module()
    model.taken, model.free = nn.Linear(32, 32), nn.Linear(32, 32)
    model.taken.weight = parameter(32, 32)
    model.experts = nn.Module()
    model.experts.num_experts, model.experts.w1 = 4, parameter(4, 32, 32)
    report = convert(model, backend="reference")
    assert report.converted == ("free",)
    assert all("Quantized" in entry.reason for entry in report.entries if not entry.converted)
