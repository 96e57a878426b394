"""Amaxes of all weights of a model, from the shards that the optimizer holds.

A weight's amax is needed before its shards can travel quantized, and it is the same from one
optimizer step to the next: it is taken once a step, of every weight in one sweep, with one
reduction per group of ranks, in place of a reduction per linear and call.

Axes that are reduced: every one that shards the weight, but expert parallelism's, whose ranks hold
other experts. Replicas hold the same weights.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


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
        return self.fsdp.sharded_param if self.fsdp else self.module._parameters[self.name]

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

    def slots(self) -> tuple[int, int, int]:
        """Number of amaxes of the whole, and the range of them that this rank has a part in."""
        if not self.experts:
            return 1, 0, 1
        if self.fsdp_ranks == 1 or self.fsdp.fsdp_placement.dim != 0:
            count = self.local.shape[0]
            return count, 0, count
        count = self.fsdp._orig_size[0]
        first = min(count, self.fsdp.mesh_info.shard_mesh_rank * -(-count // self.fsdp_ranks))
        return count, first, first + self.local.shape[0]


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
                records[owner.module, owner.param_name] = record
    return records


@torch.no_grad()
def weight_amaxes(weights: Sequence[ShardedWeight]) -> list[torch.Tensor]:
    """Amaxes of whole weights, reduced over the ranks that share them.

    Args:
        weights: In the same order on all ranks.

    Returns:
        For each weight fp32 () or (E,), NaN where it holds one.
    """
    local = _local_amaxes(weights)
    by_groups = defaultdict(list)
    for i, weight in enumerate(weights):
        by_groups[weight.groups()].append(i)
    for groups, members in by_groups.items():
        if not groups:
            continue
        # As integers: non-negative floats keep their order, and NaN is the largest.
        joined = torch.cat([local[i] for i in members]).view(torch.int32)
        for group in groups:
            distributed.all_reduce(joined, distributed.ReduceOp.MAX, group)
        sizes = [len(local[i]) for i in members]
        for i, part in zip(members, joined.view(torch.float32).split(sizes), strict=True):
            local[i] = part
    return [
        amax if weight.experts else amax[0] for weight, amax in zip(weights, local, strict=True)
    ]


def _local_amaxes(weights: Iterable[ShardedWeight]) -> list[torch.Tensor]:
    """Per weight its amaxes, 0 for what this rank has no part of."""
    parts, places = [], []
    for i, weight in enumerate(weights):
        _, first, _ = weight.slots()
        local = weight.local.as_subclass(torch.Tensor)
        for slot, part in enumerate(local if weight.experts else [local], first):
            if part.numel():
                parts.append(part)
                places.append((i, slot))
    amaxes = [torch.zeros(w.slots()[0], device=w.device) for w in weights]
    # The infinity norm is max |x|, of hundreds of tensors in a few kernels.
    norms = torch._foreach_norm(parts, float("inf")) if parts else []
    by_weight = defaultdict(list)
    for (i, slot), norm in zip(places, norms, strict=True):
        by_weight[i].append((slot, norm))
    for i, found in by_weight.items():
        first = found[0][0]
        values = torch.stack([norm for _, norm in found]).to(amaxes[i])
        amaxes[i][first : first + len(found)] = values
    return amaxes
