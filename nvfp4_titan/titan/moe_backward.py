"""What torchtitan 0.2.2 leaves out of the backward of MoE layers under tensor parallelism.

Two sums over TP ranks are missing. One is that of the scores' gradients, of which each rank holds
a part: routers learn from it alone, and drift apart (torchtitan's issue 2387, mended later). The
other is that of tokens' gradients where EP borrows ranks of TP: a token's ends on the rank that
sent it to its experts, and another may read it. `complete` supplies both with hooks.
"""

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torchtitan.distributed import ParallelDims
from torchtitan.models.moe.moe import MoE


def complete(model_parts: list[nn.Module], parallel_dims: ParallelDims) -> None:
    """Make the gradients of MoE layers under TP whole, in place.

    Args:
        model_parts: torchtitan's, parallelized.
        parallel_dims: The job's degrees.
    """
    mesh = parallel_dims.get_optional_mesh("tp")
    if mesh is None:
        return
    borrowed = parallel_dims.ep_enabled and not parallel_dims.etp_enabled
    for part in model_parts:
        for moe in part.modules():
            # DeepEP's layers have no reorderer, and a backward of their own.
            if not isinstance(moe, MoE) or moe.reorderer is None:
                continue
            # Scores that multiply what goes into experts have their gradient from a sum over TP.
            if borrowed or not moe.score_before_experts:
                moe.router.register_forward_hook(partial(_sum_scores_gradient, mesh))
            if borrowed:
                _OwnTokens(mesh.size()).install(moe)


def _sum_scores_gradient(mesh: DeviceMesh, router: nn.Module, args: tuple, outputs: tuple):
    """The router's outputs; gradients of the scores are added up over TP ranks."""
    scores, *others = outputs
    whole = DTensor.from_local(scores, mesh, (Replicate(),), run_check=False)
    return whole.to_local(grad_placements=(Partial(),)), *others


class _OwnTokens:
    """Has each TP rank send those tokens to experts whose gradients it reads.

    Sequence parallelism splits every sequence, torchtitan's reorderer the batch: with more than one
    sequence these differ. The reorderer is given the tokens in an order in which they do not.
    """

    def __init__(self, tp: int):
        self.tp = tp
        self.order: torch.Tensor | None = None

    def install(self, moe: nn.Module) -> None:
        moe.register_forward_pre_hook(self._find_order)
        # Before and after torchtitan's own hooks, which split the tokens and count the rest in.
        moe.reorderer.register_forward_pre_hook(self._reorder, prepend=True)
        moe.reorderer.register_forward_hook(self._restore)

    def _find_order(self, moe: nn.Module, args: tuple) -> None:
        rows, length = args[0].shape[:2]
        tokens = torch.arange(rows * length, device=args[0].device)
        self.order = tokens.view(rows, self.tp, length // self.tp).transpose(0, 1).flatten()

    def _reorder(self, reorderer: nn.Module, args: tuple) -> tuple:
        scores, experts = args
        return scores[self.order], experts[self.order]

    def _restore(self, reorderer: nn.Module, args: tuple, outputs: tuple) -> tuple:
        """Slots (token times top_k, plus choice) as they are outside the reorderer."""
        scores, slots, counts = outputs
        top_k = args[0].shape[1]
        return scores, self.order[slots // top_k] * top_k + slots % top_k, counts
