"""What a job needs on each rank, from its settings alone: memory, and bytes over the network.

torchtitan's own parallelization runs on a model without data, for any number of ranks in one
process (the "fake" process group), then one forward and backward pass is traced (FakeTensorMode).
Exact: shards, gradients and the optimizer's state. Traced: what is alive, and what is sent.

    assumption                          where it is wrong
    compiled blocks keep what           inside of a block, whose passing tensors inductor fuses
    inductor's partitioner keeps        away; with tensor parallelism blocks are traced eagerly
    a compiled loss is one kernel       another compiler than inductor
    fused attention                     a GPU or sizes that none of torch's kernels takes
    attention without masks             flex attention's block masks come on top
    every expert gets as many tokens    an unbalanced router gives a rank more
    one microbatch                      with gradient accumulation traffic grows with their number
    AdamW                               another optimizer has other state
    no allocator, no workspaces         CUDA's context, cuBLAS and fragmentation come on top

Needs no GPU and must see none: torchtitan then takes the CPU for its device.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from torch import distributed, nn
from torch._dynamo.eval_frame import innermost_fn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.expert_parallel import ExpertParallel
from torchtitan.distributed.utils import get_train_context, maybe_enable_amp
from torchtitan.models.attention import ScaledDotProductAttentionWrapper
from torchtitan.models.moe import moe as moe_module
from torchtitan.models.moe import utils as moe_utils
from torchtitan.protocols.train_spec import BaseModelArgs, get_train_spec

from ..command import markdown_table
from ..convergence.launch import settings
from ..convergence.recipes import CONTROL
from ..distributed import fsdp_records
from ..distributed.fp4_gather import obstacle
from ..errors import ConfigError, UnsupportedError
from ..training.experts import WrappingExperts
from ..training.weights import converted_weights
from . import activation_checkpoint, cpu_runtime
from .checks import check_shape
from .sharding import model_args, parallel_dims, sharded_model
from .tracking import Tracker
from .trainer import parse

_COMPILER = "aot_eager_decomp_partition"
"""Inductor without its code: its decompositions, and what its partitioner keeps for backward."""
_ADAMW_STATES = 2


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank.

    Attributes:
        parameters: Its shards.
        gradients: As many elements, in the parameters' dtype.
        optimizer: AdamW's two states.
        activations: Alive between forward and backward, loss included, gathered weights not.
        gathered: Weights that FSDP keeps gathered from forward to backward.
        peak: Everything at the highest point of forward and backward.
        traffic: Received in a step, by collective.
        fp4_all_gather: What all_gather becomes with nvfp4.fp4_all_gather; None without NVFP4.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    peak: int
    traffic: dict[str, int] = field(default_factory=dict)
    fp4_all_gather: int | None = None


VARIANTS = ("--model.converters=", "--model.converters=nvfp4")


def compare(config: Path, world_size: int, options: Sequence[str]) -> dict[str, Estimate]:
    """Estimates of a TOML's job in bf16 and in NVFP4.

    Args:
        config: The TOML.
        world_size: Ranks.
        options: torchtitan's, over the TOML; the tokenizer and the data are not needed.

    Raises:
        UserError: settings that cannot be used.
    """
    if world_size < 1:
        raise ConfigError(f"--ranks {world_size}: give 1 or more")
    if "model.converters" in settings(options):
        raise ConfigError("--model.converters is set for each row: leave it out")
    jobs = [parse([f"--job.config_file={config}", *options, variant]) for variant in VARIANTS]
    if jobs[-1].nvfp4.recipe == CONTROL:
        raise ConfigError(f"nvfp4.recipe = {CONTROL!r} converts nothing: it is the row above")
    return {
        # The control has no converter, whatever recipe is set.
        job.nvfp4.recipe if job.model.converters else CONTROL: estimate(job, world_size)
        for job in jobs
    }


def format_table(estimates: dict[str, Estimate], device_gib: float) -> str:
    """Estimates as a Markdown table, GiB of a rank.

    Args:
        estimates: By name.
        device_gib: Memory of a device.
    """
    kinds = sorted({kind for e in estimates.values() for kind in e.traffic})
    head = ("", "parameters", "gradients", "optimizer", "activations", "peak", "of the device")
    lines = [head + tuple(f"{kind} a step" for kind in kinds)]
    for name, e in estimates.items():
        memory = (e.parameters, e.gradients, e.optimizer, e.activations, e.peak)
        share = f"{e.peak / 2**30 / device_gib:.0%}"
        traffic = (e.traffic.get(kind, 0) for kind in kinds)
        lines.append((name, *map(_gib, memory), share, *map(_gib, traffic)))
        if e.fp4_all_gather is not None:
            line = (_gib(e.fp4_all_gather if kind == "all_gather" else e.traffic.get(kind, 0))
                    for kind in kinds)  # fmt: skip
            lines.append((f"{name}, fp4_all_gather", *[""] * (len(head) - 1), *line))
    return "\n".join(markdown_table(lines[0], lines[1:]))


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"


def estimate(
    job_config: JobConfig, world_size: int, device: Literal["cuda", "cpu"] = "cuda"
) -> Estimate:
    """Estimate a job's memory and traffic per rank; leaves no process group behind.

    Args:
        job_config: Settings; checkpoints and data are not looked at.
        world_size: Ranks.
        device: Whose attention is traced: a GPU's fused one, or what this CPU takes.

    Raises:
        ConfigError: a model, sizes or degrees that cannot be used.
        UnsupportedError: pipeline or context parallelism, CPU offload, or a GPU in sight.
    """
    p = job_config.parallelism
    if p.pipeline_parallel_degree > 1 or p.context_parallel_degree > 1:
        raise UnsupportedError(
            "estimates cover data, tensor and expert parallelism: set pipeline_parallel_degree and "
            "context_parallel_degree to 1"
        )
    if job_config.training.enable_cpu_offload:
        raise UnsupportedError(
            "estimates know a GPU's memory alone: leave training.enable_cpu_offload out"
        )
    if not cpu_runtime.active():
        raise UnsupportedError("an estimate must see no GPU: set CUDA_VISIBLE_DEVICES=''")
    check_shape(job_config, world_size)
    job_config = copy.deepcopy(job_config)
    job_config.compile.backend = _COMPILER
    if "nvfp4" in job_config.model.converters:
        job_config.nvfp4.fp4_all_gather = False  # counted, not traced: codes need values
    distributed.init_process_group("fake", rank=0, world_size=world_size)
    try:
        with _fused_attention() if device == "cuda" else nullcontext():
            return _traced(job_config, world_size)
    finally:
        distributed.destroy_process_group()
        torch._dynamo.reset()


def _traced(job_config: JobConfig, world_size: int) -> Estimate:
    dims = parallel_dims(job_config, world_size)
    compiled = set(job_config.compile.components if job_config.compile.enable else ())
    if dims.tp_enabled:  # its graphs look up groups of ranks, which the fake ones are not
        compiled.discard("model")
    job_config.compile.enable = "model" in compiled
    activation_checkpoint.install()
    with _balanced_experts(), _experts_compiled_here():
        model, _ = sharded_model(job_config, dims, _traceable_args(job_config))
        _check_inputs(model, job_config.model.name)
        less = _fp4_savings(model)
        tracker, activations, gathered = _trace_step(model, job_config, dims, compiled)
    parameters = local_bytes(model)
    state = _ADAMW_STATES * parameters
    return Estimate(
        parameters=parameters,
        gradients=parameters,
        optimizer=state,
        activations=activations,
        gathered=gathered,
        peak=parameters + state + tracker.peak,
        traffic=dict(tracker.traffic),
        fp4_all_gather=None if less is None else tracker.traffic["all_gather"] - less,
    )


def _check_inputs(model: nn.Module, name: str) -> None:
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if len(needed) != 1:
        raise UnsupportedError(
            f"{name} cannot be estimated: its forward takes {', '.join(needed)}, and tokens alone "
            "are traced"
        )


def _trace_step(
    model: nn.Module, job_config: JobConfig, dims: ParallelDims, compiled: set[str]
) -> tuple[Tracker, int, int]:
    """Trace a forward and a backward; their tracker, bytes kept between them, and gathered then."""
    training = job_config.training
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model.to_empty(device="cpu")
        for module in model.modules():
            if isinstance(module, WrappingExperts):
                module.change_keys(torch.empty_like)  # compiled graphs take fakes alone
        cpu_runtime.prepare_trainer([model])
        tokens = torch.zeros(training.local_batch_size, training.seq_len, dtype=torch.int64)
        labels = torch.zeros_like(tokens)
        build_loss = get_train_spec(job_config.model.name).build_loss_fn
        loss_fn = build_loss(job_config, parallel_dims=dims)
        if "loss" in compiled:
            loss_fn = CompiledLoss.apply
        loss_parallel = dims.tp_enabled and not job_config.parallelism.disable_loss_parallel
        stack.enter_context(get_train_context(loss_parallel)())
        stack.enter_context(maybe_enable_amp(dims, training.mixed_precision_param, "cpu"))
        if "model" in compiled:
            loss_fn(model(tokens), labels).backward()  # compiles
            model.zero_grad()
        tracker = stack.enter_context(Tracker())
        loss = loss_fn(model(tokens), labels)
        gathered = gathered_bytes(model)
        activations = tracker.live - gathered
        loss.backward()
    return tracker, activations, gathered


class CompiledLoss(torch.autograd.Function):
    """What inductor makes of torchtitan's cross entropy, as far as memory is concerned.

    Logits (any shape, any dtype, or a DTensor) are kept as they are; their gradient has their
    dtype, and nothing in between is written. Under loss parallel the all-reduces of a few numbers a
    row are left out.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """A scalar (fp32) without a meaningful value."""
        ctx.save_for_backward(logits)
        return torch.zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _):
        """A gradient of the logits' shape, dtype and placements, without meaningful values."""
        (logits,) = ctx.saved_tensors
        if not isinstance(logits, DTensor):
            return torch.empty_like(logits), None
        part = torch.empty_like(logits.to_local())
        shape, strides = logits.shape, logits.stride()
        placed = (logits.device_mesh, logits.placements)
        return DTensor.from_local(part, *placed, shape=shape, stride=strides), None


def _traceable_args(job_config: JobConfig) -> BaseModelArgs:
    """Arguments of the model as it is on a Hopper GPU, with attention that can be traced."""
    args = model_args(job_config)
    if hasattr(args, "moe_args"):
        # Switched off where no Hopper GPU is.
        args.moe_args.use_grouped_mm = True
    if getattr(args, "attn_type", "sdpa") != "sdpa":
        args.attn_type = "sdpa"  # its masks need tokens; it keeps as much for backward
    return args


def _fused_attention():
    """Attention as on a GPU: it keeps its output and a number per row, and repeats no k or v."""

    def forward(self, q, k, v, *, scale=None, enable_gqa=False, is_causal=True):
        return torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, is_causal, scale=scale
        )[0]

    return patch.object(ScaledDotProductAttentionWrapper, "forward", forward)


@contextmanager
def _balanced_experts() -> Iterator[None]:
    """Let routing run without values: every expert gets as many tokens."""
    dispatch = ExpertParallel._token_dispatch

    def shapes(tokens_per_expert, experts_per_rank, ranks, max_len, alignment, use_cpu=False):
        ends = tokens_per_expert.new_empty(experts_per_rank, dtype=torch.int32)
        return tokens_per_expert.new_empty(max_len, dtype=torch.int32), ends, ends

    def even_dispatch(self, module, inputs, mesh):
        share, rest = divmod(inputs[0].shape[0], mesh.shape[0])
        splits = [share + (rank < rest) for rank in range(mesh.shape[0])]
        with patch.object(FakeTensor, "tolist", lambda tensor: splits):
            return dispatch(self, module, inputs, mesh)

    with (
        patch.object(moe_utils, "generate_permute_indices", shapes),
        patch.object(ExpertParallel, "_token_dispatch", even_dispatch),
    ):
        yield


def _experts_compiled_here():
    """Have the experts' function compiled, if at all, for this estimate alone.

    torchtitan compiles it for the whole process: what an earlier job compiled would run its code on
    tensors without values, and what is compiled here would run in later jobs.
    """
    return patch.object(moe_module, "_run_experts_grouped_mm", _uncompiled_experts())


def _uncompiled_experts():
    """The function of experts, out of what earlier jobs have wrapped around it."""
    wrapped, function = None, moe_module._run_experts_grouped_mm
    while wrapped is not function:
        wrapped = function
        function = innermost_fn(function)
        # With expert parallelism another function is around the compiled one.
        function = inspect.getclosurevars(function).nonlocals.get("compiled_fn", function)
    return function


def local_bytes(model: nn.Module) -> int:
    """Bytes of this rank's parts of the parameters."""
    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(p.nbytes for p in parameters)


def gathered_bytes(model: nn.Module) -> int:
    """Bytes of the weights that FSDP has gathered now."""
    storages = {}
    for record in fsdp_records(model).values():
        for output in getattr(record, "all_gather_outputs", ()):
            storages[output.untyped_storage()._cdata] = output.untyped_storage().nbytes()
    return sum(storages.values())


def _fp4_savings(model: nn.Module) -> int | None:
    """Bytes that a rank need not receive with fp4_all_gather; None for a model without NVFP4."""
    weights = converted_weights(model)
    if not weights:
        return None
    saved = 0.0
    for weight in weights:
        recipe, _ = weight.module.recipes()[weight.name]
        if obstacle(weight, recipe) is not None:
            continue
        elements = weight.local.numel() * (weight.fsdp_ranks - 1)
        format = recipe.fprop.right
        codes = format.format.scale_dtype.itemsize / (format.block[0] * format.block[1]) + 0.5
        # For the forward and, where FSDP frees it in between, for the backward.
        gathers = 1 + (weight.fsdp.post_forward_mesh_info is not None)
        saved += gathers * elements * (weight.fsdp.mp_policy.param_dtype.itemsize - codes)
    return round(saved)
