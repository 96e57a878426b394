"""Launching a compiled kernel without Triton's own look-up, which costs more than small kernels.

Triton finds the compiled form of a kernel by every argument's type, alignment and value at each
launch, in Python. Here a short key says the same, and what Triton compiled for it is launched
directly: a documented use of what a launch returns.
"""

from collections.abc import Sequence

import torch
import triton

# A fused multiply-add would round where the oracle does not.
EXACT = {"enable_fp_fusion": False}
_compiled: dict[tuple, object] = {}


def cdiv(a: int, b: int) -> int:
    """Quotient a / b, rounded up. triton.cdiv, made for kernels, costs microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The power of two that is at least n, for n >= 1; as `cdiv`."""
    return 1 << (n - 1).bit_length()


def _kind(argument: object) -> object:
    """What of an argument Triton may compile a kernel for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return argument


def launch(
    kernel, programs: int, arguments: Sequence, constants: dict, *, num_warps: int, **options
) -> None:
    """Launch a kernel on the current stream.

    Args:
        kernel: Function decorated with triton.jit, constants last in its signature.
        programs: Number of programs.
        arguments: Tensors, integers and None, in the order of the signature.
        constants: The kernel's constexprs, in the order of its signature.
        num_warps: Warps of a program.
        options: Triton's further options (num_stages, maxnreg).
    """
    grid = (programs, 1, 1)
    values = tuple(constants.values())
    key = (
        kernel,
        torch.cuda.current_device() if torch.cuda.is_initialized() else None,
        num_warps,
        *options.values(),
        *values,
        *map(_kind, arguments),
    )
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*arguments, *values)
        return
    names = kernel.arg_names[len(arguments) :]
    assert names == list(constants), f"constants {list(constants)} are not in the order {names}"
    compiled = kernel[grid](*arguments, **constants, num_warps=num_warps, **options, **EXACT)
    if not triton.knobs.runtime.interpret:
        _compiled[key] = compiled
