"""Routed experts: weights that turn the grouped GEMM they reach into an NVFP4 one.

torchtitan's experts are 3D parameters (E, N, K) that a function, compiled apart from the module,
takes through `to_local()`, `.bfloat16()`, `.transpose(-2, -1)` to `torch._grouped_mm` (or, without
grouped GEMMs, through indexing to `torch.matmul`). Replacing the module's forward would miss it.

    parameter (plain, maybe DTensor) --forward reads it--> ExpertWeight --bfloat16, transpose-->
    ExpertWeight --torch._grouped_mm--> training.grouped_mm

So a weight *subclass* intercepts the GEMM; but it only lives during a forward. The parameters
stay plain: FSDP, EP, `to_empty()`, initialisation, optimizers, state dicts and checkpoints never
see the subclass. The module's class is replaced by a subclass of it that hands its weights out
wrapped while its forward runs.

An operation that would drop the subclass raises: experts never fall back silently.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from ..backends import Backend
from ..errors import UnsupportedError
from ..recipe import Recipe
from .grouped import grouped_mm
from .linear import key_tensor, linear

aten = torch.ops.aten
_KEEP = {
    aten._to_copy.default,
    aten._unsafe_view.default,
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.t.default,
    aten.transpose.int,
    aten.view.default,
}
"""Operations whose result is still the weight."""

_GROUPED_MM = {torch._grouped_mm, torch.nn.functional.grouped_mm}
_MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}


class ExpertWeight(torch.Tensor):
    """A view of expert weights that runs its GEMMs in a recipe's formats.

    Attributes:
        data_: The plain weights, (E, N, K) or a part of them.
        key: int64 CPU scalar, the SR key.
        recipe: The Recipe.
        backend: The Backend.
    """

    @staticmethod
    def __new__(cls, data_: torch.Tensor, key: torch.Tensor, recipe: Recipe, backend: Backend):
        """Make a tensor without storage of its own; the GEMMs read `data_`."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            data_.shape,
            strides=data_.stride(),
            storage_offset=data_.storage_offset(),
            dtype=data_.dtype,
            device=data_.device,
            requires_grad=data_.requires_grad,
        )

    def __init__(self, data_: torch.Tensor, key: torch.Tensor, recipe: Recipe, backend: Backend):
        self.data_, self.key, self.recipe, self.backend = data_, key, recipe, backend

    def __repr__(self) -> str:
        return f"ExpertWeight({tuple(self.shape)}, recipe={self.recipe.name})"

    # The key is an inner tensor, so that layers which differ in it alone share one compiled graph.
    def __tensor_flatten__(self):
        return ["data_", "key"], (self.recipe, self.backend)

    @classmethod
    def __tensor_unflatten__(cls, inner, context, outer_size, outer_stride):
        return cls(inner["data_"], inner["key"], *context)

    def _stable_hash_for_caching(self) -> str:
        return f"{self.recipe}/{self.backend.name}"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _GROUPED_MM:
            return _intercepted_grouped_mm(*args, **kwargs)
        if func in _MATMUL:
            return _intercepted_matmul(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func not in _KEEP:
            # Under inference_mode composite operations arrive whole.
            if func._can_decompose():
                return func.decompose(*args, **(kwargs or {}))
            raise UnsupportedError(
                f"expert weights reached {func}, which has no NVFP4 form: use torch._grouped_mm or "
                "torch.matmul, or keep these experts in high precision with a rule or "
                "nvfp4.experts = false"
            )
        weight = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        plain = pytree.tree_map_only(cls, lambda leaf: leaf.data_, (args, kwargs or {}))
        return cls(func(*plain[0], **plain[1]), weight.key, weight.recipe, weight.backend)


class _Unwrap(torch.autograd.Function):
    """ExpertWeight to plain tensor; the gradient is plain on both sides."""

    @staticmethod
    def forward(ctx, weight: ExpertWeight) -> torch.Tensor:
        return weight.data_.view_as(weight.data_)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _Wrap(torch.autograd.Function):
    """Plain tensor to ExpertWeight; the gradient is plain on both sides."""

    @staticmethod
    def forward(ctx, plain: torch.Tensor, key: torch.Tensor, recipe: Recipe, backend: Backend):
        return ExpertWeight(plain.detach(), key, recipe, backend)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, None, None, None


def _intercepted_grouped_mm(x, mat2, offs=None, bias=None, out_dtype=None) -> torch.Tensor:
    w = mat2
    if (
        not isinstance(w, ExpertWeight)
        or offs is None
        or bias is not None
        or out_dtype not in (None, x.dtype)
        or x.dim() != 2
    ):
        raise UnsupportedError(
            "NVFP4 experts take grouped GEMMs of (M, K) by (E, K, N) with offs, without bias or "
            "out_dtype: keep these experts in high precision with a rule or nvfp4.experts = false"
        )
    options = {"recipe": w.recipe, "backend": w.backend, "key": w.key}
    return grouped_mm(x, _Unwrap.apply(w), offs, **options)


def _intercepted_matmul(x, other) -> torch.Tensor:
    w = other
    if not isinstance(w, ExpertWeight) or w.dim() != 2:
        raise UnsupportedError(
            "NVFP4 experts take matmul(x, w) with one expert's (K, N) weight on the right: keep "
            "these experts in high precision with a rule or nvfp4.experts = false"
        )
    options = {"recipe": w.recipe, "backend": w.backend, "key": w.key}
    return linear(x, _Unwrap.apply(w).transpose(0, 1), **options)


class WrappingExperts:
    """Mixed into an experts module's class: its forward sees converted weights wrapped."""

    def forward(self, *args, **kwargs):
        """Run the module's own forward, reading converted weights wrapped."""
        self._wrapping = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._wrapping = False

    def recipes(self) -> list[tuple[Recipe, Backend]]:
        """What each converted weight runs in."""
        return [(recipe, backend) for _, recipe, backend in self._converted.values()]

    def change_recipe(self, change: Callable[[Recipe], Recipe]) -> None:
        """Run every converted weight in change(recipe) from now on."""
        self._converted = {
            name: (key, change(recipe), backend)
            for name, (key, recipe, backend) in self._converted.items()
        }

    def __getattr__(self, name: str):
        value = super().__getattr__(name)
        if name not in self.__dict__["_converted"]:
            return value
        # A checkpoint inside the forward recomputes during backward, outside of it.
        if not self._wrapping and torch._C._current_graph_task_id() == -1:
            return value
        options = self.__dict__["_converted"][name]
        if not isinstance(value, DTensor):
            return _Wrap.apply(value, *options)
        if not all(p.is_replicate() or p.is_shard(0) for p in value.placements):
            raise UnsupportedError(
                f"NVFP4 experts do not take weights placed as {value.placements} yet: use expert "
                "parallelism with expert_tensor_parallel_degree = 1, or nvfp4.experts = false"
            )
        # Sharded by experts (EP): what leaves through to_local() must be wrapped.
        return DTensor.from_local(
            _Wrap.apply(value.to_local(), *options),
            value.device_mesh,
            value.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )

    def __reduce_ex__(self, protocol):
        # The class is made at run time: pickle by its base.
        _, _, *rest = super().__reduce_ex__(protocol)
        base = next(c for c in type(self).__mro__ if not issubclass(c, WrappingExperts))
        return (_new_instance, (base,), *rest)


def _new_instance(base: type[nn.Module]) -> nn.Module:
    cls = _wrapping_class(base)
    return cls.__new__(cls)


@cache
def _wrapping_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"NVFP4{base.__name__}", (WrappingExperts, base), {})


def expert_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights by name of a module that holds routed experts, {} for any other.

    Recognised by a `num_experts` attribute and 3D parameters of its own, one slice per expert.
    """
    count = getattr(module, "num_experts", None)
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if count and p.dim() == 3 and p.shape[0] == count}


def convert_experts(
    module: nn.Module,
    recipes: dict[str, Recipe],
    backends: dict[Recipe, Backend],
    fqn: str,
    seed: int,
) -> None:
    """Convert a module's expert weights in place.

    Args:
        module: Module with `expert_weights`; stays the same object, of a derived class.
        recipes: Quantized recipes by parameter name.
        backends: The Backend of each recipe.
        fqn: The module's FQN in the whole model.
        seed: Seed of stochastic rounding.
    """
    module.__class__ = _wrapping_class(type(module))
    module._wrapping = False
    module._converted = {
        name: (key_tensor(seed, f"{fqn}.{name}"), recipe, backends[recipe])
        for name, recipe in recipes.items()
    }
