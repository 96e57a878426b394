"""Every language model of torchtitan 0.2.2 converts on meta, and its debug flavor trains."""

import copy
import json
import math

import pytest
import torch

from nvfp4_titan import convert
from nvfp4_titan.titan.models import MODELS


def meta_model(name: str, flavor: str):
    from torchtitan.config import JobConfig
    from torchtitan.protocols.train_spec import get_train_spec

    import nvfp4_titan.titan.job_config  # noqa: F401  (registers the flavors)

    spec = get_train_spec(name)
    args = copy.deepcopy(spec.model_args[flavor])
    args.update_from_config(JobConfig())
    with torch.device("meta"):
        return spec.model_cls(args)


@pytest.mark.parametrize("name", MODELS)
def test_converts_on_meta(name):
    from torch import nn

    model = meta_model(name, "debugmodel")
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    report = convert(model)
    reported = {entry.fqn for entry in report.entries if entry.kind == "linear"}
    assert reported == linears
    assert 0.1 < report.flops_share < 1
    assert "output" in report.kept
    assert not any("router" in fqn for fqn in report.converted)
    assert not any(p.device.type != "meta" for p in model.parameters())


# gpt_oss needs FlexAttention's backward, which has no CPU implementation: torchtitan cannot either.
TRAINS_ON_CPU = [name for name in MODELS if name != "gpt_oss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINS_ON_CPU)
def test_debug_model_trains(name, train, single_rank):
    losses = train(
        f"--model.name={name}",
        "--model.flavor=debugmodel",
        "--model.converters=nvfp4",
        "--training.dataset=stdlib",
        "--training.steps=3",
        "--lr_scheduler.warmup_steps=1",
        "--validation.enable",
        "--validation.dataset=stdlib_validation",
        "--validation.local_batch_size=2",
        "--validation.seq_len=64",
        "--validation.steps=1",
        "--validation.freq=3",
    )
    assert list(losses) == [1, 2, 3] and all(map(math.isfinite, losses.values()))
    # A vocabulary of 2,048 starts near ln 2048 = 7.6.
    assert 6.5 < losses[1] < 9.5
    conversion = json.loads((single_rank / "out" / "conversion.json").read_text())
    assert conversion["flops_share"] > 0.1
