"""Fake quantization as one op, which compilers do not look into.

Inductor computes a chain of bf16 ops in fp32 and rounds at its end: torch.compile of a codec gives
other integers than the codec (measured in bf16 on a CPU: 3.6% of the output of an int8-act/
int4-weight linear), and so another model than the one that is deployed. It also lacks the dtype of
MX scales on a CPU. Codecs with integers run a Triton kernel on GPUs, others PyTorch's own ops.
"""

import torch

from ..backends.registration import fake_of, functional_op
from ..errors import ConfigError
from .codecs import Codec

_codecs: dict[str, Codec] = {}


def known(codec: Codec) -> Codec:
    """Make a codec one that `fake_quantize` finds by its name; returns it.

    Raises:
        ConfigError: another codec has that name.
    """
    if _codecs.setdefault(codec.name, codec) != codec:
        raise ConfigError(f"two codecs are called {codec.name!r}: give yours another name")
    return codec


@functional_op("fake_quantize")
def _fake_quantize(x: torch.Tensor, codec: str) -> torch.Tensor:
    found = _codecs[codec]
    integers = found.integers
    if integers is not None and x.is_cuda and x.dtype in (torch.bfloat16, torch.float32):
        # Triton is loaded where a kernel runs.
        from ..backends.triton_int_groups import int_groups_triton

        eps = torch.finfo(x.dtype).eps
        group = integers.group or x.shape[-1]
        return int_groups_triton(x, group, integers.largest, eps, integers.low, integers.high)
    return found.round_trip(x).contiguous()


@fake_of("fake_quantize")
def _(x, codec):
    return x.new_empty(x.shape)


def fake_quantize(x: torch.Tensor, codec: Codec) -> torch.Tensor:
    """What the deployed model multiplies for x, (..., K) in x's dtype; without a gradient."""
    return _fake_quantize(x.contiguous(), codec.name)
