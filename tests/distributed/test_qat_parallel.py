"""QAT under FSDP and TP computes what the deployed model does, before and after a step."""

import pytest
import torch
from ranks import DEVICES, spawn
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from nvfp4_titan.deploy import convert_prepared, prepare
from nvfp4_titan.training import refresh_weights, track_weights

DIM, HIDDEN = 64, 128
FUSED = (("wq", "wk", "wv"), ("w1", "w3"))
RECIPES = ("nvfp4", "int8_act_int4_weight")


class Block(nn.Module):
    """The linears of a Llama block under torchtitan's names."""

    def __init__(self):
        super().__init__()
        for name, n, k in (
            ("wq", DIM, DIM),
            ("wk", DIM, DIM),
            ("wv", DIM, DIM),
            ("wo", DIM, DIM),
            ("w1", HIDDEN, DIM),
            ("w3", HIDDEN, DIM),
            ("w2", DIM, HIDDEN),
        ):
            setattr(self, name, nn.Linear(k, n, bias=False))
        with torch.no_grad():
            self.wk.weight.mul_(3.1)  # amaxes that differ

    def forward(self, x):
        joined = self.wq(x) * self.wk(x).tanh() + self.wv(x)
        x = x + self.wo(joined)
        return x + self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def prepared(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    prepare(model, recipe, backend="reference")
    if recipe.startswith("nvfp4"):
        track_weights(model, shared=FUSED)
    return model


def deployed(recipe, state, dtype, device):
    """The converted model of a whole state dict."""
    model = prepared(recipe)
    model.load_state_dict(state)
    convert_prepared(model, dtype)
    return model.to(device)


def whole_state(model):
    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    state = get_model_state_dict(model, options=options)
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def step(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(x).float().square().mean().backward()
    optimizer.step()
    if hasattr(model, "_nvfp4_weights"):
        refresh_weights(model)


def check_fsdp(device, recipe):
    mesh = init_device_mesh(device.type, (2,))
    model = prepared(recipe).to(device)
    for part in (*model, model):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        fully_shard(part, mesh=mesh, mp_policy=policy)
        part.set_force_sum_reduction_for_comms(True)
    x = torch.randn(16, DIM, device=device)
    for _ in range(2):
        # All ranks take part in gathering the whole.
        expected = deployed(recipe, whole_state(model), torch.bfloat16, device)
        with torch.no_grad():
            assert torch.equal(model(x), expected(x.bfloat16())), recipe
        step(model, x)


def check_tp(device, recipe):
    mesh = init_device_mesh(device.type, (2,))
    model = prepared(recipe).to(device)
    for block in model:
        rows = {"wo": RowwiseParallel(), "w2": RowwiseParallel()}
        columns = {name: ColwiseParallel() for name in ("wq", "wk", "wv", "w1", "w3")}
        parallelize_module(block, mesh, rows | columns)
    torch.manual_seed(1)
    x = torch.randn(16, DIM, device=device)
    for _ in range(2):
        expected = deployed(recipe, whole_state(model), torch.float32, device)
        with torch.no_grad():
            model(x)  # takes the amaxes
            # Not a bit differs where no rank holds a part of a sum.
            for name in ("wq", "wk", "w1"):
                theirs = getattr(expected[0], name)(x).chunk(2, -1)[mesh.get_local_rank()]
                assert torch.equal(getattr(model[0], name)(x), theirs), (recipe, name)
            torch.testing.assert_close(model[0](x), expected[0](x), rtol=1e-4, atol=1e-5)
        step(model, x)


def on_ranks(rank, device):
    torch.manual_seed(rank)
    for recipe in RECIPES:
        check_fsdp(device, recipe)
    check_tp(device, "nvfp4")
    return True


@pytest.mark.parametrize("device", DEVICES)
def test_sharded_qat_computes_the_deployed_model(device, tmp_path):
    assert spawn(on_ranks, device, 2, tmp_path) == [True, True]


def test_shared_scales_are_those_of_the_converted_model():
    """Q, k and v have one amax, prepared and converted; without sharing they have their own."""
    model = prepared("nvfp4")
    x = torch.randn(4, DIM)
    y = model(x)
    amaxes = [getattr(model[0], name).weight_amaxes["weight"] for name in FUSED[0]]
    assert amaxes[0][0] == amaxes[1][0] == amaxes[2][0] == model[0].wk.weight.abs().amax()
    assert model[0].wo.weight_amaxes["weight"][0] == model[0].wo.weight.abs().amax()
    convert_prepared(model)
    assert torch.equal(model(x), y)
    assert torch.equal(model[0].wq.weight.amax, amaxes[1])
    own = prepared("nvfp4_weight_only")
    assert not torch.equal(own(x), y)
