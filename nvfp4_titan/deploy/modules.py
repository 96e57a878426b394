"""QAT's two model states: prepared (trains, fake-quantized) and converted (codes and scales).

    prepare(model, recipe)        nn.Linear -> NVFP4Linear or FakeQuantizedLinear, in place
    convert_prepared(model, ..)   its weights -> codes, which the same forward multiplies

The gradient of a fake quantization is the identity: y = x + (fq(x) - x).detach(), written as an
autograd function because that sum in floating point is not fq(x) to the last bit. No float8 tensor
enters the autograd graph, where a gradient would be cast to it.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from ..backends import OperandUse, plain_operand, stream
from ..distributed import GatheredWeight, amax_in_dtypes, amax_of_uses
from ..errors import ConfigError
from ..recipe import GemmFormat, OperandFormat, Recipe, Selection, parse_rules
from ..training import NVFP4Linear, Report, untrack_weights
from ..training.convert import choose, swap
from ..training.experts import WrappingExperts
from ..training.linear import autocast_dtype, cast_input
from .codecs import Codec, Encoded
from .fake import fake_quantize, known
from .recipes import DeployRecipe, get_deploy_recipe


class _StraightThrough(torch.autograd.Function):
    """The rounded tensor forward, the gradient unchanged backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, codec: Codec) -> torch.Tensor:
        return fake_quantize(x, codec)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, None


class FakeQuantizedLinear(nn.Linear):
    """nn.Linear over fake-quantized w and x; parameters and state dict are nn.Linear's.

    Attributes:
        deploy_recipe: The DeployRecipe.
    """

    deploy_recipe: DeployRecipe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N) in x's dtype (autocast's where that is enabled)."""
        x = cast_input(x, self.weight)
        if self.deploy_recipe.activation is not None:
            x = _StraightThrough.apply(x, self.deploy_recipe.activation)
        w = _StraightThrough.apply(self.weight.to(x.dtype), self.deploy_recipe.weight)
        return nn.functional.linear(x, w, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        """nn.Linear's, with the recipe."""
        return f"{super().extra_repr()}, recipe={self.deploy_recipe.name}"


class QuantizedLinear(nn.Module):
    """A linear whose weight exists in codes and scales only.

    Args:
        encoded: What the weight's codec stores.
        recipe: Its codecs; `activation` may hold a static amax.
        bias: (N,) or None.
        dtype: The dtype that the weight is decoded to, as it was encoded from.
    """

    def __init__(
        self, encoded: Encoded, recipe: DeployRecipe, bias: torch.Tensor | None, dtype: torch.dtype
    ):
        super().__init__()
        for name, tensor in encoded.items():
            self.register_buffer(name, tensor)
        self.names, self.recipe, self.dtype = tuple(encoded), recipe, dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """(N, K) as it is multiplied."""
        encoded = {name: getattr(self, name) for name in self.names}
        return self.recipe.weight.decode(encoded, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)."""
        x = x.to(autocast_dtype(x) or x.dtype)  # before it is rounded, as in training
        if self.recipe.activation is not None:
            with torch.no_grad():
                x = self.recipe.activation.round_trip(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)


def prepare(
    model: nn.Module,
    recipe: str | DeployRecipe,
    *,
    skip: Iterable[str] = (),
    experts: bool = True,
    backend: str = "auto",
) -> Report:
    """Make a model train for a deploy recipe, in place: every linear but routers and the lm head.

    Args:
        model: The whole model, before FSDP, TP or compile.
        recipe: Name in `DEPLOY_RECIPES`, or a DeployRecipe.
        skip: Globs of modules that stay in high precision.
        experts: Whether routed experts are prepared too, where the recipe can.
        backend: As `training.convert` takes it; only "nvfp4", "nvfp4_single" and "mxfp8" use one.

    Returns:
        Report of every linear and expert weight.

    Raises:
        ConfigError: unknown recipe, a skip that matches nothing, sizes that are not whole groups,
            nothing to prepare, or a model that was prepared or converted before.
    """
    recipe = get_deploy_recipe(recipe)
    for fqn, module in model.named_modules():
        if isinstance(module, FakeQuantizedLinear | QuantizedLinear):
            raise ConfigError(f"{fqn} was prepared before: prepare a model once")
    # Who is converted, and every error of that choice, are those of the training converter.
    quantized = recipe.gemm or Recipe(
        recipe.name, fprop=GemmFormat(OperandFormat(), OperandFormat())
    )
    rules = parse_rules([f"{glob}=bf16" for glob in skip if glob])
    selection = Selection(quantized, rules, bf16_last_fraction=0.0)
    chosen = choose(model, selection, experts and recipe.experts)
    for fqn, module in chosen.linears().items():
        recipe.weight.check(module.in_features, fqn)
    report = chosen.report
    if recipe.gemm is not None:
        report = swap(chosen, backend)
    else:
        for codec in filter(None, (recipe.weight, recipe.activation)):
            known(codec)
        for module in chosen.linears().values():
            module.__class__ = FakeQuantizedLinear
            module.deploy_recipe = recipe
    entries = (replace(e, recipe=recipe.name) if e.converted else e for e in report.entries)
    return replace(report, entries=tuple(entries))


@torch.no_grad()
def convert_prepared(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn a prepared model into the deployed one, in place: weights become codes and scales.

    Args:
        model: From `prepare`, not sharded.
        dtype: The dtype that weights are multiplied in (that of the run's compute); None: their
            own.

    Raises:
        ConfigError: nothing in it is prepared, or it was converted before.
    """
    found = False
    untrack_weights(model)
    for parent in list(model.modules()):
        if isinstance(parent, WrappingExperts) and not _coded_already(parent, *parent.recipes()):
            for name, (recipe, backend) in parent.recipes().items():
                weight = getattr(parent, name).detach()
                known = parent.weight_amaxes.get(name)
                coded = _coded(weight.to(dtype or weight.dtype), recipe, backend, known)
                parent._parameters[name] = nn.Parameter(coded, requires_grad=False)
            parent.change_recipe(_rowwise)
            found = True
        for name, child in list(parent.named_children()):
            if isinstance(child, NVFP4Linear) and not _coded_already(child, "weight"):
                weight = child.weight.detach()
                known = child.weight_amaxes.get("weight")
                own = dtype or weight.dtype
                coded = _coded(weight.to(own), child.recipe, child.backend, known)
                child.weight = nn.Parameter(coded, requires_grad=False)
                child.change_recipe(_rowwise)
                found = True
            elif isinstance(child, FakeQuantizedLinear):
                own = dtype or child.weight.dtype
                encoded = child.deploy_recipe.weight.encode(child.weight.detach().to(own))
                setattr(
                    parent, name, QuantizedLinear(encoded, child.deploy_recipe, child.bias, own)
                )
                found = True
    if not found:
        raise ConfigError(
            "nothing in the model is prepared, or it was converted before: call prepare first"
        )


def _coded_already(module: nn.Module, *names: str) -> bool:
    return any(isinstance(getattr(module, name), GatheredWeight) for name in names)


def _rowwise(recipe: Recipe) -> Recipe:
    """The recipe for a weight whose scales are one per row and block of columns."""
    w = replace(recipe.fprop.right, block=(1, recipe.fprop.right.format.block))
    return replace(recipe, fprop=GemmFormat(recipe.fprop.left, w))


def _coded(
    weight: torch.Tensor, recipe: Recipe, backend, amax: torch.Tensor | None
) -> GatheredWeight:
    """A weight in the codes and scales that the prepared forward makes of it."""
    use = OperandUse(recipe.fprop.right, stream("fprop", "right"))
    known = None if amax is None else amax_of_uses(amax, weight.dtype)
    operand, _ = backend.quantize(weight.contiguous(), use, None, amax=known)
    operand = plain_operand(operand, None, columns=False)
    return GatheredWeight(
        operand.codes.contiguous(),
        operand.block_scale.contiguous(),
        operand.amax if operand.amax is None else amax_in_dtypes(operand.amax),
        _rowwise(recipe).fprop.right,
        weight.shape,
        weight.dtype,
    )
