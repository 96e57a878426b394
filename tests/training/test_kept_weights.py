"""Weights quantized once an optimizer step: the same bits, less work, nothing stale."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nvfp4_titan import convert
from nvfp4_titan.distributed import amax_in_dtypes
from nvfp4_titan.errors import ConfigError
from nvfp4_titan.recipe import RECIPES, GemmFormat, OperandFormat, Recipe
from nvfp4_titan.training import (
    NVFP4Linear,
    grouped_mm,
    invalidate_weights,
    linear,
    refresh_weights,
    track_weights,
)
from nvfp4_titan.training.functions import KeptWeight
from nvfp4_titan.training.observe import Observer

DIM, HIDDEN, EXPERTS = 32, 48, 4
SHAPES = {(HIDDEN, DIM), (DIM, HIDDEN), (EXPERTS, HIDDEN, DIM), (EXPERTS, DIM, HIDDEN)}
QUANTIZE = {"nvfp4_titan::reference_quantize", "nvfp4_titan::reference_quantize_experts"}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts, self.use_grouped_mm = EXPERTS, True
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM) / 8)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, DIM, HIDDEN) / 8)
        self.run = run_experts

    def forward(self, x, offs):
        return self.run(self.w1, self.w2, x, offs)


def run_experts(w1, w2, x, offs):
    h = torch._grouped_mm(x.bfloat16(), w1.bfloat16().transpose(-2, -1), offs=offs).relu()
    return torch._grouped_mm(h, w2.bfloat16().transpose(-2, -1), offs=offs).type_as(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(DIM, HIDDEN)
        self.down = nn.Linear(HIDDEN, DIM)
        self.experts = Experts()

    def forward(self, x, offs):
        x = x + self.down(self.up(x).relu())
        return x + self.experts(x, offs)


class OddExperts(nn.Module):
    """Experts (E, K, N), K = N, that take their weights in unusual ways."""

    def __init__(self, take):
        super().__init__()
        self.num_experts, self.take = EXPERTS, take
        self.w = nn.Parameter(torch.randn(EXPERTS, DIM, DIM))
        with torch.no_grad():
            self.w *= torch.tensor([0.01, 1, 2, 4]).view(-1, 1, 1)

    def forward(self, x, offs):
        return self.take(self.w, x, offs)


def column_major(w, x, offs):
    return torch._grouped_mm(x, w.mT.contiguous().mT, offs=offs)


def one_by_one(take):
    def run(w, x, offs):
        counts = offs.diff(prepend=offs.new_zeros(1)).tolist()
        return torch.cat([part @ take(w, e) for e, part in enumerate(x.split(counts))])

    return run


ODD = {
    "as they are": lambda w, x, offs: torch._grouped_mm(x, w, offs=offs),
    "by keywords": lambda w, x, offs: torch._grouped_mm(input=x, mat2=w, offs=offs),
    "column major": column_major,
    "through clone": lambda w, x, offs: torch._grouped_mm(x, w.mT.clone().mT, offs=offs),
    "narrow from the end": one_by_one(lambda w, e: w.narrow(-3, e, 1)[0]),
    "select from the end": one_by_one(lambda w, e: w.select(-3, e)),
    "experts last": one_by_one(lambda w, e: w.permute(1, 2, 0)[:, :, e]),
    "experts in the middle": one_by_one(lambda w, e: w.transpose(0, 1)[:, e]),
    "half of the columns": one_by_one(lambda w, e: w[e][:, :16]),
    "flat": one_by_one(lambda w, e: w.view(-1, DIM)[e * DIM : (e + 1) * DIM]),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("take", ODD)
def test_experts_taken_in_unusual_ways_are_the_same_tracked(take, keep):
    plain = OddExperts(ODD[take])
    plain.w.data[0, 0, -1] = 0.05  # of a half only
    convert(plain, backend="reference")
    tracked = copy.deepcopy(plain)
    track_weights(tracked, keep_weights=keep)
    x, offs = torch.randn(32, DIM), torch.tensor([5, 14, 25, 32], dtype=torch.int32)
    for module in (plain, tracked):
        module(x, offs).square().sum().backward()
    assert torch.equal(plain(x, offs), tracked(x, offs))
    assert torch.equal(plain.w.grad, tracked.w.grad)


def test_a_known_amax_is_not_that_of_a_transformed_weight():
    turned = OperandFormat(rht=True)
    recipe = Recipe(
        "turned", GemmFormat(OperandFormat(), OperandFormat()), GemmFormat(turned, turned)
    )
    x, w = torch.randn(16, DIM), torch.randn(HIDDEN, DIM)
    found = []
    for amax in (None, amax_in_dtypes(w.abs().amax())):
        x_, w_ = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = linear(x_, w_, recipe=recipe, backend="reference", weight_amax=amax)
        y.square().sum().backward()
        found.append((y, x_.grad, w_.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_amaxes_are_fp32_whatever_the_default_dtype(dtype):
    model, x, offs = Model(), torch.randn(8, DIM), torch.tensor([2, 4, 6, 8], dtype=torch.int32)
    convert(model, backend="reference")
    expected = model(x, offs)
    torch.set_default_dtype(dtype)
    try:
        track_weights(model)
        assert torch.equal(model(x, offs), expected)
    finally:
        torch.set_default_dtype(torch.float32)


class Weights(TorchDispatchMode):
    """Counts how often a weight is quantized."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in QUANTIZE and tuple(args[0].shape) in SHAPES
        return func(*args, **(kwargs or {}))


def build(keep=True, recipe="nvfp4", compiled=False):
    torch.manual_seed(0)
    model = Model()
    convert(model, recipe=recipe, bf16_last_fraction=0, backend="reference")
    track_weights(model, keep_weights=keep)
    if compiled:  # as torchtitan: blocks, and experts' function apart from its module
        options = {"backend": "aot_eager", "fullgraph": True}
        for module in (model.up, model.down):
            module.compile(**options)
        model.experts.run = torch.compile(run_experts, **options)
    return model


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    offs = torch.tensor([3, 3, 20, 40], dtype=torch.int32)
    return torch.randn(40, DIM, generator=generator), offs


def train(model, steps=2, microbatches=2, autocast=False, tell=True):
    """Outputs and gradients of all microbatches."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(steps):
        for i in range(microbatches):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = model(*batch(10 * step + i))
            y.float().square().mean().backward()
            seen.append(y.detach())
        seen += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        if tell:
            refresh_weights(model)
    return seen


def equal(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_mxfp8", "nvfp4_bf16", "bf16_nvfp4", "mxfp8"])
def test_bits_are_those_of_quantizing_each_time(recipe):
    assert equal(train(build(recipe=recipe)), train(build(False, recipe)))


def test_each_weight_is_quantized_once_a_step():
    for keep, expected in ((True, 2 * 4), (False, 2 * 2 * 4)):
        model = build(keep)
        with Weights() as weights:
            train(model, autocast=True)
        assert weights.count == expected


def test_autocast_and_compile():
    torch._dynamo.reset()
    expected = train(build(False, compiled=True), autocast=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert equal(train(build(compiled=True), autocast=True), expected)
    # One graph a module: new operands in the next step compile nothing.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    torch._dynamo.reset()


@pytest.mark.parametrize("keep", [True, False])
def test_a_written_weight_is_quantized_again_though_nobody_tells(keep):
    expected = train(build(False))
    assert equal(train(build(keep), tell=False), expected)
    model, other = build(keep), build(False)
    for m in (model, other):
        m(*batch(0))
        with torch.no_grad():
            m.experts.w2.mul_(3)
            m.up.weight[0, 0] = 9
    other._nvfp4_weights.fresh = False
    assert torch.equal(model(*batch(1)), other(*batch(1)))


def exchanged(model, weights):
    for name, p in weights.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(p))
    return model(*batch(1))


def given_data(model, weights):
    """As torch.nn.utils.vector_to_parameters."""
    for name, p in model.named_parameters():
        p.data = weights[name].detach().clone()
    return model(*batch(1))


def averaged(model, weights):
    """As torch.optim.swa_utils.AveragedModel: a copy, written in place."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(weights[name])
    return other(*batch(1))


def called_with(model, weights):
    torch.func.functional_call(model, {n: 2 * w for n, w in weights.items()}, batch(1))
    return torch.func.functional_call(model, weights, batch(1))


def part_loaded(model, weights):
    for part in ("up", "down", "experts"):
        prefix = f"{part}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        getattr(model, part).load_state_dict(own)
    return model(*batch(1))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("change", [exchanged, given_data, averaged, called_with, part_loaded])
def test_other_weights_are_quantized_anew(change, keep):
    model, untracked = build(keep), Model()
    model(*batch(0))
    weights = {name: p.detach().clone() * 5 for name, p in model.named_parameters()}
    convert(untracked, bf16_last_fraction=0, backend="reference")
    untracked.load_state_dict(weights)
    assert torch.equal(change(model, weights), untracked(*batch(1)))


def test_a_model_that_is_compiled_whole():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM))
    convert(model, bf16_last_fraction=0, backend="reference")
    track_weights(model)
    x = batch(0)[0]
    y = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), y)
    torch._dynamo.reset()


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model, other = build(False), Model()
        convert(other, bf16_last_fraction=0, backend="reference")
        other.load_state_dict(model.state_dict())
        for _ in range(2):
            assert torch.equal(model(*batch(0)), other(*batch(0)))


def test_loaded_weights_are_quantized_anew():
    model, other = build(), build(False)
    state = {name: 2 * t for name, t in model.state_dict().items()}
    model(*batch(0))
    model.load_state_dict(state)
    other.load_state_dict(state)
    assert torch.equal(model(*batch(1)), other(*batch(1)))


def test_a_changed_recipe_gets_its_own_operands():
    model, other = build(), build(False)
    for m in (model, other):
        m(*batch(0))
        for module in (m.up, m.down, m.experts):
            module.change_recipe(lambda recipe: RECIPES["mxfp8"])
    assert torch.equal(model(*batch(1)), other(*batch(1)))


def test_operands_of_another_dtype_are_not_used():
    model, other = build(), build(False)
    for m in (model, other):
        m(*batch(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(*batch(1)), other(*batch(1)))


def test_an_observer_sees_weights_quantized():
    figures = []
    for keep in (True, False):
        model = build(keep)
        observer = Observer([model])
        model(*batch(0))
        with observer.attached():
            y = model(*batch(1))
            y.square().mean().backward()
        figures.append(observer.take())
        assert torch.equal(model(*batch(1)), y)
    assert figures[0] == figures[1] and ("up.weight", "fprop/w", -1) in figures[0]


@pytest.mark.parametrize("turned", [False, True])
def test_experts_stored_the_other_way_use_no_operands_of_theirs(turned):
    # A model may store (E, K, N): what is kept of it has its blocks along the other dim.
    class Turned(Experts):
        def forward(self, x, offs):
            w = self.w1.bfloat16()
            return torch._grouped_mm(x.bfloat16(), w if turned else w.transpose(-2, -1), offs=offs)

    outputs = []
    for keep in (True, False):
        torch.manual_seed(1)
        module = nn.Module()
        module.experts = Turned()
        module.experts.w1 = nn.Parameter(torch.randn(EXPERTS, DIM, DIM) * 2)
        module.forward = lambda x, offs, experts=module.experts: experts(x, offs)
        recipe = RECIPES["nvfp4"].switched(weights_2d=False)
        convert(module, recipe=recipe, bf16_last_fraction=0, backend="reference")
        track_weights(module, keep_weights=keep)
        outputs.append(module(*batch(0)))
    assert torch.equal(*outputs)


def test_what_is_kept_is_counted():
    w = torch.randn(64, 32)
    backend = NVFP4Linear(32, 64, backend="reference").backend
    amax = amax_in_dtypes(w.abs().amax())
    kept = KeptWeight.of(w, RECIPES["nvfp4"], backend, torch.float32, amax)
    held = sum(t.nbytes for t in kept.tensors if t is not None)
    assert held <= 0.5625 * w.numel() + 4
    x = torch.randn(16, 32)
    options = {"backend": backend, "kept_weight": kept}
    assert torch.equal(linear(x, torch.zeros_like(w), **options), linear(x, w, backend=backend))
    assert not linear(x.bfloat16(), torch.zeros_like(w).bfloat16(), **options).any()
    offs = torch.tensor([16], dtype=torch.int32)
    experts = KeptWeight.of(w[None], RECIPES["nvfp4"], backend, torch.float32, amax[None])
    y = grouped_mm(x, torch.zeros(1, 32, 64), offs, backend=backend, kept_weight=experts)
    assert torch.equal(y, linear(x, w, backend=backend))


def test_who_is_told_that_weights_changed():
    untracked = nn.Sequential(nn.Linear(32, 32))
    convert(untracked, backend="reference")
    for tell in (invalidate_weights, refresh_weights):
        tell(untracked)  # nothing is known of its weights beforehand
    model = build()
    model(*batch(0))
    for tell in (invalidate_weights, refresh_weights):
        with pytest.raises(ConfigError, match="part of a model"):
            tell(model.experts)
