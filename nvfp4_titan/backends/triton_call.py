"""Launching a compiled kernel without Triton's own look-up, which costs more than small kernels.

Triton finds the compiled form of a kernel by every argument's type, alignment and value at each
launch, in Python. Here a short key says the same, and what Triton compiled for it is launched
directly: a documented use of what a launch returns.
"""

from collections.abc import Callable, Sequence

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
    _launched(kernel, (programs, 1, 1), arguments, constants, num_warps, options)


def _launched(kernel, grid: tuple, arguments: Sequence, constants: dict, num_warps: int, options):
    """Launch; returns what Triton compiled, None in its interpreter."""
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
        return compiled
    names = kernel.arg_names[len(arguments) :]
    assert names == list(constants), f"constants {list(constants)} are not in the order {names}"
    compiled = kernel[grid](*arguments, **constants, num_warps=num_warps, **options, **EXACT)
    if triton.knobs.runtime.interpret:
        return None
    _compiled[key] = compiled
    return compiled


class Launch:
    """Launches of one kernel over tensors of the same dtypes and sizes, again and again.

    Then the device and the tensors' alignment alone say which compiled kernel runs.

    Args:
        kernel: As `launch` has it.
        programs: Likewise.
        constants: Likewise.
        sizes: What a caller passes among the arguments, remembered for it.
        num_warps: As `launch` has it.
        options: Likewise.
    """

    def __init__(
        self,
        kernel,
        programs: int,
        constants: dict,
        sizes: tuple = (),
        *,
        num_warps: int,
        **options,
    ):
        self.sizes = sizes
        self._what = kernel, (programs, 1, 1)
        self._how = constants, num_warps, options
        self._values = tuple(constants.values())
        self._runners: dict[tuple, Callable] = {}

    def __call__(self, *arguments) -> None:
        """Launch on the current stream, with arguments as `launch` takes them."""
        # Of a tensor Triton would ask the address, and the driver whose address it is.
        addresses, misaligned = [], 0
        for argument in arguments:
            if argument is not None and argument.__class__ is not int:
                argument = argument.data_ptr()
                misaligned = 2 * misaligned + (argument & 15 != 0)
            addresses.append(argument)
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        runner = self._runners.get((device, misaligned))
        if runner is not None:
            runner(*addresses, *self._values)
            return
        compiled = _launched(*self._what, arguments, *self._how)
        if compiled is not None:
            self._runners[device, misaligned] = compiled[self._what[1]]


class Plans(dict):
    """What was worked out for tensors of a kind, by what it depends on.

    A model has few kinds, but routed tokens come in any number: they start over when they are many.
    """

    MOST = 4096

    def make(self, key: tuple, function: Callable, *args):
        """What `function(*args)` gives, remembered by a key that was not there."""
        if len(self) >= self.MOST:
            self.clear()
        self[key] = function(*args)
        return self[key]
