"""Backends and the resolver that picks one. A new backend is one file and one entry here."""

import logging
from collections.abc import Mapping
from types import MappingProxyType

import torch

from ..errors import ConfigError, UnsupportedError
from ..recipe import Recipe
from .backend import Backend, OperandUse, any_scaled, stream
from .native import NATIVE, NATIVE_SOFTWARE_SR
from .native_layout import plain_operand
from .reference import REFERENCE
from .triton import TRITON

__all__ = [
    "AUTO_ORDER",
    "BACKENDS",
    "BACKEND_NAMES",
    "Backend",
    "OperandUse",
    "any_scaled",
    "plain_operand",
    "resolve",
    "stream",
]

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {backend.name: backend for backend in (REFERENCE, TRITON, NATIVE, NATIVE_SOFTWARE_SR)}
)
BACKEND_NAMES = ("auto", *BACKENDS)
AUTO_ORDER = ("native", "triton", "reference")

_logger = logging.getLogger(__name__)
_announced: set[str] = set()


def resolve(
    backend: str | Backend, recipe: Recipe | None = None, device: str | None = None
) -> Backend:
    """The backend that a name stands for on this machine.

    Args:
        backend: "auto" (the fastest that runs here and has the recipe's formats; its choice is
            logged once), a backend's name, or a Backend (only its formats are checked: this is
            called for every GEMM).
        recipe: What it is to run; None asks for no format.
        device: Type of the device that holds the tensors; None: the machine's best.

    Raises:
        ConfigError: the name is unknown.
        UnsupportedError: the backend cannot run here, or lacks a format; the message says why and
            names one that can.
    """
    formats = recipe.formats if recipe else frozenset()
    if backend == "auto":
        for candidate in AUTO_ORDER:
            if _obstacle(BACKENDS[candidate], formats, device) is None:
                # A compiler cannot trace a log call; the eager start of a run logs it.
                if not torch.compiler.is_compiling() and candidate not in _announced:
                    _announced.add(candidate)
                    _logger.info("NVFP4 backend 'auto' picked '%s'", candidate)
                return BACKENDS[candidate]
        raise UnsupportedError(f"no backend has the formats {', '.join(sorted(formats))}")
    if isinstance(backend, str):
        if backend not in BACKENDS:
            names = ", ".join(BACKEND_NAMES)
            raise ConfigError(f"backend {backend!r} is unknown: use one of {names}")
        backend = BACKENDS[backend]
        reason = _obstacle(backend, formats, device)
    elif not isinstance(backend, Backend):
        raise ConfigError(f"backend={backend!r} must be a name, such as 'auto', or a Backend")
    else:
        reason = _missing(backend, formats)
    if reason is not None:
        others = "" if backend is REFERENCE else "; use backend = 'reference'"
        raise UnsupportedError(f"backend '{backend.name}' cannot run here: {reason}{others}")
    return backend


def _obstacle(backend: Backend, formats: frozenset[str], device: str | None) -> str | None:
    """Why a backend cannot run formats here; None where it can."""
    return _missing(backend, formats) or backend.unavailable(device)


def _missing(backend: Backend, formats: frozenset[str]) -> str | None:
    if formats <= backend.formats:
        return None
    return f"it lacks the formats {', '.join(sorted(formats - backend.formats))}"
