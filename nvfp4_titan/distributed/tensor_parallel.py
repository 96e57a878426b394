"""Linears over DTensors: which operand is sharded where, and what must be reduced.

    style      x (M, K)     w (N, K)     y, dy (M, N)         amaxes reduced     dx        dw
    colwise    Replicate    Shard(0)     Shard(-1)            w; dy              Partial   Shard(0)
    rowwise    Shard(-1)    Shard(1)     Partial, Replicate   x, w               Shard(-1) Shard(1)
    none       Replicate    Replicate    Replicate            nothing            Replicate Replicate

Sequence parallelism gathers or scatters around these, so a linear sees one of the three. An amax is
reduced over the axis that shards its operand, and SR counts from the shard's place in the whole:
then a shard's codes and scales are those of the whole (where shards are multiples of 16), and what
remains different from one device is the order of the partial sums.

Over data-parallel axes nothing is reduced: FSDP hands out whole weights, and every microbatch has
its own amax.
"""

from dataclasses import dataclass

import torch
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..errors import UnsupportedError


@dataclass(frozen=True)
class OperandShard:
    """An operand's place in the whole.

    Attributes:
        sharded: Whether ranks hold different parts of it, so that its amax must be reduced.
        offset: Global (row, column) of the local part's first element.
    """

    sharded: bool = False
    offset: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class GemmShards:
    """Places of a GEMM's operands, and the mesh of one dim whose ranks share them."""

    mesh: DeviceMesh
    x: OperandShard
    w: OperandShard
    dy: OperandShard

    @staticmethod
    def colwise(mesh: DeviceMesh, features: int) -> "GemmShards":
        """W (N, K) sharded along N = `features`."""
        n = first_index(features, mesh.get_local_rank(), mesh.size())
        w, dy = OperandShard(True, (n, 0)), OperandShard(True, (0, n))
        return GemmShards(mesh, OperandShard(), w, dy)

    @staticmethod
    def rowwise(mesh: DeviceMesh, features: int) -> "GemmShards":
        """W (N, K) sharded along K = `features`."""
        k = first_index(features, mesh.get_local_rank(), mesh.size())
        x_and_w = OperandShard(True, (0, k))
        return GemmShards(mesh, x_and_w, x_and_w, OperandShard())

    @staticmethod
    def whole(mesh: DeviceMesh) -> "GemmShards":
        """Nothing is sharded."""
        return GemmShards(mesh, OperandShard(), OperandShard(), OperandShard())


@dataclass(frozen=True)
class LocalGemm:
    """A linear over DTensors as a linear over local tensors.

    Attributes:
        x: (..., K) local tensor.
        w: (N, K) local tensor.
        shards: Places of the operands.
        output: Placement of y.
        features: Global N.
    """

    x: torch.Tensor
    w: torch.Tensor
    shards: GemmShards
    output: Placement
    features: int

    def wrap(self, y: torch.Tensor) -> DTensor:
        """The local result (..., N) as a DTensor."""
        # Spelled out: shards may be uneven.
        shape = torch.Size((*y.shape[:-1], self.features))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            y, self.shards.mesh, (self.output,), run_check=False, shape=shape, stride=stride
        )


def localize(x: DTensor, w: DTensor) -> LocalGemm:
    """Take a linear's DTensor operands apart.

    Args:
        x: (..., K) DTensor on a mesh of one dim.
        w: (N, K) DTensor on the same mesh.

    Raises:
        UnsupportedError: another mesh or another pair of placements than the module's table has.
    """
    if not (isinstance(x, DTensor) and isinstance(w, DTensor)):
        raise UnsupportedError(
            f"x is a {type(x).__name__} and w a {type(w).__name__}: parallelize the module that "
            "holds this linear, or keep it in bf16 with a rule"
        )
    mesh = w.device_mesh
    if x.device_mesh != mesh or mesh.ndim != 1:
        raise UnsupportedError(
            f"NVFP4 linears take DTensors of one mesh with one dim, got {x.device_mesh} and {mesh}"
        )
    placements = x.placements[0], w.placements[0]
    last = Shard(x.dim() - 1)
    if placements == (Replicate(), Shard(0)):
        shards = GemmShards.colwise(mesh, w.shape[0])
        grad, output = Partial(), last
    elif placements == (last, Shard(1)):
        shards = GemmShards.rowwise(mesh, w.shape[1])
        grad, output = last, Partial()
    elif placements == (Replicate(), Replicate()):
        shards = GemmShards.whole(mesh)
        grad, output = Replicate(), Replicate()
    else:
        raise UnsupportedError(
            f"NVFP4 linears do not take x {x.placements} with w {w.placements}: use "
            "ColwiseParallel, RowwiseParallel or NoParallel, or keep this linear in bf16 with a "
            "rule"
        )
    return LocalGemm(
        x.to_local(grad_placements=(grad,)),
        w.to_local(grad_placements=w.placements),
        shards,
        output,
        w.shape[0],
    )


def expert_shards(w: DTensor) -> GemmShards | None:
    """Places of the GEMMs' operands over expert weights, None where every expert is whole.

    Args:
        w: (E, N, K) DTensor. Sharding along E (expert parallelism) leaves experts whole; along N or
            K it is their colwise or rowwise tensor parallelism.

    Raises:
        UnsupportedError: more than one mesh dim shards experts, or a partial sum.
    """
    mesh, cut = w.device_mesh, []
    for axis, placement in enumerate(w.placements):
        if placement.is_partial():
            raise UnsupportedError(
                f"expert weights are placed as {w.placements}: reduce them first"
            )
        if placement.is_shard() and placement.dim != 0:
            cut.append((axis, placement.dim))
    if not cut:
        return None
    if len(cut) > 1:
        raise UnsupportedError(
            f"NVFP4 experts are sharded by one mesh dim at most, got {w.placements}: use one of "
            "tensor_parallel_degree and expert_tensor_parallel_degree, or nvfp4.experts = false"
        )
    axis, dim = cut[0]
    if mesh.ndim > 1:
        mesh = mesh[mesh.mesh_dim_names[axis]]
    make = GemmShards.colwise if dim == 1 else GemmShards.rowwise
    return make(mesh, w.shape[dim])


def first_index(size: int, rank: int, ranks: int) -> int:
    """Global index where a rank's shard of a dim begins (torch.chunk's split)."""
    # Not DTensor's own helper: torch.compile cannot trace that one.
    return min(size, rank * -(-size // ranks))


def reduced_amax(
    amax: torch.Tensor, ranks: DeviceMesh | torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Maximum of fp32 amaxes over a mesh's or a group's ranks; a NaN on any rank stays."""
    # As integers: non-negative floats keep their order, and NaN is the largest.
    reduced = collectives.all_reduce(amax.view(torch.int32), "max", ranks)
    return collectives.wait_tensor(reduced).view(torch.float32)
