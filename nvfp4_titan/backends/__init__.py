"""Backends and the resolver that picks one. A new backend is one file and one entry here."""

import logging
from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..errors import ConfigError, UnsupportedError
from .backend import Backend, OperandUse, stream
from .reference import REFERENCE
from .triton import TRITON

__all__ = ["AUTO_ORDER", "BACKENDS", "BACKEND_NAMES", "Backend", "OperandUse", "resolve", "stream"]

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {backend.name: backend for backend in (REFERENCE, TRITON)}
)
BACKEND_NAMES = ("auto", "reference", "triton", "native")
AUTO_ORDER = ("native", "triton", "reference")

_logger = logging.getLogger(__name__)
_announced: set[str] = set()


def resolve(name: str, device: str | None = None) -> Backend:
    """The backend that a name stands for on this machine.

    Args:
        name: "auto" (the fastest that runs here; its choice is logged once), or a backend's name.
        device: Type of the device that holds the tensors; None: the machine's best.

    Raises:
        ConfigError: the name is unknown.
        UnsupportedError: the backend cannot run here; the message says why and names one that can.
    """
    if name == "auto":
        for candidate in AUTO_ORDER:
            if candidate in BACKENDS and BACKENDS[candidate].unavailable(device) is None:
                # A compiler cannot trace a log call; the eager start of a run logs it.
                if not torch.compiler.is_compiling() and candidate not in _announced:
                    _announced.add(candidate)
                    _logger.info("NVFP4 backend 'auto' picked '%s'", candidate)
                return BACKENDS[candidate]
    if name not in BACKEND_NAMES:
        raise ConfigError(f"backend {name!r} is unknown: use one of {', '.join(BACKEND_NAMES)}")
    if name not in BACKENDS:
        raise UnsupportedError(
            f"backend '{name}' is not part of this nvfp4_titan: use backend = 'reference'"
        )
    reason = BACKENDS[name].unavailable(device)
    if reason is not None:
        raise UnsupportedError(
            f"backend '{name}' cannot run here: {reason}; use backend = 'reference'"
        )
    return BACKENDS[name]
