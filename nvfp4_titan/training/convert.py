"""`convert`: swap a model's linears and experts for NVFP4 ones, in place, and report every choice.

Runs before sharding, on any device, meta included. Nothing is silent: a rule that matches nothing,
or a conversion that converts nothing, is an error; everything left alone is in the report.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from ..backends import Backend, resolve
from ..errors import ConfigError, check_types
from ..recipe import DEFAULT_RULES, Choice, Recipe, Selection, get_recipe, parse_rules
from .experts import Converted, convert_experts, expert_weights
from .linear import NVFP4Linear
from .report import EXPERTS, LINEAR, Entry, Report


@dataclass(frozen=True)
class _Site:
    """Something that multiplies by a weight: `attribute` of `module`."""

    module: nn.Module
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
    rules: Iterable[str] | None = (),
    bf16_first_layers: int = 0,
    bf16_last_fraction: float = 0.15,
    experts: bool = True,
    backend: str | Backend = "auto",
    seed: int = 0,
    rht: bool = True,
    sr: bool = True,
    weights_2d: bool = True,
    tensor_scale: bool = True,
) -> Report:
    """Convert a model in place.

    Args:
        model: Any nn.Module, before FSDP, TP or compile; the whole model, not a pipeline stage.
        recipe: Name in `RECIPES`, or a Recipe.
        rules: "glob=recipe" strings over FQNs; the last match wins and overrides everything. Each
            must decide something.
        bf16_first_layers: Transformer blocks at the start that stay in high precision.
        bf16_last_fraction: Fraction of the blocks, rounded up, at the end that stays so.
        experts: Whether routed experts are converted too.
        backend: "auto", a name in `backends.BACKENDS`, or a Backend.
        seed: Seed of stochastic rounding.
        rht: Off drops the Hadamard transform.
        sr: Off rounds gradients to nearest.
        weights_2d: Off quantizes weights in 1x16 blocks.
        tensor_scale: Off drops NVFP4's scale per tensor of x and w.

    Returns:
        Report of every linear and expert weight.

    Raises:
        ConfigError: unknown recipe, malformed rule, a rule that matches nothing or is overridden
            everywhere, nothing converted, a model that was converted before, or one that is itself
            a linear.
        UnsupportedError: the backend cannot run here.
    """
    rules = () if rules is None else rules
    if isinstance(rules, str):
        raise ConfigError(f"rules = {rules!r} must be a list of 'glob=recipe' strings")
    check_types(bool, experts=experts)
    check_types(Integral, seed=seed)
    resolve(backend)
    selection = Selection(
        get_recipe(recipe),
        parse_rules(rules),
        bf16_first_layers,
        bf16_last_fraction,
        rht,
        sr,
        weights_2d,
        tensor_scale,
    )
    chosen = choose(model, selection, experts)
    return swap(chosen, backend, seed)


@dataclass(frozen=True)
class Chosen:
    """What of a model is to be converted, before anything of it is.

    Attributes:
        sites: What multiplies by a weight.
        choices: The choice for each of them.
        report: What a user is told.
    """

    sites: list[_Site]
    choices: list[Choice]
    report: Report

    def linears(self) -> dict[str, nn.Linear]:
        """The linears to convert by FQN; one that is registered twice is there twice."""
        pairs = zip(self.sites, self.choices, strict=True)
        return {
            site.names[0]: site.module
            for site, choice in pairs
            if site.kind == LINEAR and choice.recipe.quantized
        }


def choose(model: nn.Module, selection: Selection, experts: bool) -> Chosen:
    """Choose what of a model is converted; nothing of it changes.

    Args:
        model: As `convert` takes it.
        selection: What decides.
        experts: Whether routed experts are converted too.

    Raises:
        ConfigError: as of `convert`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"convert takes a model, an nn.Module, not {type(model).__name__}")
    _check_model(model)
    sites = _linears(model) + _experts(model)
    blocks = _blocks(model, sites)
    if selection.bf16_first_layers and not blocks:
        raise ConfigError(
            "bf16_first_layers needs a model with numbered blocks (a ModuleList or ModuleDict): "
            "name its first linears in rules instead"
        )
    _check_rules(selection, sites)
    choices = _agreed(sites, [_choose(selection, site, blocks, experts) for site in sites])
    notes = _notes(selection, sites, blocks, _others(model, sites))
    report = Report(tuple(site.entry(c) for site, c in zip(sites, choices, strict=True)), notes)
    if selection.recipe.quantized and not report.converted:
        reasons = ", ".join(sorted({entry.reason for entry in report.entries}))
        raise ConfigError(
            f"nothing to convert: all {len(report.entries)} linears and expert weights stay in "
            f"high precision ({reasons or 'there are none'}): loosen these, or drop the converter"
            + "".join(f"; {note}" for note in notes)
        )
    return Chosen(sites, choices, report)


def swap(chosen: Chosen, backend: str | Backend, seed: int = 0) -> Report:
    """Convert what was chosen, in place; arguments, result and errors as of `convert`."""
    sites, choices = chosen.sites, chosen.choices
    used = {choice.recipe for choice in choices if choice.recipe.quantized}
    backends = {recipe: resolve(backend, recipe) for recipe in used}
    linears: dict[nn.Module, Recipe] = {}
    experts: dict[nn.Module, dict[str, Recipe]] = {}
    for site, choice in zip(sites, choices, strict=True):
        if site.kind == EXPERTS and choice.recipe.quantized:
            experts.setdefault(site.module, {})[site.attribute] = choice.recipe
        if site.kind == LINEAR:
            linears[site.module] = choice.recipe
    first_names = {site.module: site.names for site in reversed(sites)}
    for module, recipe in linears.items():
        if recipe.quantized:
            NVFP4Linear.from_linear(
                module,
                recipe=recipe,
                backend=backends[recipe],
                name=first_names[module][0],
                seed=seed,
            )
    for module, recipes in experts.items():
        convert_experts(module, recipes, backends, first_names[module][1], seed)
    names = tuple(sorted({backend.name for backend in backends.values()}))
    return replace(chosen.report, backends=names)


def _agreed(sites: list[_Site], choices: list[Choice]) -> list[Choice]:
    """One choice for a linear that is registered under several names.

    A rule for one of them decides for all; without rules, what keeps one in high precision.
    """
    owners: dict[tuple[nn.Module, str], list[int]] = {}
    for i, site in enumerate(sites):
        owners.setdefault((site.module, site.attribute), []).append(i)
    agreed = list(choices)
    for places in owners.values():
        if len({choices[i].recipe for i in places}) == 1:
            continue
        ruled = [i for i in places if choices[i].reason.startswith("rule ")]
        if len({choices[i].recipe for i in ruled}) > 1:
            names = ", ".join(f"{sites[i].names[0]} ({choices[i].reason})" for i in ruled)
            raise ConfigError(
                f"one linear gets several recipes by its names {names}: let the rules agree"
            )
        first = (ruled or [i for i in places if not choices[i].recipe.quantized] or places)[0]
        obstacles = [sites[i].obstacle for i in places if sites[i].obstacle]
        if obstacles and choices[first].recipe.quantized:
            raise ConfigError(
                f"{choices[first].reason} names {sites[first].names[0]}, which {obstacles[0]}"
            )
        other = f"shared with {sites[first].names[0]} ({choices[first].reason})"
        for i in set(places) - {first}:
            agreed[i] = Choice(choices[first].recipe, other)
    return agreed


def _notes(
    selection: Selection, sites: list[_Site], blocks: dict[str, int], others: list[str]
) -> tuple[str, ...]:
    """What of the defaults found nothing in this model, and what the report leaves out."""
    notes = []
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        notes.append(
            f"{others[0]}{more} are matrices of no nn.Linear: they stay as they are, and in no "
            "share of FLOPs"
        )
    outside = [site for site in sites if not f"{site.names[0]}.".startswith(tuple(blocks))]
    if selection.bf16_last_fraction and not blocks:
        notes.append(
            "no numbered blocks (a ModuleList or ModuleDict) with linears: bf16_last_fraction "
            "keeps none; name the last linears in rules"
        )
    heads = [rule for rule in DEFAULT_RULES if "output" in rule.glob or "lm_head" in rule.glob]
    decided = (*heads, *selection.rules)
    if not any(rule.matches(site.names) for rule in decided for site in outside):
        notes.append(
            "nothing is named as an lm head (output, lm_head): if the model has one, keep it with "
            "a rule such as head=bf16"
        )
    return tuple(notes)


def _check_model(model: nn.Module) -> None:
    if isinstance(model, nn.Linear):
        raise ConfigError("the model is itself a linear: build an NVFP4Linear instead")
    for fqn, module in model.named_modules():
        if isinstance(module, Converted):
            raise ConfigError(f"{fqn} was converted before: convert a model once")
    for fqn, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ConfigError(f"{fqn} has no shape yet: run a batch through the model first")


def _children(model: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """(FQN, parent, child) of every registration of a module, repeated ones included."""
    return [
        (f"{fqn}.{name}" if fqn else name, parent, child)
        for fqn, parent in model.named_modules(remove_duplicate=False)
        for name, child in parent._modules.items()
        if child is not None
    ]


_WRAPPERS = re.compile(r"^module\.|(_orig_mod|_checkpoint_wrapped_module)\.")


def _others(model: nn.Module, sites: list[_Site]) -> list[str]:
    """FQNs of matrices that are neither linears', experts' nor embeddings'."""
    known = {id(getattr(site.module, site.attribute)) for site in sites}
    return [
        f"{fqn}.{name}" if fqn else name
        for fqn, module in model.named_modules()
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.Linear)
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 2 and min(weight.shape) > 1 and id(weight) not in known
    ]


def _linears(model: nn.Module) -> list[_Site]:
    """Every linear of the model, in model order."""
    found = []
    for fqn, parent, child in _children(model):
        if isinstance(child, nn.Linear):
            shape = (child.out_features, child.in_features)
            flops = 2 * shape[0] * shape[1]
            obstacle = _obstacle(child, parent)
            # Under a wrapper (torch.compile's, DataParallel's) it goes by its own name too.
            names = tuple(dict.fromkeys((fqn, _WRAPPERS.sub("", fqn))))
            found.append(_Site(child, "weight", names, LINEAR, shape, flops, obstacle))
    return found


def _experts(model: nn.Module) -> list[_Site]:
    """Every 3D weight that may be routed experts; it answers to its own and its module's name."""
    found = []
    modules = dict(model.named_modules())
    for fqn, module in modules.items():
        # A token runs through top_k of the experts; the router beside them knows how many, whatever
        # it is called.
        parent = modules[fqn.rpartition(".")[0]]
        known = (getattr(m, "top_k", None) for m in (parent, *parent.children()))
        top_k = max((k for k in known if isinstance(k, int)), default=1)
        experts = expert_weights(module)
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() != 3 or isinstance(module, _CONVOLUTIONS):
                continue
            if len(weight) == 1 and name not in experts:
                continue  # an embedding of positions or a token
            obstacle = None
            if type(weight) is not nn.Parameter:
                obstacle = f"its weight is a {type(weight).__name__}, not a plain parameter"
            elif name not in experts:
                obstacle = "3D weight of a module without num_experts"
            elif type(module).forward is nn.Module.forward:
                obstacle = "its module has no forward, so others read the weight"
            elif "forward" in module.__dict__:
                obstacle = "its module's forward was replaced, and would not be this one's"
            shape = tuple(weight.shape)
            flops = 2 * shape[1] * shape[2] * top_k
            names = (f"{fqn}.{name}" if fqn else name, fqn)
            found.append(_Site(module, name, names, EXPERTS, shape, flops, obstacle))
    return found


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of weights; float64 ones need autocast."""

_CONVOLUTIONS = nn.Conv1d | nn.ConvTranspose1d


def _obstacle(module: nn.Linear, parent: nn.Module) -> str | None:
    """Why a linear cannot be converted, None where it can."""
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, not a plain nn.Linear"
    if type(module.weight) is not nn.Parameter:
        return f"has a weight that is a {type(module.weight).__name__}, not a plain parameter"
    if module.weight.dtype not in _DTYPES or module.weight.layout is not torch.strided:
        return f"has a weight of {module.weight.dtype}, {module.weight.layout}"
    if not module.weight.numel():
        return "has a weight without elements"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "is read by nn.TransformerEncoderLayer's fast path"
    return None


def _choose(selection: Selection, site: _Site, blocks: dict[str, int], experts: bool) -> Choice:
    fqn = site.names[0]
    block = next((i for prefix, i in blocks.items() if f"{fqn}.".startswith(prefix)), None)
    choice = selection.choose(site.names, block, len(blocks))
    if choice.reason == "recipe" and site.kind == EXPERTS and not experts:
        return Choice(get_recipe("bf16"), "experts = false")
    if choice.recipe.quantized and site.obstacle:
        if choice.reason.startswith("rule "):
            raise ConfigError(f"{choice.reason} names {fqn}, which {site.obstacle}")
        return Choice(get_recipe("bf16"), site.obstacle)
    return choice


def _blocks(model: nn.Module, sites: list[_Site]) -> dict[str, int]:
    """FQN prefixes of the transformer blocks, "layers.0." and so on, with their index.

    The blocks are the children of the ModuleList or ModuleDict whose children are numbered and
    spend the most FLOPs, of a decoder more than of its encoder, among equals of the longest. One of
    linears may be heads: it counts only where there is no other. There are none in a plain
    nn.Sequential, which is a function and not a stack of blocks.
    """
    found = []
    for fqn, module in model.named_modules(remove_duplicate=False):
        names = list(module._modules)
        stack = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if not stack or isinstance(module, ParametrizationList) or not names:
            continue
        if all(name.isdigit() for name in names):
            prefix = f"{fqn}." if fqn else ""
            inside = [site for site in sites if site.names[0].startswith(prefix)]
            flops = sum(site.flops_per_token for site in inside)
            holds = not all(isinstance(child, nn.Linear) for child in module.children())
            order = {f"{prefix}{n}.": i for i, n in enumerate(sorted(names, key=int))}
            if flops:
                found.append((holds, flops, len(names), order))
    return max(found, key=lambda item: item[:3])[3] if found else {}


def _check_rules(selection: Selection, sites: list[_Site]) -> None:
    for i, rule in enumerate(selection.rules):
        matched = [site for site in sites if rule.matches(site.names)]
        later = selection.rules[i + 1 :]
        if matched and all(any(other.matches(s.names) for other in later) for s in matched):
            raise ConfigError(
                f"rule '{rule.glob}={rule.recipe}' decides nothing: later rules match all of its "
                f"{len(matched)} modules, and the last match wins; move it to the end, or drop it"
            )
        if not matched:
            examples = ", ".join(site.names[0] for site in sites[:3])
            raise ConfigError(
                f"rule '{rule.glob}={rule.recipe}' matches no linear or expert weight; names look "
                f"like {examples}"
            )
