"""Amaxes of all weights of a model, from the shards that the optimizer holds.

A weight's amax is needed before its shards can travel quantized, and it is the same from one
optimizer step to the next: it is taken once a step, of every weight in one sweep, with one
reduction per group of ranks, in place of a reduction per linear and call.

Axes that are reduced: every one that shards the weight, but expert parallelism's, whose ranks hold
other experts. Replicas hold the same weights.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..errors import UnsupportedError
from .tensor_parallel import first_index, reduced_amax


@dataclass(frozen=True)
class ShardedWeight:
    """A weight as the optimizer holds it.

    Attributes:
        module: Module that the weight belongs to.
        name: Its name there.
        experts: Whether it is (E, N, K), with an amax per expert.
        fsdp: FSDP2's record of the parameter, None where FSDP does not shard it.
    """

    module: nn.Module
    name: str
    experts: bool
    fsdp: object | None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, sharded also while FSDP has it gathered."""
        if self.fsdp:
            return self.fsdp.sharded_param
        if self.name not in self.module._parameters:
            raise UnsupportedError(
                f"{self.name} of {type(self.module).__name__} is no parameter any more "
                "(parametrized or pruned): do that before track_weights, or leave it as it is"
            )
        return self.module._parameters[self.name]

    @property
    def local(self) -> torch.Tensor:
        """This rank's part of it."""
        p = self.parameter
        return p._local_tensor if isinstance(p, DTensor) else p.detach()

    @property
    def device(self) -> torch.device:
        """Where it is computed with; with CPU offload not where it is kept."""
        return self.fsdp.device if self.fsdp else self.local.device

    def groups(self) -> tuple[distributed.ProcessGroup, ...]:
        """The groups whose ranks hold parts of the same (E, N, K) or (N, K)."""
        p, groups = self.parameter, []
        axes = range(p.device_mesh.ndim) if isinstance(p, DTensor) else ()
        if self.fsdp:
            # FSDP's own axes come first.
            axes = axes[self.fsdp.mesh_info.mesh.ndim :]
            if self.fsdp_ranks > 1:
                groups.append(self.fsdp.mesh_info.shard_process_group)
        for axis in axes:
            placement = p.placements[axis]
            if placement.is_shard() and not (self.experts and placement.dim == 0):
                groups.append(p.device_mesh.get_group(axis))
        return tuple(groups)

    @property
    def fsdp_ranks(self) -> int:
        """Ranks over which FSDP shards the weight."""
        return getattr(self.fsdp.mesh_info, "shard_mesh_size", 1) if self.fsdp else 1

    def slots(self) -> tuple[int, int]:
        """Number of amaxes of the whole, and the first that this rank has a part in."""
        if not self.experts:
            return 1, 0
        if self.fsdp_ranks == 1 or self.fsdp.fsdp_placement.dim != 0:
            return self.local.shape[0], 0
        count = self.fsdp._orig_size[0]
        return count, first_index(count, self.fsdp.mesh_info.shard_mesh_rank, self.fsdp_ranks)


def fsdp_records(model: nn.Module) -> dict[tuple[nn.Module, str], object]:
    """FSDP2's record of each parameter that it shards, by module and name."""
    records = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            # torch 2.11 has one group, 2.13 a list.
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for record in (r for group in groups if group for r in group.fsdp_params):
                owner = record._module_info
                places = zip(owner.shared_modules, owner.shared_param_names, strict=True)
                for place in ((owner.module, owner.param_name), *places):
                    records[place] = record
    return records


@torch.no_grad()
def weight_amaxes(weights: Sequence[ShardedWeight]) -> list[torch.Tensor]:
    """Amaxes of whole weights, reduced over the ranks that share them.

    Args:
        weights: In the same order on all ranks.

    Returns:
        For each weight fp32 () or (E,), NaN where it holds one.
    """
    parts, places, counts = [], [], []
    for weight in weights:
        count, first = weight.slots()
        local = weight.local.as_subclass(torch.Tensor)
        for slot, part in enumerate(local if weight.experts else [local], sum(counts) + first):
            if part.numel():
                parts.append(part)
                places.append(slot)
        counts.append(count)
    # 0 for what this rank has no part of.
    device = weights[0].device if weights else None
    amaxes = torch.zeros(sum(counts), dtype=torch.float32, device=device)
    if parts:
        # The infinity norm is max |x|, of hundreds of tensors in a few kernels.
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(parts, float("inf"))])
        # Indexing by a list would wait for all that the GPU still has to do.
        index = torch.tensor(places).to(amaxes.device, non_blocking=True)
        amaxes.index_copy_(0, index, norms.to(amaxes.device))
    by_weight = amaxes.split(counts)
    _reduce(weights, by_weight)
    return [
        amax if weight.experts else amax[0] for weight, amax in zip(weights, by_weight, strict=True)
    ]


def _reduce(weights: Sequence[ShardedWeight], amaxes: Sequence[torch.Tensor]) -> None:
    """Reduce amaxes in place over the ranks that share each weight, one call per group."""
    by_groups = defaultdict(list)
    for weight, amax in zip(weights, amaxes, strict=True):
        by_groups[weight.groups()].append(amax)
    for groups, members in by_groups.items():
        if not groups:
            continue
        joined = torch.cat(members)
        for group in groups:
            joined = reduced_amax(joined, group)
        torch._foreach_copy_(members, joined.split([len(amax) for amax in members]))
