"""What the autograd functions need to know about sharding: DTensor layouts and amax reduction."""

from .tensor_parallel import (
    GemmShards,
    LocalGemm,
    OperandShard,
    expert_shards,
    localize,
    reduced_amax,
)

__all__ = [
    "GemmShards",
    "LocalGemm",
    "OperandShard",
    "expert_shards",
    "localize",
    "reduced_amax",
]
