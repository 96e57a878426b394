"""One thread per worker: two workers with two threads each on two cores crawl."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_runtest_setup(item):
    """GPU tests run where a GPU is; there, a failing import fails them."""
    gpus = torch.cuda.device_count()
    if item.get_closest_marker("gpu") and gpus < 1:
        pytest.skip("no CUDA GPU")
    if item.get_closest_marker("multi_gpu") and gpus < 2:
        pytest.skip("fewer than two CUDA GPUs")
    if item.get_closest_marker("sm100") and not (
        gpus and torch.cuda.get_device_capability()[0] == 10
    ):
        pytest.skip("no Blackwell GPU")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_mode_is_left_behind():
    yield
    # Later tests would run under it.
    assert torch._C._len_torch_dispatch_stack() == 0
