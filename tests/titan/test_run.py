"""Runs through torchtitan's trainer: numerics really differ, records are kept, runs resume."""

import json
from types import SimpleNamespace

import pytest
import torch

from nvfp4_titan.backends import resolve
from nvfp4_titan.errors import DivergedError
from nvfp4_titan.titan.checkpoints import newest_whole_step
from nvfp4_titan.titan.trainer import NVFP4Trainer

DEBUG = (
    "--model.name=llama3",
    "--model.flavor=debugmodel",
    "--training.dataset=stdlib",
    "--lr_scheduler.warmup_steps=2",
)


@pytest.mark.slow
def test_loss_differs_from_the_controls_from_step_two_on(train):
    steps = "--training.steps=4"
    control = train(*DEBUG, steps, folder="control")
    nvfp4 = train(*DEBUG, steps, "--model.converters=nvfp4", folder="nvfp4")
    bf16 = train(*DEBUG, steps, "--model.converters=nvfp4", "--nvfp4.recipe=bf16", folder="bf16")
    assert control == bf16
    assert all(control[step] != nvfp4[step] for step in (2, 3, 4))
    assert all(abs(control[step] - nvfp4[step]) < 0.05 for step in control)


@pytest.mark.slow
def test_validation_and_record(train, single_rank):
    train(
        *DEBUG,
        "--model.converters=nvfp4",
        "--training.steps=1",
        "--validation.enable",
        "--validation.dataset=stdlib_validation",
        "--validation.steps=2",
        "--validation.seq_len=64",
    )
    record = json.loads((single_rank / "out" / "run_record.json").read_text())
    assert set(record["corpus_sha256"]) == {"training", "validation"}
    assert len(record["tokenizer_sha256"]) == 64
    assert record["versions"]["torchtitan"] == "0.2.2"
    assert record["config"]["nvfp4"]["recipe"] == "nvfp4"
    assert record["initial_weights"] > 0 and record["cuda_graphs"] is False
    conversion = json.loads((single_rank / "out" / "conversion.json").read_text())
    assert conversion["backends"] == [resolve("auto").name]
    assert {e["recipe"] for e in conversion["entries"] if e["converted"]} == {"nvfp4"}


def test_a_loss_that_is_not_finite_stops_the_run(train, single_rank):
    options = ("--training.steps=9", "--optimizer.lr=1e30", "--nvfp4.numerics_log_freq=1")
    with pytest.raises(DivergedError, match="lower optimizer.lr"):
        train(*DEBUG, "--model.converters=nvfp4", *options)
    # Its telemetry has figures that are none, which JSON has no name for.
    text = (single_rank / "out" / "numerics.json").read_text()
    last = json.loads(text, parse_constant=pytest.fail)["last"].values()
    assert any(figure is None for figures in last for figure in figures.values())


def test_a_gradient_that_is_not_finite_is_not_saved(train, single_rank, monkeypatch):
    """Its loss is finite, the weights after the step are not."""
    forward_backward_step = NVFP4Trainer.forward_backward_step

    def poisoned(self, **kwargs):
        loss = forward_backward_step(self, **kwargs)
        if self.step == 2:
            self.model_parts[0].output.weight.grad[0, 0] = torch.nan
        return loss

    monkeypatch.setattr(NVFP4Trainer, "forward_backward_step", poisoned)
    saving = ("--checkpoint.enable", "--checkpoint.interval=1", "--training.steps=3")
    with pytest.raises(DivergedError, match="weights are not finite after step 2"):
        train(*DEBUG, "--model.converters=nvfp4", *saving)
    assert newest_whole_step(single_rank / "out" / "checkpoint") == (1, [])


def test_a_local_folder_works_as_in_torchtitan(train, single_rank):
    folder = single_rank / "texts"
    folder.mkdir()
    rows = [
        json.dumps({"text": f"line {i} of a text that repeats itself. " * 20}) for i in range(50)
    ]
    (folder / "data.json").write_text("\n".join(rows))
    losses = train(
        *DEBUG, "--model.converters=nvfp4", "--training.steps=2", "--training.dataset=c4_test",
        f"--training.dataset_path={folder}",
    )  # fmt: skip
    assert list(losses) == [1, 2]


def test_validation_compiles_without_cuda_graphs():
    """Those of one block are freed by the next, where there is no backward."""
    from torch._inductor import config

    from nvfp4_titan.titan.validate import prepare_validator

    compiled_with = []

    def backend(graph, inputs):
        compiled_with.append(config.triton.cudagraphs)
        return graph.forward

    block = torch.compile(torch.nn.Linear(4, 4), backend=backend)

    class OneValidation:
        parallel_dims = SimpleNamespace(cp_enabled=False)
        validation_dataloader = SimpleNamespace(
            dataset=SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
        )

        def should_validate(self, step):
            return False

        @torch.no_grad()
        def validate(self, model_parts, step):
            model_parts[0](torch.ones(2, 4))

    validator = OneValidation()
    prepare_validator(validator, steps=5)
    with config.patch("triton.cudagraphs", True):
        for _ in range(2):
            block(torch.ones(3, 4))
            validator.validate([block], 5)
    assert compiled_with == [True, False]
    assert validator.should_validate(5) and not validator.should_validate(4)


def test_validation_takes_the_same_text_each_time():
    """torchtitan's loader goes on where the last validation stopped."""
    from nvfp4_titan.titan.validate import RewoundLoader

    class Loader:
        def __init__(self):
            self.dataset, self.position = self, 0

        def state_dict(self):
            return {"position": self.position}

        def load_state_dict(self, state):
            self.position = state["position"]

        def __iter__(self):
            while True:
                self.position += 1
                yield self.position

    plain, rewound = Loader(), RewoundLoader(Loader())
    first, again = ([next(iter(loader)) for _ in range(2)] for loader in (plain, rewound))
    assert first == [1, 2] and again == [1, 1]
