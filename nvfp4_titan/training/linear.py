"""`linear`, the NVFP4 counterpart of torch.nn.functional.linear, and its module."""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..backends import Backend, resolve
from ..distributed import GemmShards, localize
from ..errors import ConfigError
from ..numerics import sr_key
from ..numerics.quantize import INPUT_DTYPES
from ..recipe import Recipe, get_recipe
from .functions import KeptWeight, QuantizedGemm


def key_tensor(seed: int, name: str) -> torch.Tensor:
    """A layer's SR key as the ops take it: an int64 scalar, on the CPU.

    A tensor and not an int, so that torch.compile sees an input and not a constant: blocks that
    differ in nothing else share one compiled graph.
    """
    return torch.tensor(sr_key(seed, name), dtype=torch.int64, device="cpu")


def placed_key(key: torch.Tensor, parameter: torch.Tensor, backend: Backend) -> torch.Tensor:
    """A module's key where the backend reads it, on its parameter's device or on the CPU."""
    on_device = backend.key_on_device and not parameter.is_meta
    return key.to(parameter.device) if on_device else key


DEFAULT_KEY = key_tensor(0, "")
"""The SR key of calls and modules without a name."""


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast gives x; None where it is off."""
    device = x.device.type
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def cast_input(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """X in the dtype that it is multiplied in: autocast's where that is enabled, else w's own.

    Raises:
        ConfigError: without autocast, x and w of two dtypes.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        return x.to(dtype)
    if x.dtype != w.dtype:
        raise ConfigError(f"x is {x.dtype} and w is {w.dtype}: cast one, or use torch.autocast")
    return x


def check_operands(x: torch.Tensor, w: torch.Tensor) -> None:
    """Check dtypes and sizes of a GEMM's inputs.

    Raises:
        ConfigError: a dtype that NVFP4 does not take, or a dim of size 0 in w.
    """
    if x.dtype not in INPUT_DTYPES:
        raise ConfigError(f"x is {x.dtype}: NVFP4 takes float32, bfloat16 and float16")
    if 0 in w.shape:
        raise ConfigError(f"w {tuple(w.shape)} has a dim of size 0: nothing to multiply")


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    recipe: str | Recipe = "nvfp4",
    backend: str | Backend = "auto",
    key: torch.Tensor | None = None,
    weight_amax: torch.Tensor | None = None,
    requantize: bool = False,
    kept_weight: KeptWeight | None = None,
) -> torch.Tensor:
    """Compute x @ w.T + bias with all three GEMMs in the recipe's formats.

    Args:
        x: (..., K) fp32, bf16 or fp16, any strides; a DTensor where w is one.
        w: (N, K). Under autocast it is read in autocast's dtype and its gradient keeps its own.
        bias: (N,) or None. Added in x's dtype; its gradient comes from the unquantized dy.
        recipe: Name in `RECIPES`, or a Recipe.
        backend: Name ("auto" picks), or a Backend.
        key: int64 scalar from `key_tensor`, the SR key; None uses that of seed 0, name "".
        weight_amax: fp32 (2,), `amax_in_dtypes` of max |w| of the whole weight where it is known
            beforehand; None takes it here.
        requantize: Keep w itself for backward and quantize it again there, in place of keeping its
            codes (0.56 bytes an element): right where FSDP frees the gathered w in between.
        kept_weight: None, or w quantized beforehand for this recipe and backend: used in its place
            where x has its dtype.

    Returns:
        (..., N) in x's dtype (autocast's where that is enabled).

    Raises:
        ConfigError: unknown recipe, or shapes or dtypes that do not fit.
        UnsupportedError: the backend cannot run here or lacks a format, or DTensors in a layout
            that nvfp4_titan.distributed does not know.

    Source: NVIDIA arXiv 2509.25149; the bits are in nvfp4_titan.numerics.
    """
    recipe = get_recipe(recipe)
    x = cast_input(x, w)
    if not recipe.quantized:
        return nn.functional.linear(x, w, bias)
    if w.dim() != 2 or x.shape[-1] != w.shape[1]:
        raise ConfigError(
            f"x {tuple(x.shape)} and w {tuple(w.shape)} do not fit: need (..., K) and (N, K)"
        )
    if bias is not None and bias.shape != w.shape[:1]:
        raise ConfigError(
            f"bias {tuple(bias.shape)} and w {tuple(w.shape)} do not fit: need (N,) and (N, K)"
        )
    backend = resolve(backend, recipe, x.device.type)
    key = DEFAULT_KEY if key is None else key
    check_operands(x, w)
    kept = (weight_amax, requantize, kept_weight)
    if isinstance(x, DTensor) or isinstance(w, DTensor):
        local = localize(x, w)
        y = local_linear(local.x, local.w, key, recipe, backend, local.shards, *kept)
        y = local.wrap(y)
    else:
        y = local_linear(x, w, key, recipe, backend, None, *kept)
    return y if bias is None else y + bias.to(y.dtype)


def local_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    key: torch.Tensor,
    recipe: Recipe,
    backend: Backend,
    shards: GemmShards | None = None,
    weight_amax: torch.Tensor | None = None,
    requantize: bool = False,
    kept_weight: KeptWeight | None = None,
) -> torch.Tensor:
    """`linear` of local tensors, checked ones, which are the parts of a whole that `shards` says.

    Args:
        x: (..., K).
        w: (N, K).
        key: SR key.
        recipe: Quantized Recipe.
        backend: Backend.
        shards: None where x and w are whole.
        weight_amax: As `linear` has it.
        requantize: Keep w for backward and not its codes.
        kept_weight: As `linear` has it.

    Returns:
        (..., N).
    """
    grad = torch.is_grad_enabled()
    grads = (grad and x.requires_grad, grad and w.requires_grad)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    options = (None, key, recipe, backend, grads, shards, weight_amax, requantize)
    y = QuantizedGemm.apply(flat, w, *options, *kept_tensors(kept_weight, x))
    return y.view(*x.shape[:-1], w.shape[0])


def kept_tensors(kept: KeptWeight | None, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """What the GEMM of x takes of a KeptWeight: nothing where it was made for another dtype."""
    return kept.tensors if kept is not None and kept.dtype == x.dtype else ()


class NVFP4Linear(nn.Linear):
    """nn.Linear whose three GEMMs run in a recipe's formats.

    Parameters, their names, the state dict and the initialisation are nn.Linear's, so that
    checkpoints, optimizers and exports see no difference. Its SR key is neither parameter nor
    buffer: `to_empty()` and checkpoints leave it alone.

    Attributes:
        recipe: The Recipe.
        backend: The Backend.
        key: int64 scalar, the SR key of this layer, where its backend reads it.
        weight_amaxes: {"weight": fp32 (2,)} where amaxes are tracked (`track_weights`), else {}.
        kept_weights: {"weight": KeptWeight} where operands are kept (`track_weights`), else None.
        requantize: As `linear` has it.
        being_observed: Whether an Observer wants to see its weight quantized.
    """

    requantize = False
    kept_weights = None
    being_observed = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        recipe: str | Recipe = "nvfp4",
        backend: str | Backend = "auto",
        name: str = "",
        seed: int = 0,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = get_recipe(recipe)
        self.backend = resolve(backend, self.recipe)
        self.key = placed_key(key_tensor(seed, name), self.weight, self.backend)
        self.weight_amaxes = {}

    @classmethod
    def from_linear(
        cls, module: nn.Linear, *, recipe: Recipe, backend: Backend, name: str, seed: int
    ) -> "NVFP4Linear":
        """Turn a plain nn.Linear into an NVFP4Linear, in place; returns it.

        It stays the same object: parameters, hooks, attributes and every place that holds it.
        """
        module.__class__ = cls
        module.recipe, module.backend = recipe, backend
        module.key = placed_key(key_tensor(seed, name), module.weight, backend)
        module.weight_amaxes = {}
        return module

    def _apply(self, *args, **kwargs):
        # What moves parameters moves the key.
        super()._apply(*args, **kwargs)
        self.key = placed_key(self.key, self.weight, self.backend)
        return self

    def recipes(self) -> dict[str, tuple[Recipe, Backend]]:
        """What its weight runs in, as converted experts list theirs."""
        return {"weight": (self.recipe, self.backend)}

    def change_backend(self, name: str, backend: Backend) -> None:
        """Have another backend run its weight (named "weight") from now on."""
        self.backend = backend

    def change_recipe(self, change: Callable[[Recipe], Recipe]) -> None:
        """Run in change(recipe) from now on."""
        self.recipe = change(self.recipe)
        if self.kept_weights is not None:  # an attribute that comes or goes has graphs recompiled
            self.kept_weights = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N); see `linear`."""
        return linear(
            x,
            self.weight,
            self.bias,
            recipe=self.recipe,
            backend=self.backend,
            key=self.key,
            weight_amax=self.weight_amaxes.get("weight"),
            requantize=self.requantize,
            kept_weight=(self.kept_weights or {}).get("weight"),
        )

    def extra_repr(self) -> str:
        """nn.Linear's, with recipe and backend."""
        return f"{super().extra_repr()}, recipe={self.recipe.name}, backend={self.backend.name}"
