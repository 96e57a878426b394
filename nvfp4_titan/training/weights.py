"""What is known of a model's weights between optimizer steps: amaxes, and how FSDP gathers them.

`track_weights` hooks the model's forward. The first forward after an optimizer step takes the
amaxes of all converted weights in one sweep (`distributed.weights`); the microbatches that follow,
validation included, find them. With `fp4_all_gather` FSDP gathers weights in codes
(`distributed.fp4_gather`).

Every rank must find amaxes stale at the same forward, so staleness is told, not found out:
by `invalidate_weights` (after an optimizer step, or after writing weights by hand) and by
`load_state_dict`.
"""

import logging
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import nn

from ..distributed import ShardedWeight, fsdp_records, weight_amaxes
from ..distributed.fp4_gather import attach, obstacle
from .experts import WrappingExperts
from .linear import NVFP4Linear

_STATE = "_nvfp4_weights"
_logger = logging.getLogger(__name__)


@dataclass
class _State:
    """Of a model whose weights are tracked."""

    fp4_all_gather: bool
    fresh: bool = False
    weights: list[ShardedWeight] = field(default_factory=list)
    reported: bool = False


def track_weights(model: nn.Module, *, fp4_all_gather: bool = False) -> None:
    """Take the amaxes of a converted model's weights once per optimizer step.

    Call on the model whose forward is called, before or after sharding; copies (pipeline stages)
    track their own. Call `invalidate_weights` after every optimizer step.

    Args:
        model: From `convert`.
        fp4_all_gather: Have FSDP2 gather weights in codes and scales where it can.
    """
    setattr(model, _STATE, _State(fp4_all_gather))
    model.register_forward_pre_hook(_before_forward)
    model.register_load_state_dict_post_hook(_after_load)


def invalidate_weights(model: nn.Module) -> None:
    """Tell a tracked model that its weights changed; on all ranks alike."""
    getattr(model, _STATE).fresh = False


def _after_load(model: nn.Module, incompatible_keys) -> None:
    invalidate_weights(model)


def _before_forward(model: nn.Module, args) -> None:
    state = getattr(model, _STATE)
    if state.fresh:
        return
    state.weights = state.weights or _converted_weights(model)
    with torch.no_grad():
        for weight, amax in zip(state.weights, weight_amaxes(state.weights), strict=True):
            known = weight.module.weight_amaxes
            # In place: compiled graphs and gathered weights hold the tensor.
            known[weight.name] = known[weight.name].copy_(amax) if weight.name in known else amax
    if state.fp4_all_gather:
        _gather_quantized(state)
    state.fresh = True


def _converted_weights(model: nn.Module) -> list[ShardedWeight]:
    records = fsdp_records(model)
    return [
        ShardedWeight(
            module, name, isinstance(module, WrappingExperts), records.get((module, name))
        )
        for module in model.modules()
        if isinstance(module, NVFP4Linear | WrappingExperts)
        for name in module.recipes()
    ]


def _gather_quantized(state: _State) -> None:
    left = defaultdict(list)
    for weight in state.weights:
        recipe, backend = weight.module.recipes()[weight.name]
        reason = obstacle(weight, recipe)
        if reason is None:
            attach(weight, weight.module.weight_amaxes, recipe, backend)
        else:
            fqn = weight.fsdp and weight.fsdp._param_fqn
            left[reason].append(fqn or weight.name)
    if state.reported:
        return
    state.reported = True
    count = len(state.weights) - sum(map(len, left.values()))
    _logger.info(f"FSDP gathers {count} of {len(state.weights)} converted weights in NVFP4")
    for reason, names in left.items():
        _logger.info(f"{len(names)} stay in high precision, such as {names[0]}: {reason}")
