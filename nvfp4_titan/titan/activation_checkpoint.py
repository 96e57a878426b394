"""Op-level selective activation checkpointing sees NVFP4 GEMMs as what they stand for, aten.mm.

torchtitan's policy saves the outputs of listed ops, aten.mm among them, and of those every second
one; `per_op_sac_force_recompute_mm_shapes_by_fqns` names mms by their weight's shape. Adding our
ops to the models' lists would save all of them and miss the shapes, so the policy is shown an
aten.mm wherever one of our GEMMs runs. Grouped GEMMs are on none of torchtitan's lists, so neither
are ours. The attention of a CPU is shown as a GPU's, which the lists name.

FSDP gathers experts inside the checkpointed block, where they were not gathered ahead: other
operations when the block runs again, which torch 2.13 refuses. Its hooks are kept out of the count.

Compiled blocks that are checkpointed whole: before 2.13 torch marks what is in an autograd function
not as to be computed again, and all that our GEMMs keep stayed. A policy for every op marks it.
"""

from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch._guards import TracingContext
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.utils import _python_dispatch as dispatch
from torch.utils import checkpoint
from torchtitan.distributed import activation_checkpoint

from ..backends import BACKENDS

aten = torch.ops.aten
_create_contexts = checkpoint.create_selective_checkpoint_contexts
_apply_op_sac = activation_checkpoint._apply_op_sac
_wrap_checkpointed = activation_checkpoint.ptd_checkpoint_wrapper
_COUNTING = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
_HOOKS = {name: getattr(FSDPState, name) for name in ("_pre_forward", "_post_forward")}


def install() -> None:
    """Let checkpointing treat NVFP4 GEMMs as others, and pass over FSDP; once or more.

    Before the model is sharded.
    """
    activation_checkpoint._apply_op_sac = _apply_op_sac_seeing_gemms
    if torch.__version__ < "2.13":
        activation_checkpoint.ptd_checkpoint_wrapper = _wrap_recomputing_all
    for name, hook in _HOOKS.items():
        setattr(FSDPState, name, _uncounted(hook))


@wraps(_wrap_checkpointed)
def _wrap_recomputing_all(module, **kwargs):
    # Op-level checkpointing has contexts of its own.
    return _wrap_checkpointed(module, **{"context_fn": _contexts_recomputing_all, **kwargs})


def _contexts_recomputing_all():
    if TracingContext.try_get() is None:
        return nullcontext(), nullcontext()
    return _create_contexts(lambda *args, **kwargs: checkpoint.CheckpointPolicy.PREFER_RECOMPUTE)


def _uncounted(hook):
    """FSDP's hook of a module, its operations not counted among those of a checkpointed block."""

    @torch.compiler.disable
    @wraps(hook)
    def run(*args, **kwargs):
        if isinstance(dispatch._get_current_dispatch_mode(), _COUNTING):
            with dispatch._pop_mode_temporarily():
                return hook(*args, **kwargs)
        return hook(*args, **kwargs)

    return run


@wraps(_apply_op_sac)
def _apply_op_sac_seeing_gemms(*args, **kwargs):
    # torchtitan's function imports the name when it runs and keeps it for the model's life.
    with patch.object(checkpoint, _create_contexts.__name__, _create_contexts_seeing_gemms):
        return _apply_op_sac(*args, **kwargs)


def _create_contexts_seeing_gemms(policy, *args, **kwargs):
    gemms = {backend.gemm.op: backend.gemm.weight_shape for backend in BACKENDS.values()}

    def seeing(context, op, *op_args, **op_kwargs):
        if op is aten._scaled_dot_product_flash_attention_for_cpu.default:
            op = aten._scaled_dot_product_flash_attention.default
        if op.name() not in gemms:
            return policy(context, op, *op_args, **op_kwargs)
        weight = SimpleNamespace(shape=torch.Size(gemms[op.name()](*op_args, **op_kwargs)))
        return policy(context, aten.mm.default, op_args[0], weight)

    return _create_contexts(seeing, *args, **kwargs)
