"""Registering ops whose calls cost little: a linear makes eight, of tens of microseconds each.

`torch.library.custom_op` wraps an op in two Python functions (for autograd and for checks of
aliases), which cost more than the launches inside. Ours are called below autograd, return new
tensors only, and need neither.
"""

from collections.abc import Callable

import torch

NAMESPACE = "nvfp4_titan"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
# Kernels read tensors as they lie: compilers must not hand over other strides.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def functional_op(name: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Decorator that registers a function as op `nvfp4_titan::NAME` for every device.

    Args:
        name: Name without the namespace. The schema follows from the function's annotations; it
            must return new tensors and change none. Register its shapes with `fake_of`.
    """

    def register(function: Callable) -> torch._ops.OpOverload:
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()), tags=_TAGS)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def fake_of(name: str) -> Callable[[Callable], Callable]:
    """Decorator: the function tells shapes and dtypes of an op's results, for compilers."""
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=_LIBRARY)
