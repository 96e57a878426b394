"""Numerics telemetry: sound layers are found sound, and every injected fault is found."""

from dataclasses import replace

import pytest
import torch
from support import sqnr
from torch import nn
from torch.utils.checkpoint import checkpoint

from nvfp4_titan import convert
from nvfp4_titan.backends import BACKENDS
from nvfp4_titan.backends.native import STAND_IN
from nvfp4_titan.training import functions
from nvfp4_titan.training.observe import Observer, add_up
from nvfp4_titan.training.telemetry import figures, format_worst, insane, worst

REFERENCE = BACKENDS["reference"]
TOKENS, DIM, HIDDEN, EXPERTS = 160, 64, 96, 4
COUNTS = torch.tensor([48, 0, 80, 32])


class Experts(nn.Module):
    def __init__(self, grouped):
        super().__init__()
        self.num_experts, self.grouped = EXPERTS, grouped
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM) * 0.1)

    def forward(self, x):
        if self.grouped:
            offs = COUNTS.to(x.device).cumsum(0).to(torch.int32)
            w = self.w1.bfloat16().transpose(-2, -1)
            return torch._grouped_mm(x.bfloat16(), w, offs=offs).float()
        parts = torch.split(x, COUNTS.tolist())
        return torch.cat([p @ self.w1[e].transpose(-2, -1) for e, p in enumerate(parts)])


class Model(nn.Module):
    def __init__(self, grouped=True):
        super().__init__()
        self.first, self.second = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
        self.experts = Experts(grouped)

    def forward(self, x):
        return self.experts(self.second(self.first(x).relu()))


def converted(grouped=True, **options):
    model = Model(grouped)
    convert(model, backend="reference", bf16_last_fraction=0, **options)
    return model


def observe(model, steps=1, run=lambda model, x: model(x)):
    observer = Observer([model])
    with observer.attached():
        for _ in range(steps):
            y = run(model, torch.randn(TOKENS, DIM, requires_grad=True))
            (y * torch.randn_like(y)).sum().backward()
    return figures(add_up([observer.take()]))


def found_by(found):
    return {(f.fqn, f.what, f.figure) for f in insane(found)}


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(
    "recipe",
    ["nvfp4", "nvfp4_46", "nvfp4_mxfp8", "nvfp4_mxfp8_dequantized", "nvfp4_bf16", "bf16_nvfp4"],
)
def test_sound_layers(recipe, grouped):
    found = observe(converted(grouped, recipe=recipe), steps=2)
    assert insane(found) == []
    gemms = {what for _, what in found if "/" not in what}
    wanted = {"nvfp4_bf16": {"fprop"}, "bf16_nvfp4": {"dgrad", "wgrad"}}
    assert gemms == wanted.get(recipe, {"fprop", "dgrad", "wgrad"})
    for (fqn, what), values in found.items():
        assert ("worst_gain" in values) == (fqn == "experts.w1" and "/" not in what)
        assert values["sqnr_db"] > 13 and 0.93 < values["gain"] < 1.07


def test_figures_are_those_of_the_whole_tensors(monkeypatch):
    """With samples that hold everything, against the GEMMs in fp64."""
    monkeypatch.setattr("nvfp4_titan.training.observe._SAMPLE", 10**6)
    monkeypatch.setattr(
        "nvfp4_titan.training.observe._spread", lambda size, count=0: torch.arange(size)
    )
    model = nn.Sequential(nn.Linear(DIM, HIDDEN, bias=False))
    convert(model, backend="reference")
    x, dy = torch.randn(TOKENS, DIM, requires_grad=True), torch.randn(TOKENS, HIDDEN)
    observer = Observer([model])
    with observer.attached():
        y = model(x)
        y.backward(dy)
    found = figures(observer.take())
    w = model[0].weight
    exact = {"fprop": x @ w.T, "dgrad": dy @ w, "wgrad": dy.T @ x}
    for gemm, actual in (("fprop", y), ("dgrad", x.grad), ("wgrad", w.grad)):
        values = found["0.weight", gemm]
        assert values["sqnr_db"] == pytest.approx(
            sqnr(actual.detach(), exact[gemm].detach()), abs=1e-3
        )
        cosine = torch.nn.functional.cosine_similarity(
            actual.double().flatten(), exact[gemm].double().flatten(), dim=0
        )
        assert values["cosine"] == pytest.approx(cosine.item(), abs=1e-6)
    operand = REFERENCE.quantize(x.detach(), functions.use(model[0].recipe, "fprop", "left"), None)
    codes = operand[0].codes
    magnitudes = torch.stack((codes & 7, codes >> 4 & 7))
    values = found["0.weight", "fprop/x"]
    assert values["zeros"] == pytest.approx((magnitudes == 0).float().mean().item(), abs=1e-6)
    assert values["saturated"] == pytest.approx((magnitudes == 7).float().mean().item(), abs=1e-6)


@pytest.mark.parametrize("grouped", [True, False])
def test_layouts_of_the_native_gemms_are_read(grouped):
    """Padded, with blocked scales: the same figures."""
    found = []
    for backend in (REFERENCE, STAND_IN):
        torch.manual_seed(0)
        model = Model(grouped)
        convert(model, backend=backend, bf16_last_fraction=0)
        found.append(observe(model))
    reference, native = found
    assert reference.keys() == native.keys()
    for what, values in reference.items():
        assert native[what] == pytest.approx(values, rel=1e-3, abs=1e-4), what


def test_a_missing_transform_on_one_operand(monkeypatch):
    use = functions.use

    def without(recipe, name, side, **options):
        found = use(recipe, name, side, **options)
        if (name, side) != ("wgrad", "right"):
            return found
        return replace(found, format=replace(found.format, rht=False))

    monkeypatch.setattr(functions, "use", without)
    found = observe(converted())
    for fqn in ("first.weight", "second.weight", "experts.w1"):
        assert found[fqn, "wgrad"]["same_rht"] == 0
        assert {(fqn, "wgrad", "same_rht"), (fqn, "wgrad", "cosine")} <= found_by(found)
    assert {what for _, what, _ in found_by(found)} == {"wgrad"}


def test_no_transform_on_either_operand_is_the_same_one():
    found = observe(converted(rht=False))
    assert insane(found) == [] and found["first.weight", "wgrad"]["same_rht"] == 1


@pytest.mark.parametrize("factor", [0.5, 1.25, 16.0])
def test_a_wrong_global_scale_in_one_layer(factor):
    model = converted()

    def quantize(t, *args, **options):
        operands = REFERENCE.quantize(t, *args, **options)
        return tuple(o and replace(o, amax=o.amax * factor) for o in operands)

    model.second.backend = replace(REFERENCE, quantize=quantize)
    found = observe(model)
    assert found["second.weight", "fprop"]["gain"] == pytest.approx(factor**2, rel=0.05)
    assert {fqn for fqn, _, _ in found_by(found)} == {"second.weight"}
    assert {what for _, what, _ in found_by(found)} >= {"fprop", "dgrad", "wgrad", "fprop/w"}


def test_scales_that_are_too_small():
    model = converted()

    def quantize(t, rows, cols, key=None, offs=None, amax=None, offset=(0, 0)):
        amax = REFERENCE.amax(t, rows, cols, offs) / 64
        return REFERENCE.quantize(t, rows, cols, key, offs, amax, offset)

    model.first.backend = replace(REFERENCE, quantize=quantize)
    assert ("first.weight", "fprop/x", "saturated") in found_by(observe(model))


def test_stochastic_rounding_turned_off():
    expected = {
        (fqn, f"{gemm}/dy", "rounded_away")
        for fqn in ("first.weight", "second.weight", "experts.w1")
        for gemm in ("dgrad", "wgrad")
    }
    assert found_by(observe(converted(sr=False))) == expected
    # Behind the recipe's back, in one layer.
    model = converted()

    def quantize(t, rows, cols, *args, **options):
        uses = [u and replace(u, format=replace(u.format, rounding="rtne")) for u in (rows, cols)]
        return REFERENCE.quantize(t, *uses, *args, **options)

    model.first.backend = replace(REFERENCE, quantize=quantize)
    assert found_by(observe(model)) == {key for key in expected if key[0] == "first.weight"}


def test_stochastic_rounding_in_the_forward():
    found = found_by(observe(converted(recipe="nvfp4_sr_forward")))
    assert {what for _, what, _ in found} == {"fprop/x"}


@pytest.mark.parametrize("grouped", [True, False])
def test_an_expert_whose_gradient_is_too_small(grouped):
    model, calls = converted(grouped), []

    def wgrad(dy, x, out_dtype, offs=None):
        dw = REFERENCE.wgrad(dy, x, out_dtype, offs)
        calls.append(None)
        if offs is not None:
            dw[2] *= 0.88
        elif len(calls) == 2:  # backward visits the experts from the last to the first
            dw *= 0.88
        return dw

    key, options = model.experts._converted["w1"]
    faulty = replace(options, backend=replace(REFERENCE, wgrad=wgrad))
    model.experts._converted["w1"] = (key, faulty)
    found = observe(model)
    values = found["experts.w1", "wgrad"]
    assert values["worst_expert"] == 2 and values["worst_gain"] == pytest.approx(0.88, abs=0.02)
    assert found_by(found) >= {("experts.w1", "wgrad", "worst_gain")}
    assert {what for _, what, _ in found_by(found)} == {"wgrad"}


def test_recomputed_layers_and_what_is_left_behind():
    model = converted()
    before = model.first.backend, model.experts._converted["w1"][1].backend

    def recomputed(model, x):
        return checkpoint(model, x, use_reentrant=False)

    assert insane(observe(model, run=recomputed)) == []
    assert (model.first.backend, model.experts._converted["w1"][1].backend) == before


def test_observing_changes_no_bit():
    model, x = converted(), torch.randn(TOKENS, DIM)
    plain = model(x)
    plain.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with Observer([model]).attached():
        y = model(x)
        y.sum().backward()
    assert torch.equal(y, plain)
    assert all(map(torch.equal, grads, (p.grad for p in model.parameters())))


def test_the_worst_come_first():
    found = observe(converted())
    decibels = [values["sqnr_db"] for _, _, values in worst(found, 5)]
    assert decibels == sorted(decibels) and len(decibels) == 5
    assert len(format_worst(found, 3).splitlines()) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_figures_on_a_gpu_are_the_cpus(backend):
    model = converted()
    x, dy = torch.randn(TOKENS, DIM), torch.randn(TOKENS, HIDDEN)
    found = []
    for device, name in (("cpu", "reference"), ("cuda", backend)):
        again = Model().to(device)
        convert(again, backend=name, bf16_last_fraction=0)
        again.load_state_dict(model.state_dict())
        observer = Observer([again])
        with observer.attached():
            again(x.to(device).requires_grad_()).backward(dy.to(device))
        found.append(figures(observer.take()))
    cpu, gpu = found
    assert cpu.keys() == gpu.keys() and insane(gpu) == []
    for key, values in cpu.items():
        assert gpu[key]["sqnr_db"] == pytest.approx(values["sqnr_db"], abs=0.5), key
