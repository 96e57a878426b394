"""What the autograd functions need to know of sharding: DTensors, amaxes, FSDP gathers."""

from .fp4_gather import GatheredWeight, gathered_operand, rounded_amax
from .tensor_parallel import (
    GemmShards,
    LocalGemm,
    OperandShard,
    expert_shards,
    localize,
    reduced_amax,
)
from .weights import ShardedWeight, fsdp_records, weight_amaxes

__all__ = [
    "GatheredWeight",
    "GemmShards",
    "LocalGemm",
    "OperandShard",
    "ShardedWeight",
    "expert_shards",
    "fsdp_records",
    "gathered_operand",
    "localize",
    "reduced_amax",
    "rounded_amax",
    "weight_amaxes",
]
