"""The autograd function of linears and experts: three GEMMs, each in its recipe's formats.

    fprop  y  = Q(x)         @ Q(w).T          x 1x16 RTNE, w 16x16 RTNE
    dgrad  dx = Q(dy)        @ Q(w)            dy 1x16 SR, the same w codes as fprop
    wgrad  dw = Q(RHT(dy.T)) @ Q(RHT(x.T)).T   dy 1x16 SR, x 1x16 RTNE, contraction over tokens

(for the "nvfp4" recipe; the formats come from the recipe). x and dy are each quantized twice from
high precision, never requantized: an operand's blocks run along its contraction dim. A GEMM whose
format is None multiplies in high precision. With `offs` the same three GEMMs run group by group
over (E, N, K) weights.

What backward keeps of x, for wgrad, and of w, for dgrad:

    the recipe's GEMM ..                            kept                          bytes an element
    shares w's codes with fprop                     fprop's operand               0.56
    takes dequantized operands                      fprop's operand               0.56
    is quantized                                    its own operand               0.56, MXFP8 1.03
    is in high precision                            the original                  2, no copy

(A backend that multiplies bf16 values keeps those of w, 2 bytes an element, in place of codes that
it would unpack again.)

Of w nothing is kept where FSDP gathers it again for backward: with `requantize` the weight itself
is saved, whose storage FSDP frees in between, and quantized a second time. A weight that FSDP
gathers in codes (`GatheredWeight`) is its own operand. A weight that stays in place from one
optimizer step to the next may be quantized once for all GEMMs in between (`KeptWeight`).
"""

from dataclasses import dataclass, replace

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..backends import Backend, OperandUse, any_scaled, stream
from ..distributed import (
    GatheredWeight,
    GemmShards,
    OperandShard,
    amax_of_uses,
    gathered_operand,
    reduced_amax,
)
from ..errors import ConfigError, UnsupportedError
from ..numerics import QuantizedOperand
from ..recipe import Recipe

AGAIN = 6
"""SR stream, of no effect, of a weight that backward quantizes again."""

Kept = QuantizedOperand | torch.Tensor | None


def use(
    recipe: Recipe, name: str, side: str, *, kept: bool = False, now: bool = False
) -> OperandUse | None:
    """How one operand of a GEMM is quantized; None where the GEMM runs in high precision.

    Args:
        recipe: The recipe.
        name: "fprop", "dgrad" or "wgrad".
        side: "left" or "right".
        kept: Whether it is kept for backward.
        now: Whether its GEMM follows at once.
    """
    gemm = getattr(recipe, name)
    return gemm and OperandUse(
        getattr(gemm, side), stream(name, side), packed=kept or not now, values=now
    )


@dataclass(frozen=True)
class KeptWeight:
    """A weight's operands in forward and backward, good until the weight changes.

    It takes what the forward keeps for backward anyway (see the module): 0.56 bytes an element, or
    2 where a backend multiplies bf16 values.

    Attributes:
        dtype: Dtype that the weight was cast to.
        tensors: Codes, scales, amax and values of the operand along K, then of that along N; None
            what there is not.
    """

    dtype: torch.dtype
    tensors: tuple[torch.Tensor | None, ...]

    @staticmethod
    def of(
        w: torch.Tensor,
        recipe: Recipe,
        backend: Backend,
        dtype: torch.dtype,
        amax: torch.Tensor,
    ) -> "KeptWeight | None":
        """Quantize a weight as the forward would; None where a recipe needs more than its operands.

        Args:
            w: (N, K) or (E, N, K), or a shard of it that ends where blocks end.
            recipe: Its Recipe.
            backend: Its Backend.
            dtype: What the GEMMs cast it to.
            amax: fp32 (2,) or (E, 2), of the whole weight, as `amax_in_dtypes` has it.
        """
        own = recipe.shares_weight_codes or recipe.dequantized or recipe.dgrad is not None
        uses = _forward_weight_uses(recipe, True)
        keyed = any(use and (use.format.rht or use.format.rounding == "sr") for use in uses)
        if recipe.fprop is None or not own or keyed:
            return None
        operands = _quantize_weight(backend, w.to(dtype), uses, None, None, amax)
        return KeptWeight(dtype, sum(map(_tensors, operands), ()))


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
        w_amax: torch.Tensor | None = None,
        requantize: bool = False,
        *w_kept: torch.Tensor | None,
    ) -> torch.Tensor:
        """From x (M, K), w (N, K) or (E, N, K) to y (M, N).

        Args:
            ctx: Autograd's.
            x: Activations.
            w: Weights.
            offs: Group ends, None for a plain GEMM.
            key: SR key.
            recipe: Formats.
            backend: Operations.
            grads: Are dx and dw needed.
            shards: Place of the operands in the whole.
            w_amax: fp32 (2,) or (E, 2), `amax_in_dtypes` of the whole weight where it is known.
            requantize: Keep w itself, and not its operand, for backward.
            w_kept: Nothing, or the tensors of a KeptWeight of w, which w's values then follow.
        """
        need_dx, need_dw = grads
        shared, later = recipe.shares_weight_codes, recipe.dequantized
        x_rows, x_cols = _quantize(
            backend,
            x,
            use(recipe, "fprop", "left", kept=need_dw and later, now=True),
            use(recipe, "wgrad", "right", kept=True) if need_dw and not later else None,
            key,
            offs,
            shards and (shards.mesh, shards.x),
        )
        ctx.requantize = requantize and need_dx and (shared or later or recipe.dgrad is not None)
        ctx.requantize = ctx.requantize and not w_kept
        w_uses = _forward_weight_uses(recipe, need_dx and not ctx.requantize)
        # A weight is multiplied in the activations' precision, as autocast and FSDP have it.
        weight = w if w_kept else w.to(x.dtype)
        if w_kept:
            w_rows = _kept(w_kept[:4], use(recipe, "fprop", "right"), w.shape[-1])
            w_cols = _kept(w_kept[4:], use(recipe, "dgrad", "right"), w.shape[-2])
        elif isinstance(weight, GatheredWeight):
            if weight.transposed:
                raise UnsupportedError(
                    "a weight that FSDP gathers in codes is multiplied turned, along the other dim "
                    "than its codes run: keep it (N, K), or set nvfp4.fp4_all_gather = false"
                )
            tensors = weight.codes, weight.scale, weight.amax
            w_rows = gathered_operand(*tensors, w.shape[-1], recipe.fprop.right, w.dtype)
            w_cols = None
        else:
            place = shards and (shards.mesh, shards.w)
            w_rows, w_cols = _quantize_weight(backend, weight, w_uses, key, place, w_amax)
        # (M, K) @ (N, K).T -> (M, N)
        if recipe.fprop is None:
            y = _high_precision_mm(x, weight.transpose(-2, -1), offs)
        else:
            y = backend.mm(x_rows, w_rows, w.shape[-2], x.dtype, offs=offs)
        x_saved = (x_rows if later else x_cols or x) if need_dw else None
        w_saved = (w_rows if later or shared else w_cols or weight) if need_dx else None
        ctx.gathered = isinstance(weight, GatheredWeight)
        if ctx.gathered and need_dx:
            w_tensors = weight.codes, weight.scale, weight.amax, None
        elif ctx.requantize:
            w_tensors = w, None, w_amax, None
        else:
            w_tensors = _tensors(w_saved)
        ctx.save_for_backward(offs, key, *_tensors(x_saved), *w_tensors)
        ctx.recipe, ctx.backend, ctx.shards = recipe, backend, shards
        ctx.shape = (*w.shape[-2:], x.shape[0])
        ctx.dtypes = (x.dtype, w.dtype)
        ctx.options = 8 + len(w_kept)
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
        _, k, _ = ctx.shape
        x_dtype, w_dtype = ctx.dtypes
        offs, key, *kept = ctx.saved_tensors
        x = _backward_operand(ctx, "wgrad", kept[:4], key, offs)
        w = _backward_operand(ctx, "dgrad", kept[4:], key, offs)
        dy = dy.contiguous()
        dy_rows, dy_cols = _quantize(
            backend,
            dy,
            use(recipe, "dgrad", "left", now=True) if w is not None else None,
            use(recipe, "wgrad", "left", now=True) if x is not None else None,
            key,
            offs,
            shards and (shards.mesh, shards.dy),
        )
        dx = dw = None
        # (M, N) @ (N, K) -> (M, K)
        if isinstance(w, QuantizedOperand):
            dx = backend.mm(dy_rows, w, k, x_dtype, recipe.shares_weight_codes, offs)
        elif w is not None:
            dx = _high_precision_mm(dy, w, offs)
        # (N, M) @ (K, M).T -> (N, K)
        if isinstance(x, QuantizedOperand):
            dw = backend.wgrad(dy_cols, x, w_dtype, offs)
        elif x is not None:
            dw = _high_precision_mm(dy.T, x, offs).to(w_dtype)
        return dx, dw, *(None,) * ctx.options


def _backward_operand(
    ctx,
    gemm: str,
    tensors: list[torch.Tensor | None],
    key: torch.Tensor | None,
    offs: torch.Tensor | None,
) -> Kept:
    """Right operand of "dgrad" (w) or "wgrad" (x) from what was kept; None if not needed."""
    recipe = ctx.recipe
    is_w = gemm == "dgrad"
    operand = _kept_weight(ctx, tensors, key) if is_w else _kept_tokens(ctx, tensors)
    shared = is_w and recipe.shares_weight_codes
    if shared or not recipe.dequantized or operand is None:
        return operand
    offs = None if is_w else offs
    dtype = ctx.dtypes[0]
    t = ctx.backend.dequantize(operand, dtype, offs)
    own = use(recipe, gemm, "right", now=True)
    if own is None:
        return t
    place = ctx.shards and (ctx.shards.mesh, ctx.shards.w if is_w else ctx.shards.x)
    return _quantize(ctx.backend, t, None, own, key, offs, place)[1]


def _kept_tokens(ctx, tensors: list[torch.Tensor | None]) -> Kept:
    """What was kept of x: the operand of wgrad, or that of fprop, or x."""
    _, k, m = ctx.shape
    if ctx.recipe.dequantized:
        return _kept(tensors, use(ctx.recipe, "fprop", "left"), k)
    return _kept(tensors, use(ctx.recipe, "wgrad", "right"), m)


def _kept_weight(ctx, tensors: list[torch.Tensor | None], key: torch.Tensor | None) -> Kept:
    """What was kept of w, as of x; made again from w, or from what FSDP gathered."""
    recipe, (n, k, _), (x_dtype, w_dtype) = ctx.recipe, ctx.shape, ctx.dtypes
    if all(tensor is None for tensor in tensors):
        return None
    if ctx.gathered:
        return gathered_operand(*tensors[:3], k, recipe.fprop.right, w_dtype)
    of_fprop = recipe.shares_weight_codes or recipe.dequantized
    if ctx.requantize:
        w, _, amax, _ = tensors
        name = "fprop" if of_fprop else "dgrad"
        again = use(recipe, name, "right", kept=recipe.dequantized, now=True)
        if again.format.rounding == "rtne":
            # Another call than the forward's: a compiler would merge equal ones and keep the codes.
            again = replace(again, stream=AGAIN)
        uses = (again, None) if of_fprop else (None, again)
        place = ctx.shards and (ctx.shards.mesh, ctx.shards.w)
        rows, cols = _quantize_weight(ctx.backend, w.to(x_dtype), uses, key, place, amax)
        return rows or cols
    return _kept(
        tensors, use(recipe, "fprop" if of_fprop else "dgrad", "right"), k if of_fprop else n
    )


def _forward_weight_uses(recipe: Recipe, keep: bool) -> tuple[OperandUse | None, OperandUse | None]:
    """Uses of w along K and along N in the forward pass; keep: for backward, too."""
    own = not (recipe.shares_weight_codes or recipe.dequantized)
    # What dgrad multiplies is kept, values where there are any: they would be unpacked again.
    rows = use(recipe, "fprop", "right", kept=keep and recipe.dequantized, now=True)
    return rows, use(recipe, "dgrad", "right", now=True) if keep and own else None


def _quantize_weight(
    backend: Backend,
    w: torch.Tensor,
    uses: tuple[OperandUse | None, OperandUse | None],
    key: torch.Tensor | None,
    place: tuple[DeviceMesh, OperandShard] | None,
    amax: torch.Tensor | None,
) -> tuple[QuantizedOperand | None, QuantizedOperand | None]:
    """Operands of w; `amax` is that of the whole weight where it is known."""
    if amax is not None and (
        amax.shape != (*w.shape[:-2], 2) or amax.dtype != torch.float32 or amax.device != w.device
    ):
        raise ConfigError(
            f"weight_amax {tuple(amax.shape)}, {amax.dtype} on {amax.device}, does not fit w "
            f"{tuple(w.shape)} on {w.device}: make it with "
            "nvfp4_titan.distributed.amax_in_dtypes, a float32 pair for w or for each expert"
        )
    # The RHT changes the amax.
    if amax is None or any(use and use.format.rht for use in uses):
        return _quantize(backend, w, *uses, key, None, place)
    return _quantize(backend, w, *uses, key, None, place, amax_of_uses(amax, w.dtype))


_GROUPED_MULTIPLE = 8
"""torch._grouped_mm wants rows to begin at 16 bytes, of two-byte elements 8."""


def torch_grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """torch._grouped_mm of any sizes: (M, K) by (E, K, N), or a transposed (N, M) by (M, K)."""
    of_tokens = b.dim() == 2
    n, rows = b.shape[-1], a.shape[0]
    more = -n % _GROUPED_MULTIPLE
    left = -(rows if of_tokens else a.shape[1]) % _GROUPED_MULTIPLE
    if not (more or left):
        return torch._grouped_mm(a, b, offs=offs)
    pad = torch.nn.functional.pad
    if of_tokens:
        padded = pad(a.mT, (0, left)).mT, pad(b, (0, more))
        return torch._grouped_mm(*padded, offs=offs)[:, :rows, :n]
    return torch._grouped_mm(pad(a, (0, left)), pad(b, (0, more, 0, left)), offs=offs)[:, :n]


def _high_precision_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None) -> torch.Tensor:
    """Multiply a @ b, group by group with offs: (M, K) by (E, K, N), or (N, M) by (M, K)."""
    if offs is None:
        return a @ b
    y = torch_grouped_mm(a, b, offs)
    if b.dim() == 2:
        return y
    # torch leaves rows of no group undefined.
    rows = torch.arange(y.shape[0], device=y.device)
    return torch.where((rows < offs[-1]).unsqueeze(1), y, torch.zeros_like(y))


def _quantize(
    backend: Backend,
    t: torch.Tensor,
    rows: OperandUse | None,
    cols: OperandUse | None,
    key: torch.Tensor | None,
    offs: torch.Tensor | None,
    place: tuple[DeviceMesh, OperandShard] | None,
    amax: torch.Tensor | None = None,
) -> tuple[QuantizedOperand | None, QuantizedOperand | None]:
    """Quantize a tensor for its uses, as a part of the whole where it is a shard.

    `amax`: amaxes of the whole for both uses, None where they are to be taken.
    """
    if rows is None and cols is None:
        return None, None
    if place is None or not place[1].sharded:
        return backend.quantize(t, rows, cols, key, offs, amax)
    mesh, shard = place
    if amax is None and any_scaled(rows, cols):
        amax = reduced_amax(backend.amax(t, rows, cols, offs), mesh)
    return backend.quantize(t, rows, cols, key, offs, amax, shard.offset)


def _tensors(kept: Kept) -> tuple[torch.Tensor | None, ...]:
    """What to save of it: codes, scales and amax, or values and amax."""
    if isinstance(kept, QuantizedOperand):
        values = kept.values if kept.codes is None else None
        return kept.codes, kept.block_scale, kept.amax, values
    return kept, None, None, None


def _kept(tensors: list[torch.Tensor | None], use: OperandUse | None, size: int) -> Kept:
    """Inverse of `_tensors`; `use` says how an operand was quantized, None that it was not."""
    codes, scale, amax, values = tensors
    if use is None or (codes is None and values is None):
        return codes
    return QuantizedOperand(codes, scale, amax, size, use.format.format, values)
