"""torchtitan in this process: it must see the CPU runtime before it is imported."""

import os

import pytest
import torch

from nvfp4_titan.titan import cpu_runtime

cpu_runtime.install()
cpu_runtime.patch_moe()


@pytest.fixture
def single_rank(monkeypatch, tmp_path):
    """The environment of a one-process job, in a folder of its own."""
    from nvfp4_titan.titan.launcher import single_process_environment

    for name, value in single_process_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert os.getcwd() == str(tmp_path)


@pytest.fixture
def train(single_rank):
    """A function that trains in this process and returns the logged losses by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from nvfp4_titan.titan.trainer import run

    def start(*argv: str, folder: str = "out") -> dict[int, float]:
        run(
            [
                *argv,
                f"--job.dump_folder={single_rank / folder}",
                "--metrics.log_freq=1",
                "--metrics.enable_tensorboard",
                "--training.mixed_precision_param=float32",
                "--training.local_batch_size=2",
                "--training.seq_len=64",
                "--debug.seed=0",
                "--optimizer.implementation=foreach",
                "--activation_checkpoint.mode=none",
            ]
        )
        events = EventAccumulator(str(next((single_rank / folder / "tb").glob("*"))))
        events.Reload()
        name = "loss_metrics/global_avg_loss"
        return {event.step: event.value for event in events.Scalars(name)}

    return start
