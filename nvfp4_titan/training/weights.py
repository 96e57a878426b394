"""What is known of a model's weights between optimizer steps: amaxes, operands, FSDP's gathers.

`track_weights` hooks the model's forward. Its first forward, then each optimizer step, takes the
amaxes of all converted weights in one sweep (`distributed.weights`); the microbatches that follow,
validation included, find them. With `fp4_all_gather` FSDP gathers weights in codes
(`distributed.fp4_gather`).

With `keep_weights` weights are quantized once an optimizer step too, by the first forward after it:
microbatches, recomputed forwards and pipeline schedules' many calls use the same operands. Weights
that FSDP shards are left out (whole operands would undo the sharding). With `keep_codes` a shard
that is gathered in codes is quantized right after the optimizer step, for forward and backward.

Every rank must find amaxes stale at the same point, so staleness is told, not found out: by
`refresh_weights` (after an optimizer step), by `invalidate_weights` (after writing weights by hand)
and by the model's `load_state_dict`. They are taken at once and not at the next forward: pipeline
schedules of several stages gather weights before that. Of weights that no rank shares a forward
also sees by itself that they were written or exchanged (not by DTensors' fused optimizers).

Weights that an inference engine joins into one GEMM (q, k, v; gate and up) need one scale per
tensor for all of them: `shared` groups are given the largest amax among them.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from ..distributed import ShardedWeight, amax_in_dtypes, fsdp_records, weight_amaxes
from ..distributed.fp4_gather import Known, attach, obstacle
from ..errors import ConfigError
from .experts import Converted, WrappingExperts
from .functions import KeptWeight
from .linear import autocast_dtype

_STATE = "_nvfp4_weights"
_logger = logging.getLogger(__name__)


@dataclass
class _State:
    """Of a model whose weights are tracked."""

    fp4_all_gather: bool
    keep_weights: bool
    keep_codes: bool
    fresh: bool = False
    weights: list[ShardedWeight] = field(default_factory=list)
    reported: bool = False
    known: Known = field(default_factory=Known)
    versions: list[tuple[int, ...]] = field(default_factory=list)
    shared: tuple[tuple[str, ...], ...] = ()
    groups: list[list[int]] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)


def track_weights(
    model: nn.Module,
    *,
    fp4_all_gather: bool = False,
    keep_weights: bool = False,
    keep_codes: bool = False,
    shared: Sequence[Sequence[str]] = (),
) -> None:
    """Take the amaxes of a converted model's weights once per optimizer step.

    Call on the model whose forward is called, before or after sharding; copies (pipeline stages)
    track their own. Call `refresh_weights` after every optimizer step.

    Args:
        model: From `convert`.
        fp4_all_gather: Have FSDP2 gather weights in codes and scales where it can.
        keep_weights: Keep weights' operands from an optimizer step to the next: 0.56 bytes per
            element of a weight, or 2 where the backend multiplies bf16 values.
        keep_codes: Keep the codes of shards that FSDP gathers in codes: 0.5 bytes per element of a
            shard and one per block. Not with CPU offload.
        shared: Names of linears (or expert weights) of one parent that are given one amax.
    """
    state = _State(fp4_all_gather, keep_weights, keep_codes, shared=tuple(map(tuple, shared)))
    setattr(model, _STATE, state)
    state.hooks = [
        model.register_forward_pre_hook(_before_forward),
        model.register_load_state_dict_post_hook(_after_load),
    ]


def untrack_weights(model: nn.Module) -> None:
    """Have a tracked model know its weights' amaxes for good; nothing for one that is not tracked.

    For weights that will not change again.
    """
    if not hasattr(model, _STATE):
        return
    _before_forward(model, ())
    for hook in getattr(model, _STATE).hooks:
        hook.remove()
    delattr(model, _STATE)


def invalidate_weights(model: nn.Module) -> None:
    """Tell a model that its weights changed, by `.data` or in place: as `refresh_weights`."""
    refresh_weights(model)


def keep_no_codes(model: nn.Module) -> None:
    """Have backward quantize weights that FSDP gathers again, in place of keeping their codes."""
    for module in model.modules():
        if isinstance(module, Converted):
            module.requantize = True


def refresh_weights(model: nn.Module) -> None:
    """Take the amaxes of a tracked model again, now that its weights changed; on all ranks alike.

    No backward may be outstanding: what a forward kept may read the amaxes that it replaces.

    Before the first forward, where the shards are not yet known, it is left to that forward. Does
    nothing for a model that is not tracked (`track_weights`), as `convert` alone leaves it: its
    amaxes are taken in every forward.

    Raises:
        ConfigError: a part of a tracked model: what is told must be told to the whole.
    """
    state = _state(model)
    if state is None:
        return
    state.fresh = False
    if state.weights:
        _refresh(state)


def _state(model: nn.Module) -> "_State | None":
    state = getattr(model, _STATE, None)
    if state is None and any(getattr(m, "weight_amaxes", None) for m in model.modules()):
        raise ConfigError(
            "this is a part of a model whose weights are tracked: give the whole, which "
            "track_weights was called with"
        )
    return state


def _after_load(model: nn.Module, incompatible_keys) -> None:
    refresh_weights(model)


def _before_forward(model: nn.Module, args) -> None:
    state = getattr(model, _STATE)
    if not state.fresh or _written(state):
        if not state.weights:
            state.weights = converted_weights(model)
            state.groups = _shared_groups(model, state)
        _refresh(state)
    if state.keep_weights:
        _keep(state)


def _shared_groups(model: nn.Module, state: _State) -> list[list[int]]:
    """Positions in `weights` of those that share an amax."""
    places = {(weight.module, weight.name): i for i, weight in enumerate(state.weights)}
    groups = []
    for module in model.modules():
        for names in state.shared:
            keys = [
                (module, name) if name in module._parameters else (getattr(module, name), "weight")
                for name in names
                if hasattr(module, name)
            ]
            found = [places[key] for key in keys if key in places]
            if len(found) > 1:
                groups.append(found)
    return groups


def _known_amaxes(state: _State) -> list[torch.Tensor]:
    """`amax_in_dtypes` of every weight, (2,) or (E, 2)."""
    amaxes = weight_amaxes(state.weights)
    for group in state.groups:
        largest = torch.stack([amaxes[i] for i in group]).amax(0)
        for i in group:
            amaxes[i] = largest
    known = amax_in_dtypes(torch.cat([amax.reshape(-1) for amax in amaxes]))
    parts = known.split([amax.numel() for amax in amaxes])
    return [part.reshape(*amax.shape, 2) for part, amax in zip(parts, amaxes, strict=True)]


def _refresh(state: _State) -> None:
    with torch.inference_mode(False), torch.no_grad():
        if state.weights:
            amaxes = _known_amaxes(state)
            # In place: compiled graphs and gathered weights hold the tensors.
            held = [_held(weight, amax) for weight, amax in zip(state.weights, amaxes, strict=True)]
            torch._foreach_copy_(held, amaxes)
        state.known.epoch += 1
        if state.fp4_all_gather:
            _gather_quantized(state)
    if torch.cuda.is_available() and state.weights and state.weights[0].device.type == "cuda":
        # FSDP gathers on a stream of its own.
        state.known.record()
    for module in {weight.module for weight in state.weights}:
        if module.kept_weights is not None:
            module.kept_weights = {}
    state.versions = _versions(state)
    state.fresh = True


def _held(weight: ShardedWeight, amax: torch.Tensor) -> torch.Tensor:
    """The tensor in which a weight's module has its amax, made for the first one."""
    held = weight.module.weight_amaxes
    if weight.name not in held:
        held[weight.name] = torch.empty_like(amax)
    return held[weight.name]


def _versions(state: _State) -> list[tuple[int, ...]]:
    """Which the weights are and how often they were written, of those that no rank shares.

    Of others a rank that sees a change alone would wait for the rest.
    """
    own = [w.parameter for w in state.weights if w.fsdp is None and not w.groups()]
    local = [p._local_tensor if isinstance(p, DTensor) else p for p in own]
    # A write to a DTensor counts with itself, one to its local tensor with that; `.data = other`
    # counts nowhere, but brings a storage of its own.
    return [
        (id(p), _version(p), _version(part), part.untyped_storage()._cdata)
        for p, part in zip(own, local, strict=True)
    ]


def _version(t: torch.Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _written(state: _State) -> bool:
    # A model that is compiled whole is traced here, and no compiler knows versions.
    return not torch.compiler.is_compiling() and _versions(state) != state.versions


def _keep(state: _State) -> None:
    """Quantize the weights whose operands are kept and not there."""
    for weight in state.weights:
        module, name = weight.module, weight.name
        if weight.fsdp is not None or module.being_observed:
            continue
        if module.kept_weights is None:
            module.kept_weights = {}
        if name in module.kept_weights:
            continue
        recipe, backend = module.recipes()[name]
        local, amax = weight.local, module.weight_amaxes[name]
        with torch.inference_mode(False), torch.no_grad():
            # None too is remembered: that there is nothing to keep.
            module.kept_weights[name] = (
                KeptWeight.of(local, recipe, backend, _compute_dtype(weight), amax)
                if local.is_contiguous()
                else None
            )


def _compute_dtype(weight: ShardedWeight) -> torch.dtype:
    """Dtype that the forward which begins multiplies a weight in."""
    if weight.experts and getattr(weight.module, "use_grouped_mm", False):
        return torch.bfloat16  # torchtitan casts to it
    return autocast_dtype(weight.local) or weight.local.dtype


def converted_weights(model: nn.Module) -> list[ShardedWeight]:
    """All weights of a model that run quantized, in the same order on all ranks."""
    records = fsdp_records(model)
    return [
        ShardedWeight(
            module, name, isinstance(module, WrappingExperts), records.get((module, name))
        )
        for module in model.modules()
        if isinstance(module, Converted)
        for name in module.recipes()
    ]


def _gather_quantized(state: _State) -> None:
    left, recipes = defaultdict(list), defaultdict(set)
    for weight in state.weights:
        recipes[id(weight.fsdp)].add(weight.module.recipes()[weight.name][0])
    for weight in state.weights:
        recipe, backend = weight.module.recipes()[weight.name]
        reason = obstacle(weight, recipe)
        if weight.fsdp is not None and len(recipes[id(weight.fsdp)]) > 1:
            reason = "linears of several recipes read it"
        if reason is None:
            amaxes, keep = weight.module.weight_amaxes, state.keep_codes
            attach(weight, amaxes, recipe, backend, state.known, keep)
        else:
            fqn = weight.fsdp and weight.fsdp._param_fqn
            left[reason].append(fqn or weight.name)
    if state.reported:
        return
    state.reported = True
    count = len(state.weights) - sum(map(len, left.values()))
    log = _logger.info if count else _logger.warning
    log(f"FSDP gathers {count} of {len(state.weights)} converted weights in NVFP4")
    for reason, names in left.items():
        _logger.info(f"{len(names)} stay in high precision, such as {names[0]}: {reason}")
