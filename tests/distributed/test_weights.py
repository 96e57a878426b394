"""Weights under FSDP2 on two ranks: amaxes in one reduction, gathers in codes, nothing kept.

Every variant trains the same model on the same batches; what plain FSDP computes is expected bit
for bit.
"""

import io

import pytest
import torch
from ranks import DEVICES, spawn
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from nvfp4_titan import convert
from nvfp4_titan.distributed import amax_in_dtypes, amax_of_uses, fsdp_records
from nvfp4_titan.distributed.fp4_gather import QuantizingShard
from nvfp4_titan.distributed.tensor_parallel import reduced_amax
from nvfp4_titan.distributed.weights import ShardedWeight, weight_amaxes
from nvfp4_titan.training import keep_no_codes, refresh_weights, track_weights

DIM, HIDDEN, EXPERTS, STEPS = 64, 96, 4, 3
VARIANTS = ("plain", "tracked", "gathered", "kept", "requantized", "offloaded", "compiled")
GATHERED = ("gathered", "kept", "offloaded", "compiled")


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = EXPERTS
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM) / 8)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, DIM, HIDDEN) / 8)

    def forward(self, x):
        offs = torch.tensor([5, 5, 20, 32], dtype=torch.int32, device=x.device)
        h = torch._grouped_mm(x.bfloat16(), self.w1.bfloat16().transpose(-2, -1), offs=offs)
        y = torch._grouped_mm(h.relu(), self.w2.bfloat16().transpose(-2, -1), offs=offs)
        return y.to(x.dtype)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x):
        return x + self.w2(self.w1(x).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.experts = Experts()
        self.odd = nn.Linear(DIM, 40)  # 20 rows a rank: no whole blocks

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.odd(x + self.experts(x))


def build(variant, mesh):
    torch.manual_seed(0)
    model = Model().to(mesh.device_type)
    convert(model, bf16_last_fraction=0, backend="reference")
    if variant == "requantized":
        keep_no_codes(model)
    if variant == "compiled":
        for layer in model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32), "mesh": mesh}
    if variant == "offloaded":
        policy["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for part in (*model.layers, model.experts, model.odd, model):
        fully_shard(part, **policy)
        part.set_force_sum_reduction_for_comms(True)
    if variant != "plain":
        track_weights(
            model,
            fp4_all_gather=variant in GATHERED,
            keep_weights=variant in ("tracked", "offloaded"),
            keep_codes=variant in ("kept", "offloaded", "compiled"),
        )
    return model


class Gathered(TorchDispatchMode):
    """Counts the bytes that a rank gives to all-gathers."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d._allgather_base_.default:
            self.bytes += args[1].nbytes
        return func(*args, **(kwargs or {}))


def train(model, rank, device):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + rank)
        for _ in range(2):  # microbatches
            x = torch.randn(32, DIM, generator=generator).to(device)
            y = model(x)
            y.float().square().mean().backward()
            seen.append(y.detach())
        seen += [p.grad.full_tensor() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(model, "_nvfp4_weights"):
            refresh_weights(model)
    return seen


def all_variants(rank, device):
    mesh = init_device_mesh(device.type, (2,))
    found = {}
    for variant in VARIANTS:
        model = build(variant, mesh)
        found[variant] = train(model, rank, device)
        # Of shards no whole operands.
        assert not any(module.kept_weights for module in model.modules() if hasattr(module, "key"))
        found[f"{variant} loaded"] = loaded_and_unsharded(model, device)
        if variant in ("plain", "gathered"):
            with torch.no_grad(), Gathered() as gathered:
                model(torch.randn(32, DIM, device=device))
            found[f"{variant} bytes"] = gathered.bytes
        if variant == "gathered":
            check_gathered(model)
        if variant == "kept":
            check_kept(model, device)
        if variant == "tracked":
            check_loading(model, device)
    found["amaxes"] = amaxes_of_two_axes(device)
    found["experts"] = amaxes_of_experts(rank, device)
    found["tied"] = tied_variants(device)
    return found


def check_gathered(model):
    """Who travels in codes; and that state dicts and optimizers see plain shards."""
    plain = {
        record._param_fqn
        for record in fsdp_records(model).values()
        if not isinstance(record.sharded_param._local_tensor, QuantizingShard)
    }
    assert plain == {"odd.weight", "odd.bias"}
    state = get_model_state_dict(model)
    buffer = io.BytesIO()
    torch.save({k: v.to_local().detach() for k, v in state.items()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert all(type(v) is torch.Tensor for v in loaded.values())


def check_kept(model, device):
    """A shard is quantized once, though gathered again."""
    shards = [
        record.sharded_param._local_tensor
        for record in fsdp_records(model).values()
        if isinstance(record.sharded_param._local_tensor, QuantizingShard)
    ]
    x = torch.randn(32, DIM, device=device)
    before = [dict(shard.gather.kept) for shard in shards]
    assert shards and all(len(kept) == 1 for kept in before)  # since the optimizer's step
    model(x)
    for shard, kept in zip(shards, before, strict=True):
        (when, tensors) = next(iter(kept.items()))
        assert shard.gather.kept[when] is tensors


def check_loading(model, device):
    """Loaded weights are quantized with their own amax."""
    state = {k: v * 3 for k, v in get_model_state_dict(model).items()}
    x = torch.randn(32, DIM, device=device)
    model(x)
    before = model.layers[0].w1.weight_amaxes["weight"].clone()
    set_model_state_dict(model, state)
    model(x)
    after = model.layers[0].w1.weight_amaxes["weight"]
    assert torch.equal(after[0], before[0] * 3) and after[1] == after[0].bfloat16()


def loaded_and_unsharded(model, device):
    """Loaded weights that are gathered before the model's forward, as pipeline schedules do."""
    state = {k: v * (3 + v.sign()) for k, v in get_model_state_dict(model).items()}
    set_model_state_dict(model, state)
    model.layers[1].unshard()
    with torch.no_grad():
        return model(torch.ones(32, DIM, device=device))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


def tied(device, rules=(), **options):
    """Outputs and gradients of two linears with one weight."""
    torch.manual_seed(0)
    model = nn.Sequential(Tied()).to(device)
    convert(model, bf16_last_fraction=0, backend="reference", rules=rules)
    if options:
        track_weights(model, **options)
    mesh = init_device_mesh(device.type, (2,))
    for part in (model[0], model):
        fully_shard(part, mesh=mesh).set_force_sum_reduction_for_comms(True)
    x = torch.randn(32, DIM, generator=torch.Generator().manual_seed(1)).to(device)
    x.requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), x.grad, model[0].a.weight.grad.full_tensor()


def tied_variants(device):
    codes = {"fp4_all_gather": True, "keep_codes": True}
    return {
        rules: [tied(device, rules, **o) for o in ({}, {"keep_weights": True}, codes)]
        for rules in ((), ("*.b=nvfp4_mxfp8",))
    }


def amaxes_of_two_axes(device):
    """Amaxes over TP and FSDP axes, per expert where experts are split; one expert holds a NaN."""
    mesh = init_device_mesh(device.type, (1, 2), mesh_dim_names=("fsdp", "tp"))
    torch.manual_seed(0)
    model = Model().to(device)
    with torch.no_grad():
        model.experts.w2[1, -1, -1] = torch.nan
    whole = {
        "w1": model.layers[0].w1.weight.abs().amax(),
        "w2": model.layers[1].w2.weight.abs().amax(),
        "experts": model.experts.w2.abs().amax((1, 2)),
    }
    whole = {name: amax.detach().clone() for name, amax in whole.items()}
    convert(model, bf16_last_fraction=0, backend="reference")
    for layer in model.layers:
        plan = {"w1": ColwiseParallel(), "w2": RowwiseParallel()}
        parallelize_module(layer, mesh["tp"], plan)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["fsdp"])
    fully_shard(model.experts, mesh=mesh["tp"], shard_placement_fn=lambda p: Shard(1))
    track_weights(model)
    for hook in model._forward_pre_hooks.values():
        hook(model, ())
    known = {
        "w1": model.layers[0].w1.weight_amaxes["weight"][0],
        "w2": model.layers[1].w2.weight_amaxes["weight"][0],
        "experts": model.experts.weight_amaxes["w2"][:, 0],
    }
    return known, whole


def amaxes_of_experts(rank, device):
    """Amaxes where EP splits experts, and where FSDP does, 5 over 2 ranks; then with a NaN."""
    mesh = init_device_mesh(device.type, (2,), mesh_dim_names=("ranks",))
    whole = torch.randn(5, 32, 16, generator=torch.Generator().manual_seed(0)).to(device)
    split, sharded = nn.Module(), nn.Module()
    split.w = nn.Parameter(distribute_tensor(whole[:4], mesh, [Shard(0)]))
    sharded.w = nn.Parameter(whole.clone())
    fully_shard(sharded, mesh=mesh)
    record = fsdp_records(sharded)[sharded, "w"]
    weights = ShardedWeight(split, "w", True, None), ShardedWeight(sharded, "w", True, record)
    amaxes = whole.abs().amax((1, 2))
    nan = [
        reduced_amax(torch.tensor([float("nan") if rank == r else 1.0], device=device), mesh)
        for r in range(2)
    ]
    return weight_amaxes(weights), [amaxes[2 * rank : 2 * rank + 2], amaxes], nan


@pytest.fixture(scope="module", params=DEVICES)
def ranks(request, tmp_path_factory):
    return spawn(all_variants, request.param, 2, tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_every_variant_is_bit_equal_to_plain_fsdp(ranks, variant):
    for found in ranks:
        assert all(map(torch.equal, found[variant], found["plain"]))


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_loaded_weights_may_be_gathered_before_the_forward(ranks, variant):
    for found in ranks:
        assert torch.equal(found[f"{variant} loaded"], found["plain loaded"])


def test_linears_of_one_weight(ranks):
    """With one recipe, and with two, of which the second does not read the codes of the first."""
    for found in ranks:
        for plain, *others in found["tied"].values():
            for other in others:
                assert all(map(torch.equal, other, plain))


def test_gathered_bytes(ranks):
    """Per forward: all of the model but `odd`, whose 40 rows and bias stay in bf16."""
    odd = 2 * (DIM * 40 + 40) // 2
    for found in ranks:
        plain, quantized = (found[f"{v} bytes"] - odd for v in ("plain", "gathered"))
        assert 0.25 < quantized / plain <= 0.30


def test_amaxes_of_whole_weights(ranks):
    for found in ranks:
        known, whole = found["amaxes"]
        assert whole["experts"].isnan().tolist() == [False, True, False, False]
        for name, amax in whole.items():
            torch.testing.assert_close(known[name], amax, rtol=0, atol=0, equal_nan=True)


def test_amaxes_of_experts_that_ranks_share_out(ranks):
    for found in ranks:
        known, expected, nan = found["experts"]
        assert all(map(torch.equal, known, expected))
        assert all(amax.isnan().all() for amax in nan)


def test_the_rounding_of_an_amax_survives_a_compiler():
    # Of two casts inductor drops the first; a compiled run then has the codes of no oracle.
    amax = torch.tensor([1.001, float("nan"), 3.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def uses(amax, dtype=dtype):
            return amax_of_uses(amax_in_dtypes(amax), dtype)

        rounded = amax.to(dtype).float().expand(2, 3)
        for found in (uses(amax), torch.compile(uses, fullgraph=True)(amax)):
            torch.testing.assert_close(found, rounded, rtol=0, atol=0, equal_nan=True)
        assert (rounded[0, 0] == amax[0]) == (dtype == torch.float32)
