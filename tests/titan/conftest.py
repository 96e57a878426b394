"""torchtitan in this process: it must see the CPU runtime before it is imported."""

import os

import pytest
import torch
from support import SMALL_RUN, do_not_sleep, logged_losses

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
    from nvfp4_titan.titan import datasets
    from nvfp4_titan.titan.trainer import run

    do_not_sleep()

    def start(*argv: str, folder: str = "out") -> dict[int, float]:
        datasets._built.cache_clear()  # a run is a process of its own
        run([*SMALL_RUN, *argv, f"--job.dump_folder={single_rank / folder}"])
        return logged_losses(single_rank / folder)

    return start
