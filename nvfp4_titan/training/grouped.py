"""`grouped_mm`, the NVFP4 counterpart of torch._grouped_mm: many experts in one call."""

import torch

from ..backends import Backend, resolve
from ..distributed import GemmShards
from ..errors import ConfigError
from ..recipe import Recipe, get_recipe
from .functions import KeptWeight, QuantizedGemm, torch_grouped_mm
from .linear import DEFAULT_KEY, check_operands, kept_tensors


def grouped_mm(
    x: torch.Tensor,
    w: torch.Tensor,
    offs: torch.Tensor,
    *,
    recipe: str | Recipe = "nvfp4",
    backend: str | Backend = "auto",
    key: torch.Tensor | None = None,
    shards: GemmShards | None = None,
    weight_amax: torch.Tensor | None = None,
    requantize: bool = False,
    kept_weight: KeptWeight | None = None,
) -> torch.Tensor:
    """Multiply each group of rows by its expert, all three GEMMs in the recipe's formats.

    Every group gives, bit for bit on the reference backend, what `linear` gives for its rows alone:
    an amax per group and per expert, blocks that never cross a group, SR keyed inside the group.

    Args:
        x: (M, K) fp32, bf16 or fp16; the rows of group e are offs[e-1] to offs[e]. Groups may be
            empty and need no alignment; rows after offs[-1] are padding: their y and dx are 0.
        w: (E, K, N), usually the transposed view of (E, N, K) parameters; same dtype as x.
        offs: (E,) int32 cumulative group ends on x's device; never read on a GPU.
        recipe: Name in `RECIPES`, or a Recipe with one-row blocks for x and dy. "bf16" is
            torch._grouped_mm itself, which leaves rows of no group undefined.
        backend: Name ("auto" picks), or a Backend.
        key: int64 scalar from `key_tensor`, the SR key; None uses that of seed 0, name "".
        shards: None, or the place of x, w and dy in the whole where experts are sharded over ranks
            (`expert_shards`).
        weight_amax: fp32 (E, 2), `amax_in_dtypes` of max |w| of each whole expert where it is known
            beforehand.
        requantize: Keep w itself for backward, as `linear` has it.
        kept_weight: As `linear` has it, of (E, N, K).

    Returns:
        (M, N) in x's dtype; a partial sum where w is sharded along K.

    Raises:
        ConfigError: unknown recipe, shapes or dtypes that do not fit, group ends that decrease or
            pass M (seen on a CPU only).
        UnsupportedError: the backend cannot run here, or lacks a format.

    Source: NVIDIA arXiv 2509.25149; the bits are in nvfp4_titan.numerics.
    """
    recipe = get_recipe(recipe)
    _check(x, w, offs, recipe)
    if not recipe.quantized:
        return torch_grouped_mm(x, w, offs)
    backend = resolve(backend, recipe, x.device.type)
    key = DEFAULT_KEY if key is None else key
    grad = torch.is_grad_enabled()
    grads = (grad and x.requires_grad, grad and w.requires_grad)
    options = (offs, key, recipe, backend, grads, shards, weight_amax, requantize)
    options += kept_tensors(kept_weight, x)
    return QuantizedGemm.apply(x.contiguous(), w.transpose(-2, -1), *options)


def _check(x: torch.Tensor, w: torch.Tensor, offs: torch.Tensor, recipe: Recipe) -> None:
    if x.dim() != 2 or w.dim() != 3 or x.shape[1] != w.shape[1]:
        raise ConfigError(
            f"x {tuple(x.shape)} and w {tuple(w.shape)} do not fit: need (M, K) and (E, K, N)"
        )
    if x.dtype != w.dtype:
        raise ConfigError(f"x is {x.dtype} and w is {w.dtype}: cast one")
    if offs.shape != w.shape[:1] or offs.dtype != torch.int32 or offs.device != x.device:
        raise ConfigError(
            f"offs {tuple(offs.shape)} {offs.dtype} on {offs.device} must hold the {w.shape[0]} "
            f"group ends as int32 on {x.device}"
        )
    if recipe.quantized:
        check_operands(x, w)
        tokens = [gemm.left for gemm in recipe.gemms]
        tokens += [recipe.wgrad.right] if recipe.wgrad else []
        if any(fmt.block[0] != 1 for fmt in tokens):
            raise ConfigError(
                f"recipe {recipe.name!r} quantizes tokens in square blocks, which would cross "
                "groups: use 1x16 (MXFP8: 1x32) blocks for x and dy"
            )
