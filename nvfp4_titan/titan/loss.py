"""Gradients of the mean loss over a step's tokens, whatever shares the work.

torchtitan 0.2.2 gives others where its loss is summed and divided elsewhere. Pipeline schedules
take the backward of sums: gradients are as many times too large as a step has tokens, every step is
clipped, and quantized gradients get other codes (its issue 2972). DDP averages over replicas what
was divided by the tokens of them all (2318): gradients are as many times too small, and seldom
clipped.
"""

from collections.abc import Callable

import torch
from torch import nn
from torchtitan.distributed import ParallelDims


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: torch.Tensor, divisor: torch.Tensor | float) -> torch.Tensor:
        ctx.divisor = divisor
        return loss.clone()  # no view: zero-bubble schedules detach it in place

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad / ctx.divisor, None


class DividedLoss:
    """A loss function whose gradient is divided; its value is not.

    Args:
        loss_fn: The function.

    Attributes:
        divisor: Number, or tensor of one.
    """

    def __init__(self, loss_fn: Callable[..., torch.Tensor]):
        self.loss_fn = loss_fn
        self.divisor: torch.Tensor | float = 1.0

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        """The loss."""
        return _Divided.apply(self.loss_fn(*args, **kwargs), self.divisor)


def replicas(dims: ParallelDims) -> int:
    """Whole copies of the model that DDP averages over; 1 where there are shards or one copy."""
    return 1 if dims.fsdp_enabled else dims.dp_replicate


@torch.no_grad()
def sum_over_replicas(model_parts: list[nn.Module], count: int) -> None:
    """Make means of gradients over replicas sums, in place.

    Args:
        model_parts: torchtitan's, after the last backward of a step.
        count: Number of replicas.
    """
    parameters = (p for part in model_parts for p in part.parameters())
    if grads := [p.grad for p in parameters if p.grad is not None]:
        torch._foreach_mul_(grads, count)
