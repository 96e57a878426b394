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
from dataclasses import dataclass, replace
from functools import cache
from threading import get_ident

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..backends import Backend
from ..distributed import GemmShards, expert_shards
from ..errors import ConfigError, UnsupportedError
from ..recipe import Recipe
from .functions import KeptWeight
from .grouped import grouped_mm
from .linear import NVFP4Linear, cast_input, check_operands, key_tensor, local_linear, placed_key

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

_OF_EXPERTS = {aten.select.int, aten.slice.Tensor}
"""Of these, what takes some of the experts where it works on dim 0."""

_STRIDED = {
    aten._to_copy.default,
    aten.alias.default,
    aten.detach.default,
    aten.t.default,
    aten.transpose.int,
}
"""Of these, what leaves all elements, and strides that tell how they lie in the parameter."""

_GROUPED_MM = {torch._grouped_mm, torch.nn.functional.grouped_mm}
_MATMUL = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
_LINEAR = torch.nn.functional.linear


@dataclass(frozen=True)
class ExpertOptions:
    """How the GEMMs over an expert weight run.

    Attributes:
        recipe: The Recipe.
        backend: The Backend.
        shards: Place of the operands in the whole where tensor parallelism shards experts.
        requantize: Keep the weights for backward, and not their codes (`linear`).
        kept_dtype: Dtype of the KeptWeight that comes along; None for none.
    """

    recipe: Recipe
    backend: Backend
    shards: GemmShards | None = None
    requantize: bool = False
    kept_dtype: torch.dtype | None = None


_KEPT = tuple(f"kept_{i}" for i in range(8))
"""Where an ExpertWeight has the tensors of a KeptWeight: inner tensors, for compilers."""


class ExpertWeight(torch.Tensor):
    """A view of expert weights that runs its GEMMs in a recipe's formats.

    Attributes:
        data_: The plain weights, (E, N, K) or a part of them.
        key: int64 scalar, the SR key.
        options: ExpertOptions.
        amax: fp32 (E, 2), of each whole expert, where it is known; its dims follow data_'s.
        kept_0: And so on: tensors of a KeptWeight of the whole parameter, as it is stored; None
            where there is none.
    """

    @staticmethod
    def __new__(
        cls, data_: torch.Tensor, key: torch.Tensor, options: ExpertOptions, amax=None, kept=()
    ):
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

    def __init__(
        self, data_: torch.Tensor, key: torch.Tensor, options: ExpertOptions, amax=None, kept=()
    ):
        self.data_, self.key, self.options, self.amax = data_, key, options, amax
        for name, tensor in zip(_KEPT, kept or (None,) * len(_KEPT), strict=True):
            setattr(self, name, tensor)

    def __repr__(self) -> str:
        return f"ExpertWeight({tuple(self.shape)}, recipe={self.options.recipe.name})"

    # The key is an inner tensor, so that layers which differ in it alone share one compiled graph.
    def __tensor_flatten__(self):
        optional = [name for name in ("amax", *_KEPT) if getattr(self, name) is not None]
        return ["data_", "key", *optional], self.options

    @classmethod
    def __tensor_unflatten__(cls, inner, options, outer_size, outer_stride):
        kept = tuple(inner.get(name) for name in _KEPT)
        return cls(inner["data_"], inner["key"], options, inner.get("amax"), kept)

    def _stable_hash_for_caching(self) -> str:
        options = self.options
        fields = (options.recipe, options.backend.name, options.shards)
        return "/".join(map(str, (*fields, options.requantize, options.kept_dtype)))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _GROUPED_MM:
            return _intercepted_grouped_mm(*args, **kwargs)
        if func in _MATMUL:
            return _intercepted_matmul(*args, **kwargs)
        if func is _LINEAR:
            return _intercepted_linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func not in _KEEP:
            # Under inference_mode composite operations arrive whole.
            if func._can_decompose():
                return func.decompose(*args, **(kwargs or {}))
            # A checkpoint's second forward and a hook of the backward look alike from here.
            hook = torch._C._current_graph_task_id() != -1
            plain = " (in a hook read module._parameters[name], the plain weight)" if hook else ""
            raise UnsupportedError(
                f"expert weights reached {func}, which has no NVFP4 form{plain}: use "
                "torch._grouped_mm, torch.matmul or torch.nn.functional.linear, or keep these "
                "experts in high precision with a rule or nvfp4.experts = false"
            )
        weight, *others = args  # these operations have one tensor, and have it first
        kwargs, options = kwargs or {}, weight.options
        result = func(weight.data_, *others, **kwargs)
        kept = tuple(getattr(weight, name) for name in _KEPT)
        layout = kwargs.get("memory_format")
        same_view = func is aten.view.default and result.shape == weight.shape
        strided = func in _STRIDED and layout in (None, torch.preserve_format)
        if not (same_view or strided):
            options, kept = replace(options, kept_dtype=None), ()
        return cls(result, weight.key, options, weight._amax_after(func, others, result), kept)

    def _amax_after(self, func, others: list, result: torch.Tensor) -> torch.Tensor | None:
        """What is known of the amaxes of an operation's result: None where it is other weights."""
        if self.amax is None:
            return None
        if func in _OF_EXPERTS:
            dim, *which = others or [0]
            return func(self.amax, 0, *which) if self.dim() == 3 and dim % 3 == 0 else None
        moved = self.dim() == 3 and (
            (func is aten.transpose.int and 0 in (others[0] % 3, others[1] % 3))
            or (func is aten.permute.default and others[0][0] % 3 != 0)
        )
        same = result.dim() == self.dim() and result.shape[:-2] == self.shape[:-2] and not moved
        return self.amax if same else None


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
    def forward(
        ctx,
        plain: torch.Tensor,
        key: torch.Tensor,
        options: ExpertOptions,
        amax: torch.Tensor | None,
        *kept: torch.Tensor | None,
    ):
        ctx.options = 3 + len(kept)
        return ExpertWeight(plain.detach(), key, options, amax, kept)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, *(None,) * ctx.options


def _intercepted_grouped_mm(input, mat2, offs=None, bias=None, out_dtype=None) -> torch.Tensor:
    x, w = input, mat2
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
    options, plain = w.options, _Unwrap.apply(w)
    return grouped_mm(
        x,
        plain,
        offs,
        recipe=options.recipe,
        backend=options.backend,
        key=w.key,
        shards=options.shards,
        weight_amax=w.amax,
        requantize=options.requantize,
        kept_weight=_kept_weight(w, plain),
    )


def _kept_weight(w: ExpertWeight, plain: torch.Tensor) -> KeptWeight | None:
    """The KeptWeight that came along, where w (E, K, N) is the parameter (E, N, K) turned."""
    if w.options.kept_dtype is None or not plain.transpose(-2, -1).is_contiguous():
        return None
    return KeptWeight(w.options.kept_dtype, tuple(getattr(w, name) for name in _KEPT))


def _intercepted_linear(input, weight, bias=None) -> torch.Tensor:
    turned = isinstance(weight, ExpertWeight) and weight.dim() == 2
    y = _intercepted_matmul(input, weight.t() if turned else weight)
    return y if bias is None else y + bias.to(y.dtype)


def _intercepted_matmul(input, other) -> torch.Tensor:
    x, w = input, other
    if not isinstance(w, ExpertWeight) or w.dim() != 2:
        raise UnsupportedError(
            "NVFP4 experts take matmul(x, w) with one expert's (K, N) weight on the right, or "
            "linear(x, w) with its (N, K) weight: keep these experts in high precision with a rule "
            "or nvfp4.experts = false"
        )
    if x.shape[-1] != w.shape[0]:
        raise ConfigError(
            f"x {tuple(x.shape)} and w {tuple(w.shape)} do not fit: need (..., K) and (K, N)"
        )
    options = w.options
    weight = _Unwrap.apply(w).transpose(0, 1)
    x = cast_input(x, weight)
    check_operands(x, weight)
    return local_linear(
        x,
        weight,
        w.key,
        options.recipe,
        options.backend,
        options.shards,
        w.amax,
        options.requantize,
    )


class WrappingExperts:
    """Mixed into an experts module's class: its forward sees converted weights wrapped."""

    kept_weights = None
    being_observed = False
    """Both as NVFP4Linear's; operands by weight name."""

    def forward(self, *args, **kwargs):
        """Run the module's own forward, reading converted weights wrapped; never compiled whole."""
        gone = self._converted.keys() - self._parameters.keys()
        if gone:
            raise UnsupportedError(
                f"expert weights {', '.join(sorted(gone))} are no parameters any more "
                "(parametrized, pruned or replicated by DataParallel), and would not be quantized: "
                "leave them as they are, and use DistributedDataParallel or FSDP"
            )
        outer = self._reads.get(get_ident())
        self._reads[get_ident()] = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self._reads[get_ident()]
            if outer is not None:
                self._reads[get_ident()] = outer

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        self._place_keys()
        return self

    def _place_keys(self) -> None:
        self._converted = {
            name: (placed_key(key, self._parameters[name], options.backend), options)
            for name, (key, options) in self._converted.items()
        }

    def change_keys(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Give every converted weight change(key) for its SR key from now on."""
        self._update(lambda key, options: (change(key), options))

    def change_backend(self, name: str, backend: Backend) -> None:
        """Have another backend run one weight from now on."""
        key, options = self._converted[name]
        self._converted = self._converted | {name: (key, replace(options, backend=backend))}

    def _update(self, change: Callable[[torch.Tensor, ExpertOptions], tuple]) -> None:
        """Give every converted weight change(key, options) for both from now on."""
        self._converted = {name: change(*pair) for name, pair in self._converted.items()}

    def recipes(self) -> dict[str, tuple[Recipe, Backend]]:
        """What each converted weight runs in, by name."""
        items = self._converted.items()
        return {name: (options.recipe, options.backend) for name, (_, options) in items}

    @property
    def requantize(self) -> bool:
        """Whether weights are kept for backward, and not their codes (`linear`)."""
        return any(options.requantize for _, options in self._converted.values())

    @requantize.setter
    def requantize(self, value: bool) -> None:
        self._update(lambda key, options: (key, replace(options, requantize=value)))

    def change_recipe(self, change: Callable[[Recipe], Recipe]) -> None:
        """Run every converted weight in change(recipe) from now on."""
        self._update(lambda key, o: (key, replace(o, recipe=change(o.recipe))))
        if self.kept_weights is not None:  # an attribute that comes or goes has graphs recompiled
            self.kept_weights = {}

    def __getattr__(self, name: str):
        value = super().__getattr__(name)
        if name not in self.__dict__["_converted"]:
            return value
        # A checkpoint inside the forward recomputes during backward, outside of it.
        reads = self.__dict__["_reads"].get(get_ident())
        if reads is None:
            recomputing = torch._C._current_graph_task_id() != -1
            return self._wrap(name, value) if recomputing else value
        # torchtitan's forward reads each weight twice; one read without grad has no grad to give.
        reading = name, torch.is_grad_enabled()
        if reading not in reads or reads[reading][0] is not value:
            reads[reading] = value, self._wrap(name, value)
        return reads[reading][1]

    def _wrap(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A weight as an ExpertWeight, or as a DTensor of one."""
        key, options = self.__dict__["_converted"][name]
        amax = self.__dict__["weight_amaxes"].get(name)
        kept = (self.__dict__.get("kept_weights") or {}).get(name)
        options = options if kept is None else replace(options, kept_dtype=kept.dtype)
        inner = (amax, *(() if kept is None else kept.tensors))
        if not isinstance(value, DTensor):
            return _Wrap.apply(value, key, options, *inner)
        # What leaves through to_local() must be wrapped.
        options = replace(options, shards=expert_shards(value))
        return DTensor.from_local(
            _Wrap.apply(value.to_local(), key, options, *inner),
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


Converted = NVFP4Linear | WrappingExperts
"""What `convert` makes of modules. Both have weight_amaxes, kept_weights, being_observed,
requantize, recipes(), change_recipe() and change_backend()."""


def _new_instance(base: type[nn.Module]) -> nn.Module:
    cls = _wrapping_class(base)
    return cls.__new__(cls)


@cache
def _wrapping_class(base: type[nn.Module]) -> type[nn.Module]:
    # A compiler sees the gradients of wrapped weights, which are plain, and fails. torchtitan
    # compiles the function inside alone.
    forward = torch.compiler.disable(WrappingExperts.forward)
    return type(f"NVFP4{base.__name__}", (WrappingExperts, base), {"forward": forward})


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
    module._reads = {}  # of each thread whose forward runs: what it has read, by name and grad mode
    module.weight_amaxes = {}
    module._converted = {
        name: (key_tensor(seed, f"{fqn}.{name}"), ExpertOptions(recipe, backends[recipe]))
        for name, recipe in recipes.items()
    }
    module._place_keys()
