"""FSDP2 all-gathers of quantized weights: codes and scales travel, not bf16.

    sharded parameter (plain, fp32) --pre: quantize with the amax of the whole--> codes, scales
    --all-gather, 0.25 of bf16's bytes--> GatheredWeight, the unsharded parameter of a forward
    --QuantizedGemm--> the operand of fprop and dgrad, as it came

It needs weights in square blocks (one operand serves both GEMMs), shards that end where blocks end,
and amaxes known beforehand (`weights.weight_amaxes`). Then a rank's codes and scales are the
whole's, bit for bit. Parameters, optimizers and checkpoints see plain shards: FSDP finds its
extension (`fsdp_pre_all_gather`) on the class of the local tensor alone, which `attach` changes
after sharding.

A layer waits for its gather, and each kernel of a gather waits for room beside the GEMMs of the
layer before. So a shard is best quantized ahead (`attach` with `keep`), once for the gathers of
forward and backward.

What is read of FSDP2 beyond its documented extension: FSDPParam's `sharded_param`, `mesh_info`,
`shard_mesh_from_root`, `mp_policy`, `offload_to_cpu`, `fsdp_placement`, `_orig_size` and
`_init_extensions` (torch 2.11 to 2.13).
"""

from dataclasses import dataclass

import torch

from ..backends import Backend, OperandUse, stream
from ..backends.registration import fake_of, functional_op
from ..errors import UnsupportedError
from ..numerics import QuantizedOperand
from ..recipe import OperandFormat, Recipe
from .weights import ShardedWeight

aten = torch.ops.aten
_SAME = {
    aten._to_copy.default,
    aten.alias.default,
    aten.as_strided.default,
    aten.detach.default,
    aten.view.default,
}
"""Operations that leave a gathered weight what it is, where size and dtype stay."""


class GatheredWeight(torch.Tensor):
    """A gathered weight that exists in codes and scales only; GEMMs read `gathered_operand`.

    Attributes:
        codes: (..., N, Kp / 2) uint8.
        scale: (..., ceil(N / 16), Kp / 16) float8_e4m3fn, one per square block.
        amax: fp32 (2,) or (E, 2), of the whole weight, as `amax_in_dtypes` has it; None for
            formats without a scale per tensor.
        format: OperandFormat.
        transposed: Whether the last two dims are swapped.
    """

    @staticmethod
    def __new__(cls, codes, scale, amax, format, shape, dtype, transposed=False):
        """Make a tensor without storage of its own, of `shape` (..., N, K) if not transposed."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            (*shape[:-2], shape[-1], shape[-2]) if transposed else shape,
            dtype=dtype,
            device=codes.device,
        )

    def __init__(self, codes, scale, amax, format, shape, dtype, transposed=False):
        self.codes, self.scale, self.amax = codes, scale, amax
        self.format, self.transposed = format, transposed
        self.whole = torch.Size(shape)

    def __repr__(self) -> str:
        return f"GatheredWeight({tuple(self.shape)}, {self.format})"

    def __tensor_flatten__(self):
        names = ["codes", "scale"] + ([] if self.amax is None else ["amax"])
        return names, (self.format, self.whole, self.dtype, self.transposed)

    @classmethod
    def __tensor_unflatten__(cls, inner, context, outer_size, outer_stride):
        return cls(inner["codes"], inner["scale"], inner.get("amax"), *context)

    def _with(self, **changes) -> "GatheredWeight":
        fields = ("codes", "scale", "amax", "format", "dtype", "transposed")
        values = {name: getattr(self, name) for name in fields} | {"shape": self.whole}
        return GatheredWeight(**(values | changes))

    def _on(self, device: torch.device | None) -> "GatheredWeight":
        parts, _ = self.__tensor_flatten__()
        return self._with(**{name: getattr(self, name).to(device) for name in parts})

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        weight, options = args[0], kwargs or {}
        if func in _SAME:
            size = args[1] if func in (aten.view.default, aten.as_strided.default) else weight.shape
            dtype = options.get("dtype") or weight.dtype
            if torch.Size(size) == weight.shape and dtype == weight.dtype:
                return weight._on(options.get("device"))
        if func is aten.clone.default:
            parts, _ = weight.__tensor_flatten__()
            return weight._with(**{name: getattr(weight, name).clone() for name in parts})
        if func is aten.t.default or func is aten.transpose.int:
            dims = {d % weight.dim() for d in args[1:]} or {0, 1}
            if dims == {weight.dim() - 2, weight.dim() - 1}:
                return weight._with(transposed=not weight.transposed)
        if func is aten.select.int and args[1] == 0 and weight.dim() == 3:
            parts = {name: getattr(weight, name)[args[2]] for name in ("codes", "scale")}
            amax = None if weight.amax is None else weight.amax[args[2]]
            return weight._with(**parts, amax=amax, shape=weight.whole[1:])
        raise UnsupportedError(
            f"a weight gathered in NVFP4 reached {func}, which needs its values: set "
            "nvfp4.fp4_all_gather = false"
        )


def gathered_operand(
    codes: torch.Tensor,
    scale: torch.Tensor,
    amax: torch.Tensor | None,
    size: int,
    format: OperandFormat,
    dtype: torch.dtype,
) -> QuantizedOperand:
    """The operand of fprop, whose codes serve dgrad too, from a GatheredWeight's tensors.

    Args:
        codes: Its codes.
        scale: Its scales, one per block.
        amax: Its amax.
        size: K.
        format: Its format.
        dtype: Its dtype.
    """
    scale = scale.repeat_interleave(format.block[0], dim=-2)[..., : codes.shape[-2], :]
    amax = None if amax is None else _amax_in(amax, dtype)
    return QuantizedOperand(codes, scale, amax, size, format.format)


def amax_in_dtypes(amax: torch.Tensor) -> torch.Tensor:
    """What is known of a weight's amax: itself, and in bf16, (..., 2) of (...).

    Rounding keeps the order of values: the second is the amax of the weight cast to bf16. Taken for
    all weights together, it costs a linear nothing.
    """
    return torch.stack([amax, _round_through(amax, torch.bfloat16)], -1)


def _amax_in(amaxes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Amax (...) of a weight cast to dtype, from `amax_in_dtypes`."""
    if dtype == torch.float16:
        return _round_through(amaxes[..., 0], dtype)
    return amaxes[..., int(dtype == torch.bfloat16)]


@functional_op("round_through")
def _round_through(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # An op of its own: of two casts inductor drops the first, and with it the rounding.
    return t.to(dtype).to(torch.float32)


@fake_of("round_through")
def _(t, dtype):
    return torch.empty_like(t)


def amax_of_uses(amaxes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(2,) or (2, E), as a backend takes it: the amax of a weight's two uses in dtype."""
    amax = _amax_in(amaxes, dtype)
    return amax.expand(2, *amax.shape)


class Known:
    """When amaxes are known: an event of the stream that takes them; nothing on a CPU.

    Attributes:
        epoch: How often they were taken.
    """

    def __init__(self):
        self._event = None
        self.epoch = 0

    def record(self) -> None:
        """The current stream takes the amaxes up to here."""
        self._event = self._event or torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        """Let the current stream wait for them."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


@dataclass(frozen=True)
class WeightGather:
    """What a shard is quantized with.

    Attributes:
        amaxes: Amaxes by weight name, those of the whole; kept up to date in place.
        name: The weight's name among them.
        recipe: The weight's Recipe.
        backend: Its Backend.
        known: When the amaxes are.
        kept: None, or what was quantized since, by `when`: at most one entry.
    """

    amaxes: dict[str, torch.Tensor]
    name: str
    recipe: Recipe
    backend: Backend
    known: Known
    kept: dict[tuple, tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def format(self) -> OperandFormat:
        """Format of the weight in fprop and dgrad."""
        return self.recipe.fprop.right

    @property
    def amax(self) -> torch.Tensor:
        """fp32 (2,) or (E, 2), of the whole weight."""
        return self.amaxes[self.name]


class QuantizingShard(torch.Tensor):
    """A plain shard that FSDP2 gathers quantized; operations on it give plain tensors.

    Attributes:
        gather: WeightGather.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        # With CPU offload FSDP moves the shard to the device before it asks for its extension.
        if func is torch.Tensor.to and type(result) is torch.Tensor:
            result.__class__, result.gather = cls, args[0].gather
        return result

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """Codes and scales of this rank's shard, as bytes, and what rebuilds the whole."""
        self.gather.known.wait()
        return self.quantized(mesh, mp_policy), None

    def quantized(self, mesh, mp_policy) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales, as bytes; those that are kept, until amaxes are taken again.

        Args:
            mesh: Of the ranks that shard the weight.
            mp_policy: FSDP's MixedPrecisionPolicy.
        """
        gather, dtype = self.gather, mp_policy.param_dtype or self.dtype
        if gather.kept is None:
            return self._quantize(mesh, dtype)
        when = (gather.known.epoch, dtype)
        if when not in gather.kept:
            gather.kept.clear()
            gather.kept[when] = self._quantize(mesh, dtype)
        return gather.kept[when]

    def _quantize(self, mesh, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        shard, gather = self.as_subclass(torch.Tensor).to(dtype), self.gather
        amax = gather.amax
        if amax.dim() > 1:  # of experts, which are split
            first = mesh.get_local_rank() * shard.shape[0]
            amax = amax[first : first + shard.shape[0]]
        use = OperandUse(gather.format, stream("fprop", "right"))
        amaxes = amax_of_uses(amax, shard.dtype)
        operand, _ = gather.backend.quantize(shard, use, None, amax=amaxes)
        scale = operand.plain_scale[..., :: gather.format.block[0], :].contiguous()
        return operand.codes, scale.view(torch.uint8)

    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None):
        """The gathered weight; `out` is the one of before, whose storage was refilled."""
        if out is not None:
            return None
        codes, scale = outputs
        gather = self.gather
        amax = gather.amax if gather.format.format.tensor_scale else None
        shape = (*codes.shape[:-1], self.shape[-1])
        scale = scale.view(gather.format.format.scale_dtype)
        weight = GatheredWeight(codes, scale, amax, gather.format, shape, param_dtype)
        return weight, ()


def obstacle(weight: ShardedWeight, recipe: Recipe) -> str | None:
    """Why a weight cannot be gathered quantized, None where it can."""
    if weight.fsdp is None or weight.fsdp_ranks == 1:
        return "FSDP does not shard it"
    if not recipe.shares_weight_codes:
        return f"recipe {recipe.name!r} does not read one 2D-quantized weight in fprop and dgrad"
    if weight.fsdp.fsdp_placement.dim != 0:
        return "FSDP shards experts along their own rows"
    attached = isinstance(weight.local, QuantizingShard)
    if hasattr(weight.fsdp, "_unsharded_param") and not attached:
        return "FSDP gathered it before the model's first forward"
    rows = 1 if weight.experts else recipe.fprop.right.block[0]
    size = weight.fsdp._orig_size[0]
    if size % (rows * weight.fsdp_ranks):
        what = "experts" if weight.experts else "rows"
        return f"{size} {what} do not split into {weight.fsdp_ranks} shards of whole blocks"
    return None


def attach(
    weight: ShardedWeight,
    amaxes: dict[str, torch.Tensor],
    recipe: Recipe,
    backend: Backend,
    known: Known,
    keep: bool = False,
) -> None:
    """Have FSDP gather a weight quantized from now on, and quantize its shard if codes are kept.

    Args:
        weight: One without an `obstacle`.
        amaxes: The module's amaxes by weight name, kept up to date in place.
        recipe: Its Recipe.
        backend: Its Backend.
        known: When the amaxes are.
        keep: Keep the shard's codes until it changes. Not with CPU offload, where FSDP gathers from
            a copy on the device, made anew each time.
    """
    local, fsdp = weight.local, weight.fsdp
    if not isinstance(local, QuantizingShard):
        kept = {} if keep and not fsdp.offload_to_cpu else None
        local.__class__ = QuantizingShard
        local.gather = WeightGather(amaxes, weight.name, recipe, backend, known, kept)
        fsdp._init_extensions()
    if local.gather.kept is not None:
        local.quantized(fsdp.shard_mesh_from_root, fsdp.mp_policy)
