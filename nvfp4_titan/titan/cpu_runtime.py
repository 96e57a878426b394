"""Lets torchtitan 0.2.2 run on a machine without an accelerator.

torchtitan takes its device type from `torch._utils._get_available_device_type()` when it is first
imported, and calls a few functions of `torch.<device>` that `torch.cpu` lacks. `install()` supplies
them, before torchtitan is imported; `prepare_trainer()` sets what FSDP over gloo needs. With an
accelerator present both do nothing.
"""

import os
import platform
import resource
import sys
from functools import partial
from types import SimpleNamespace

import torch
from torch._utils import _get_available_device_type
from torch.distributed.fsdp import FSDPModule

from ..errors import UnsupportedError


def active() -> bool:
    """Whether this machine has no accelerator that torch can use."""
    return _get_available_device_type() in (None, "cpu")


def install() -> None:
    """Make torchtitan see a CPU device; call before torchtitan is imported, once or more.

    Raises:
        UnsupportedError: torchtitan was imported already.
    """
    if not active() or torch._utils._get_available_device_type is _cpu_type:
        return
    if "torchtitan.tools.utils" in sys.modules:
        raise UnsupportedError(
            "torchtitan was imported before the CPU runtime: start with python -m nvfp4_titan.train"
        )
    torch._utils._get_available_device_type = _cpu_type
    for name, function in _CPU_DEVICE_MODULE.items():
        setattr(torch.cpu, name, function)
    torch.histc = _integer_histc(torch.histc)


def _cpu_type() -> str:
    return "cpu"


def _integer_histc(histc):
    """torch.histc for integers too, which its CPU kernel lacks (MoE routers count with it)."""

    def counted(values, bins=100, min=0, max=0):
        if values.is_floating_point():
            return histc(values, bins, min, max)
        return histc(values.to(torch.float32), bins, min, max).to(values.dtype)

    return counted


def _device_name(device=None) -> str:
    """The processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            named = (line.partition(":")[2] for line in lines if line.startswith("model name"))
            name = next(named, name).strip()
    return f"{name}, {torch.get_num_threads()} threads"


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory_stats(device=None) -> dict[str, int]:
    """The process's peak resident size, under the names of torch.cuda.memory_stats."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}


_CPU_DEVICE_MODULE = {
    "get_device_name": _device_name,
    "get_device_properties": lambda device=None: SimpleNamespace(total_memory=_total_memory()),
    "current_device": lambda: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "memory_stats": _memory_stats,
}


def patch_moe() -> None:
    """Let torchtitan's MoE compute its token permutation without a Triton kernel."""
    if not active():
        return
    import torchtitan.models.moe.utils as moe_utils  # torchtitan must come after install()

    moe_utils.generate_permute_indices = partial(moe_utils.generate_permute_indices, use_cpu=True)


def prepare_trainer(model_parts: list[torch.nn.Module]) -> None:
    """FSDP2 over gloo: sum, then scale (gloo has no pre-multiplied sum)."""
    if not active():
        return
    for part in model_parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
