"""Selective activation checkpointing saves NVFP4 GEMMs as it saves aten.mm's."""

import gc
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nvfp4_titan import convert

MM, NVFP4_MM = "aten.mm.default", "nvfp4_titan.reference_mm.default"
LINEARS = 14  # of the two blocks
BACKWARD = 2 * LINEARS  # a dgrad and a wgrad for each
LM_HEAD = 2  # in high precision in both models


def blocks(converted, mode, forced=()):
    """A Llama3 debug model of two blocks under an activation checkpointing mode."""
    from torchtitan.config.job_config import ActivationCheckpoint
    from torchtitan.distributed.activation_checkpoint import apply_ac
    from torchtitan.models.llama3 import Transformer, llama3_args
    from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list

    from nvfp4_titan.titan import activation_checkpoint

    activation_checkpoint.install()
    args = replace(llama3_args["debugmodel"], n_layers=2, max_seq_len=128)
    torch.manual_seed(0)
    model = Transformer(args)
    with torch.no_grad():
        model.init_weights()
    if converted:
        convert(model, backend="reference", bf16_last_fraction=0)
    if mode != "none":
        settings = ActivationCheckpoint(
            mode=mode,
            selective_ac_option="op",
            per_op_sac_force_recompute_mm_shapes_by_fqns=list(forced),
        )
        apply_ac(model, settings, op_sac_save_list=_op_sac_save_list)
    return model


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


def step(model):
    """Ops of the backward pass, live bytes after the forward, the gradients."""
    tokens = torch.arange(256).view(2, 128)
    before = live_bytes()
    loss = model(tokens).float().log_softmax(-1)[..., 0].mean()
    saved = live_bytes() - before
    with Count() as count:
        loss.backward()
    names = (n.replace("_checkpoint_wrapped_module.", "") for n, _ in model.named_parameters())
    return count.ops, saved, dict(zip(names, [p.grad for p in model.parameters()], strict=True))


def live_bytes():
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("forced", [(), ("feed_forward.w1",)])
def test_as_many_gemms_are_recomputed_as_in_the_control(forced):
    recomputed = {}
    for mode in ("none", "selective", "full"):
        fqns = forced if mode == "selective" else ()
        for converted, op, others in ((False, MM, LM_HEAD), (True, NVFP4_MM, 0)):
            ops, _, _ = step(blocks(converted, mode, fqns))
            recomputed[mode, converted] = ops[op] - others - BACKWARD
    assert recomputed["none", True] == recomputed["none", False] == 0
    assert recomputed["full", True] == recomputed["full", False] == LINEARS
    assert recomputed["selective", True] == recomputed["selective", False]
    assert 0 < recomputed["selective", True] < LINEARS


def test_memory_is_between_none_and_full_and_gradients_are_the_same():
    saved, grads = {}, {}
    for mode in ("none", "selective", "full"):
        _, saved[mode], grads[mode] = step(blocks(True, mode))
    assert saved["full"] < saved["selective"] < saved["none"]
    for mode in ("selective", "full"):
        assert all(torch.equal(grad, grads["none"][name]) for name, grad in grads[mode].items())
