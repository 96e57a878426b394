"""What the autograd functions need to know of sharding: DTensors, amaxes, FSDP gathers."""

from .fp4_gather import GatheredWeight, amax_in_dtypes, amax_of_uses, gathered_operand
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
    "amax_in_dtypes",
    "amax_of_uses",
    "expert_shards",
    "fsdp_records",
    "gathered_operand",
    "localize",
    "reduced_amax",
    "weight_amaxes",
]
