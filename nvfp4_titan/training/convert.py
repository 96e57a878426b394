"""`convert`: swap a model's linears and experts for NVFP4 ones, in place, and report every choice.

Runs before sharding, on any device, meta included. Nothing is silent: a rule that matches nothing,
or a conversion that converts nothing, is an error; everything left alone is in the report.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..backends import Backend, resolve
from ..errors import ConfigError
from ..recipe import Choice, Recipe, Selection, get_recipe, parse_rules
from .experts import WrappingExperts, convert_experts, expert_weights
from .linear import NVFP4Linear
from .report import EXPERTS, LINEAR, Entry, Report


@dataclass(frozen=True)
class _Site:
    """Something that multiplies by a weight: `attribute` of the module `parent`."""

    parent: nn.Module
    attribute: str
    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    flops_per_token: int
    obstacle: str | None = None

    def entry(self, choice: Choice) -> Entry:
        converted = choice.recipe.quantized
        return Entry(
            self.names[0],
            self.kind,
            self.shape,
            self.flops_per_token,
            choice.recipe.name,
            converted,
            choice.reason,
        )


def convert(
    model: nn.Module,
    *,
    recipe: str | Recipe = "nvfp4",
    rules: Iterable[str] = (),
    bf16_first_layers: int = 0,
    bf16_last_fraction: float = 0.15,
    experts: bool = True,
    backend: str | Backend = "auto",
    seed: int = 0,
    rht: bool = True,
    sr: bool = True,
    weights_2d: bool = True,
) -> Report:
    """Convert a model in place.

    Args:
        model: Any nn.Module, before FSDP, TP or compile; the whole model, not a pipeline stage.
        recipe: Name in `RECIPES`, or a Recipe.
        rules: "glob=recipe" strings over FQNs; the last match wins and overrides everything.
        bf16_first_layers: Transformer blocks at the start that stay in high precision.
        bf16_last_fraction: Fraction of the blocks, rounded up, at the end that stays so.
        experts: Whether routed experts are converted too.
        backend: "auto", "reference", "triton", "native", or a Backend.
        seed: Seed of stochastic rounding.
        rht: Off drops the Hadamard transform.
        sr: Off rounds gradients to nearest.
        weights_2d: Off quantizes weights in 1x16 blocks.

    Returns:
        Report of every linear and expert weight.

    Raises:
        ConfigError: unknown recipe, malformed rule, a rule that matches nothing, nothing converted,
            a model that was converted before, or one that is itself a linear.
        UnsupportedError: the backend cannot run here.
    """
    backend = resolve(backend) if isinstance(backend, str) else backend
    selection = Selection(
        get_recipe(recipe),
        parse_rules(rules),
        bf16_first_layers,
        bf16_last_fraction,
        rht,
        sr,
        weights_2d,
    )
    _check_model(model)
    blocks = _blocks(model)
    sites = _linears(model) + _experts(model)
    _check_rules(selection, sites)
    choices = [_choose(selection, site, blocks, experts) for site in sites]
    report = Report(tuple(site.entry(c) for site, c in zip(sites, choices, strict=True)))
    if selection.recipe.quantized and not report.converted:
        raise ConfigError(f"nothing to convert: loosen the rules, or drop the converter\n{report}")
    _swap(sites, choices, backend, seed)
    return report


def _swap(sites: list[_Site], choices: list[Choice], backend: Backend, seed: int) -> None:
    linears: dict[nn.Module, NVFP4Linear] = {}
    experts: dict[nn.Module, dict[str, Recipe]] = {}
    fqns: dict[nn.Module, str] = {}
    for site, choice in zip(sites, choices, strict=True):
        if not choice.recipe.quantized:
            continue
        if site.kind == EXPERTS:
            experts.setdefault(site.parent, {})[site.attribute] = choice.recipe
            fqns[site.parent] = site.names[1]
            continue
        # A linear that is registered twice stays one module.
        module = getattr(site.parent, site.attribute)
        if module not in linears:
            linears[module] = NVFP4Linear.from_linear(
                module, recipe=choice.recipe, backend=backend, name=site.names[0], seed=seed
            )
        setattr(site.parent, site.attribute, linears[module])
    for module, recipes in experts.items():
        convert_experts(module, recipes, backend, fqns[module], seed)


def _check_model(model: nn.Module) -> None:
    if isinstance(model, nn.Linear):
        raise ConfigError("the model is itself a linear: build an NVFP4Linear instead")
    for fqn, module in model.named_modules():
        if isinstance(module, NVFP4Linear | WrappingExperts):
            raise ConfigError(f"{fqn} was converted before: convert a model once")


def _linears(model: nn.Module) -> list[_Site]:
    """Every linear of the model, in model order."""
    found = []
    for parent_fqn, parent in model.named_modules():
        for child_name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                fqn = f"{parent_fqn}.{child_name}" if parent_fqn else child_name
                shape = (child.out_features, child.in_features)
                flops = 2 * shape[0] * shape[1]
                found.append(
                    _Site(parent, child_name, (fqn,), LINEAR, shape, flops, _obstacle(child))
                )
    return found


def _experts(model: nn.Module) -> list[_Site]:
    """Every routed expert weight, which answers to its own name and to its module's."""
    found = []
    modules = dict(model.named_modules())
    for fqn, module in modules.items():
        # A token runs through top_k of the experts; the router beside them knows how many.
        router = getattr(modules.get(fqn.rpartition(".")[0]), "router", None)
        top_k = getattr(router, "top_k", 1)
        for name, weight in expert_weights(module).items():
            shape = tuple(weight.shape)
            flops = 2 * shape[1] * shape[2] * top_k
            names = (f"{fqn}.{name}" if fqn else name, fqn)
            found.append(_Site(module, name, names, EXPERTS, shape, flops))
    return found


def _obstacle(module: nn.Linear) -> str | None:
    """Why a linear cannot be swapped, None where it can."""
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, not a plain nn.Linear"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "has hooks: register them after conversion"
    return None


def _choose(selection: Selection, site: _Site, blocks: dict[str, int], experts: bool) -> Choice:
    fqn = site.names[0]
    block = next((i for prefix, i in blocks.items() if fqn.startswith(prefix)), None)
    choice = selection.choose(site.names, block, len(blocks))
    if choice.reason == "recipe" and site.kind == EXPERTS and not experts:
        return Choice(get_recipe("bf16"), "experts = false")
    if choice.recipe.quantized and site.obstacle:
        if choice.reason.startswith("rule "):
            raise ConfigError(f"{choice.reason} names {fqn}, which {site.obstacle}")
        return Choice(get_recipe("bf16"), site.obstacle)
    return choice


def _blocks(model: nn.Module) -> dict[str, int]:
    """FQN prefixes of the transformer blocks, "layers.0." and so on, with their index.

    The blocks are the children of the outermost container whose children are numbered; none where
    there is no such container (a plain nn.Sequential is a function, not a stack of blocks).
    """
    for fqn, module in model.named_modules():
        names = [name for name, _ in module.named_children()]
        numbered = names and all(name.isdigit() for name in names)
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and numbered:
            prefix = f"{fqn}." if fqn else ""
            return {f"{prefix}{name}.": i for i, name in enumerate(sorted(names, key=int))}
    return {}


def _check_rules(selection: Selection, sites: list[_Site]) -> None:
    for rule in selection.rules:
        if not any(rule.matches(site.names) for site in sites):
            examples = ", ".join(site.names[0] for site in sites[:3])
            raise ConfigError(
                f"rule '{rule.glob}={rule.recipe}' matches no linear or expert weight; names look "
                f"like {examples}"
            )
