"""The autograd function of linears and experts: three NVFP4 GEMMs, operands from high precision.

    fprop  y  = Q(x)         @ Q(w).T          x 1x16 RTNE, w 16x16 RTNE
    dgrad  dx = Q(dy)        @ Q(w)            dy 1x16 SR, the same w codes as fprop
    wgrad  dw = Q(RHT(dy.T)) @ Q(RHT(x.T)).T   dy 1x16 SR, x 1x16 RTNE, contraction over tokens

(for the "nvfp4" recipe; the formats come from the recipe). x and dy are each quantized twice from
high precision, never requantized: an operand's blocks run along its contraction dim. What backward
needs of x is kept packed, 0.56 bytes an element; of w too. With `offs` the same three GEMMs run
group by group over (E, N, K) weights.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..backends import Backend, OperandUse, stream
from ..distributed import GemmShards, OperandShard, reduced_amax
from ..errors import UnsupportedError
from ..numerics import QuantizedOperand
from ..recipe import GemmFormat, Recipe


def use(
    gemm: GemmFormat, name: str, side: str, *, kept: bool = False, now: bool = False
) -> OperandUse:
    """How one operand of a GEMM is quantized.

    Args:
        gemm: The GEMM's formats.
        name: "fprop", "dgrad" or "wgrad".
        side: "left" or "right".
        kept: Whether it is kept for backward.
        now: Whether its GEMM follows at once.
    """
    return OperandUse(getattr(gemm, side), stream(name, side), packed=kept, values=now)


def shares_weight_codes(recipe: Recipe) -> bool:
    """Whether dgrad reads the codes that fprop made of w (16x16 blocks do, 1x16 do not)."""
    return recipe.fprop.right == recipe.dgrad.right and recipe.fprop.right.transposable


class QuantizedGemm(torch.autograd.Function):
    """y = x @ w.T in a recipe's formats, plain or grouped. Call `linear` or `grouped_mm`."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        w: torch.Tensor,
        offs: torch.Tensor | None,
        key: torch.Tensor | None,
        recipe: Recipe,
        backend: Backend,
        grads: tuple[bool, bool],
        shards: GemmShards | None = None,
    ) -> torch.Tensor:
        """From x (M, K), w (N, K) or (E, N, K) to y (M, N); grads: are dx and dw needed."""
        need_dx, need_dw = grads
        shared = shares_weight_codes(recipe)
        x_rows, x_cols = _quantize(
            backend,
            x,
            use(recipe.fprop, "fprop", "left", now=True),
            use(recipe.wgrad, "wgrad", "right", kept=True) if need_dw else None,
            key,
            offs,
            shards and (shards.mesh, shards.x),
        )
        # A weight is multiplied in the activations' precision, as autocast and FSDP have it.
        w_rows, w_cols = _quantize(
            backend,
            w.to(x.dtype),
            use(recipe.fprop, "fprop", "right", kept=need_dx and shared, now=True),
            use(recipe.dgrad, "dgrad", "right", kept=True) if need_dx and not shared else None,
            key,
            None,
            shards and (shards.mesh, shards.w),
        )
        # (M, K) @ (N, K).T -> (M, N)
        y = backend.mm(x_rows, w_rows, w.shape[-2], x.dtype, offs=offs)
        w_saved = (w_rows if shared else w_cols) if need_dx else None
        ctx.save_for_backward(offs, key, *_tensors(x_cols), *_tensors(w_saved))
        ctx.recipe, ctx.backend, ctx.shards = recipe, backend, shards
        ctx.shape = (*w.shape[-2:], x.shape[0])
        ctx.dtypes = (x.dtype, w.dtype)
        return y

    @staticmethod
    def backward(ctx, dy: torch.Tensor):
        """Compute dx (M, K) in x's dtype, dw of w's shape and dtype."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise UnsupportedError(
                "NVFP4 GEMMs have no second derivative: call backward without create_graph, or "
                "keep these layers in high precision with a rule"
            )
        recipe, backend, shards = ctx.recipe, ctx.backend, ctx.shards
        n, k, m = ctx.shape
        x_dtype, w_dtype = ctx.dtypes
        offs, key, *saved = ctx.saved_tensors
        x_cols = _operand(saved[:3], m)
        shared = shares_weight_codes(recipe)
        w_operand = _operand(saved[3:], k if shared else n)
        dy_rows, dy_cols = _quantize(
            backend,
            dy.contiguous(),
            use(recipe.dgrad, "dgrad", "left", now=True) if w_operand else None,
            use(recipe.wgrad, "wgrad", "left", now=True) if x_cols else None,
            key,
            offs,
            shards and (shards.mesh, shards.dy),
        )
        dx = dw = None
        if w_operand:
            # (M, N) @ (N, K) -> (M, K)
            dx = backend.mm(dy_rows, w_operand, k, x_dtype, shared, offs)
        if x_cols:
            # (N, M) @ (K, M).T -> (N, K)
            dw = backend.wgrad(dy_cols, x_cols, w_dtype, offs)
        return dx, dw, None, None, None, None, None, None


def _quantize(
    backend: Backend,
    t: torch.Tensor,
    rows: OperandUse | None,
    cols: OperandUse | None,
    key: torch.Tensor | None,
    offs: torch.Tensor | None,
    place: tuple[DeviceMesh, OperandShard] | None,
) -> tuple[QuantizedOperand | None, QuantizedOperand | None]:
    """Quantize a tensor for its uses, as a part of the whole where it is a shard."""
    if place is None or not place[1].sharded:
        return backend.quantize(t, rows, cols, key, offs)
    mesh, shard = place
    amax = reduced_amax(backend.amax(t, rows, cols), mesh)
    return backend.quantize(t, rows, cols, key, offs, amax, shard.offset)


def _tensors(operand: QuantizedOperand | None) -> tuple[torch.Tensor | None, ...]:
    if operand is None:
        return None, None, None
    return operand.codes, operand.block_scale, operand.amax


def _operand(tensors: list[torch.Tensor | None], size: int) -> QuantizedOperand | None:
    return None if tensors[0] is None else QuantizedOperand(*tensors, size)
