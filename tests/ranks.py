"""Spawned ranks of distributed tests: two or more over gloo on a CPU, two over NCCL on GPUs.

One suite for both: tests take a device from DEVICES, and functions that run on the ranks get a
torch.device. GPU cases need two GPUs; where there are two they run, and what fails to import fails.
"""

import os
import socket
from multiprocessing import forkserver
from unittest.mock import patch

import pytest
import torch
from support import do_not_sleep
from torch import distributed, multiprocessing

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)]
_GPUS = 2
# With CPU offload gradients are gathered on the CPU.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def on_devices(worlds: dict[str, int]) -> list:
    """Cases (name, device): all on a CPU, those of at most two ranks on GPUs too."""
    on_cpu = [pytest.param(name, "cpu") for name in worlds]
    two = [name for name, world in worlds.items() if world <= _GPUS]
    return on_cpu + [pytest.param(name, "cuda", marks=pytest.mark.multi_gpu) for name in two]


def environment(device: str) -> dict[str, str]:
    """Variables of processes that compute on a device: those on a CPU see no GPU."""
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # the same sums in every run


def free_port() -> int:
    """A port of this host; use it at once, before a connection is given it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(function, world: int, variables: dict[str, str], *args) -> None:
    """Call function(rank, *args) in a process per rank; raises with the traceback of one's error.

    Where there is no GPU they are forked from a process that has imported what they need (`warm`):
    to import torchtitan takes eight seconds. One that has looked for a GPU must not be forked.

    Args:
        function: A module's function.
        world: Number of ranks.
        variables: Environment variables of all ranks.
        args: What spawned processes can be given.
    """
    method = "spawn"
    if not torch.cuda.is_available():
        method = "forkserver"
        multiprocessing.set_forkserver_preload(["warm"])
        path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
        with patch.dict(os.environ, PYTHONPATH=path):
            forkserver.ensure_running()
    arguments = function, world, variables, args
    # A spawned process must see the variables before it imports; a forked one gets them then.
    with patch.dict(os.environ, variables):
        multiprocessing.start_processes(_process, arguments, nprocs=world, start_method=method)


def train_on_ranks(world: int, argv: list[str]) -> None:
    """Train on a CPU as torchtitan's command line says, as torchrun would start it."""
    start_ranks(_train, world, environment("cpu") | address(), argv)


def address() -> dict[str, str]:
    """Where ranks of this host meet; use it at once."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def _train(rank, argv):
    from nvfp4_titan.titan.launcher import train

    do_not_sleep()
    train(argv)


def _process(rank, function, world, variables, args):
    ranks = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update(variables | {name: str(value) for name, value in ranks.items()})
    torch.set_num_threads(1)
    function(rank, *args)


def spawn(function, device: str, world: int, folder, *args) -> list:
    """Call function(rank, torch device, *args) on every rank of a process group.

    Args:
        function: A module's function; what it returns is saved.
        device: "cpu" or "cuda".
        world: Number of ranks.
        folder: Empty folder.
        args: What spawned processes can be given.

    Returns:
        What each rank returned, its tensors on the CPU.
    """
    start_ranks(_rank, world, environment(device), function, device, world, str(folder), args)
    return [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(world)]


def _rank(rank, function, device, world, folder, args):
    here = torch.device(device, rank if device == "cuda" else None)
    if device == "cuda":
        torch.cuda.set_device(here)
    distributed.init_process_group(
        BACKENDS[device], init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    torch.save(function(rank, here, *args), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
