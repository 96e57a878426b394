"""Expert weights: intercepted where they multiply, plain everywhere else."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from nvfp4_titan import convert
from nvfp4_titan.errors import ConfigError, UnsupportedError
from nvfp4_titan.training import grouped_mm, linear
from nvfp4_titan.training.experts import ExpertWeight


class Experts(nn.Module):
    """The path that torchtitan's experts take."""

    def __init__(self, use_grouped_mm=True, num_experts=4, dim=32, hidden=48):
        super().__init__()
        self.num_experts, self.use_grouped_mm = num_experts, use_grouped_mm
        self.w1 = nn.Parameter(torch.randn(num_experts, hidden, dim) * 0.1)
        self.w2 = nn.Parameter(torch.randn(num_experts, dim, hidden) * 0.1)

    def forward(self, x, counts):
        if self.use_grouped_mm:
            offs = counts.cumsum(0).to(torch.int32)
            return run_grouped(self.w1, self.w2, x, offs)
        parts = []
        for e, part in enumerate(torch.split(x, counts.tolist())):
            h = torch.matmul(part, self.w1[e].transpose(-2, -1)).relu()
            parts.append(torch.matmul(h, self.w2[e].transpose(-2, -1)))
        return torch.cat(parts)


def run_grouped(w1, w2, x, offs):
    h = torch._grouped_mm(x.bfloat16(), w1.bfloat16().transpose(-2, -1), offs=offs).relu()
    return torch._grouped_mm(h, w2.bfloat16().transpose(-2, -1), offs=offs).type_as(x)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.top_k = 2


class MoE(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.router, self.experts = Router(), Experts(**kwargs)


class Model(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.moe = MoE(**kwargs)
        self.proj = nn.Linear(32, 32)


COUNTS = torch.tensor([5, 0, 20, 7])


def step(experts, x):
    experts.zero_grad()
    y = experts(x, COUNTS)
    y.square().sum().backward()
    return y.detach(), experts.w1.grad, experts.w2.grad


def converted(**kwargs):
    model = Model(**kwargs)
    plain = copy.deepcopy(model)
    report = convert(model, backend="reference")
    return model.moe.experts, plain.moe.experts, report


def test_report():
    _, _, report = converted()
    entries = {entry.fqn: entry for entry in report.entries}
    assert set(entries) == {
        "moe.router.gate", "moe.experts.w1", "moe.experts.w2", "proj",
    }  # fmt: skip
    assert not entries["moe.router.gate"].converted
    assert entries["moe.experts.w1"].flops_per_token == 2 * 32 * 48 * 2
    assert "2 of 2 expert weights" in str(report)


def test_grouped_gemms_run_quantized():
    experts, plain, _ = converted()
    x = torch.randn(32, 32)
    y, dw1, dw2 = step(experts, x)
    offs = COUNTS.cumsum(0).to(torch.int32)
    key1, key2 = (experts._converted[name][0] for name in ("w1", "w2"))
    w1, w2 = (p.detach().bfloat16().transpose(-2, -1) for p in (plain.w1, plain.w2))
    h = grouped_mm(x.bfloat16(), w1, offs, backend="reference", key=key1).relu()
    expected = grouped_mm(h, w2, offs, backend="reference", key=key2).float()
    assert torch.equal(y, expected)
    control = step(plain, x)
    for ours, theirs in zip((y, dw1, dw2), control, strict=True):
        assert type(ours) is torch.Tensor and not torch.equal(ours, theirs)
        assert (ours - theirs).norm() < 0.35 * theirs.norm()


def test_for_loop_gives_the_same_numerics():
    experts, _, _ = converted(use_grouped_mm=False)
    x = torch.randn(32, 32)
    y, dw1, _ = step(experts, x)
    keys = [experts._converted[name][0] for name in ("w1", "w2")]
    parts = []
    for e, part in enumerate(torch.split(x, COUNTS.tolist())):
        h = linear(part, experts.w1[e].detach(), backend="reference", key=keys[0]).relu()
        parts.append(linear(h, experts.w2[e].detach(), backend="reference", key=keys[1]))
    assert torch.equal(y, torch.cat(parts)) and dw1.isfinite().all()


class ReadTwice(Experts):
    def forward(self, x, counts):
        with torch.no_grad():
            self.first = self.w1
        self.second, self.third = self.w1, self.w1
        return super().forward(x, counts)


def test_a_forward_wraps_a_weight_once_and_a_read_without_grad_takes_no_grad_away():
    model = Model()
    model.moe.experts = ReadTwice()
    convert(model, backend="reference")
    experts, x = model.moe.experts, torch.randn(32, 32)
    _, dw1, _ = step(experts, x)
    assert dw1.count_nonzero() and not experts.first.requires_grad
    assert isinstance(experts.second, ExpertWeight) and experts.second is experts.third
    before = experts.second
    with torch.no_grad():
        experts.w1 *= 2
    step(experts, x)
    assert experts.second is not before and not torch.equal(experts.w1.grad, dw1)
    assert type(experts.w1) is nn.Parameter


class Waiting(Experts):
    """Calls `between` after it has read its first weight."""

    between = staticmethod(lambda experts: None)

    def forward(self, x, counts):
        w1, offs = self.w1, counts.cumsum(0).to(torch.int32)
        type(self).between(self)
        return run_grouped(w1, self.w2, x, offs)


@pytest.fixture
def waiting(monkeypatch):
    model = Model()
    model.moe.experts = Waiting()
    convert(model, backend="reference")
    return (
        model.moe.experts,
        torch.randn(32, 32),
        lambda f: monkeypatch.setattr(Waiting, "between", staticmethod(f)),
    )


def test_a_hook_of_the_backward_is_told_where_the_plain_weight_is():
    experts, _, _ = converted()
    y = experts(torch.randn(32, 32), COUNTS)
    y.register_hook(lambda grad: experts.w1.norm() * 0 + grad)
    with pytest.raises(UnsupportedError, match=r"in a hook read module\._parameters\[name\]"):
        y.sum().backward()


@pytest.mark.parametrize("where", ["in another thread", "in the forward itself"])
@torch.no_grad()
def test_a_second_forward_that_ends_leaves_the_first_one_quantized(where, waiting):
    experts, x, set_between = waiting
    expected = experts(x, COUNTS)

    def again(module):
        set_between(lambda module: None)
        if where == "in the forward itself":
            module(x[:5], torch.tensor([5, 0, 0, 0]))
        else:
            thread = threading.Thread(target=module, args=(x, COUNTS))
            thread.start()
            thread.join()

    set_between(again)
    assert torch.equal(experts(x, COUNTS), expected)
    assert not experts._reads


def test_a_weight_exchanged_in_the_forward_is_the_new_one(waiting):
    experts, x, set_between = waiting
    new = nn.Parameter(experts.w2.detach() * 2)

    def exchange(module):
        assert module.w2 is not new  # read once before
        module.w2 = new

    set_between(exchange)
    y = experts(x, COUNTS)
    set_between(lambda module: None)
    assert torch.equal(y, experts(x, COUNTS))


@pytest.mark.parametrize("change", ["parametrize", "prune", "delete"])
def test_a_weight_that_is_no_parameter_any_more_is_refused(change):
    experts, _, _ = converted()
    if change == "parametrize":
        parametrize.register_parametrization(experts, "w1", nn.Identity())
    elif change == "prune":
        prune.identity(experts, "w1")
    else:
        w1 = experts.w1.detach()
        del experts.w1
        experts.w1 = w1
    with pytest.raises(UnsupportedError, match="w1 are no parameters any more"):
        experts(torch.randn(32, 32), COUNTS)


def test_parameters_stay_plain(tmp_path):
    experts, plain, _ = converted()
    assert all(type(p) is nn.Parameter for p in experts.parameters())
    assert list(experts.state_dict()) == list(plain.state_dict())
    assert all(type(t) is torch.Tensor for t in experts.state_dict().values())
    torch.save(experts.state_dict(), tmp_path / "weights.pt")
    plain.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    optimizer = torch.optim.AdamW(experts.parameters())
    step(experts, torch.randn(32, 32))
    optimizer.step()
    state = optimizer.state_dict()["state"]
    assert all(type(t) is torch.Tensor for s in state.values() for t in s.values())


def test_deepcopy_and_to_empty():
    experts, _, _ = converted()
    x = torch.randn(32, 32)
    copied = copy.deepcopy(experts)
    assert all(torch.equal(a, b) for a, b in zip(step(copied, x), step(experts, x), strict=True))
    with torch.device("meta"):
        model = Model()
    convert(model, backend="reference")
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert step(model.moe.experts, x)[0].isfinite().all()


def test_compiled_function_is_one_graph_for_all_layers():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layers = [converted()[0] for _ in range(10)]
    for i, experts in enumerate(layers):
        for name, (_, *rest) in experts._converted.items():
            experts._converted[name] = (torch.tensor(i + 1), *rest)
    x = torch.randn(32, 32)
    compiled = torch.compile(run_grouped, backend="aot_eager", fullgraph=True)
    eager = run_grouped
    with torch._dynamo.config.patch(error_on_recompile=True):
        for experts in layers:
            expected = step(experts, x)
            globals()["run_grouped"] = compiled
            try:
                actual = step(experts, x)
            finally:
                globals()["run_grouped"] = eager
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_module_that_is_compiled_whole_runs_its_experts_eagerly(backend):
    torch._dynamo.reset()
    model, x = converted()[0], torch.randn(32, 32)
    expected = step(model, x)
    actual = step(torch.compile(model, backend=backend), x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def read_in_a_forward(experts, name):
    experts._reads[threading.get_ident()] = {}
    weight = getattr(experts, name)
    experts._reads.clear()
    return weight


@pytest.mark.parametrize("bias", [None, torch.ones(48)])
def test_linear_is_matmul_of_the_turned_weight(bias):
    experts, x = converted()[0], torch.randn(16, 32)
    found = []
    for multiply in (
        lambda w: nn.functional.linear(x, w, bias),
        lambda w: nn.functional.linear(input=x, weight=w, bias=bias),
        lambda w: torch.matmul(input=x, other=w.t()) + (0 if bias is None else bias),
    ):
        experts.zero_grad()
        y = multiply(read_in_a_forward(experts, "w1")[1])
        y.square().sum().backward()
        found.append((y, experts.w1.grad))
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )
    assert not torch.equal(found[0][0], x @ experts.w1[1].t())  # quantized


def test_rules_reach_experts_by_module_and_by_weight():
    model = Model()
    report = convert(model, rules=["moe.experts=bf16", "*.experts.w2=nvfp4"], backend="reference")
    assert "moe.experts.w1" in report.kept and "moe.experts.w2" in report.converted
    model.moe.experts(torch.randn(32, 32), COUNTS)


def test_experts_can_be_left_alone():
    model = Model()
    report = convert(model, experts=False, backend="reference")
    assert report.converted == ("proj",) and type(model.moe.experts) is Experts
    with pytest.raises(ConfigError, match="matches no linear or expert"):
        convert(nn.Sequential(nn.Linear(8, 8)), rules=["*.experts*=nvfp4"])


def test_twice_is_refused():
    model = Model()
    convert(model, rules=["proj=bf16"], backend="reference")
    with pytest.raises(ConfigError, match="converted before"):
        convert(model)


def test_an_operation_without_nvfp4_form_raises():
    class Bmm(Experts):
        def forward(self, x, counts):
            return torch.bmm(x.expand(4, -1, -1), self.w1.transpose(-2, -1))

    model = Model()
    model.moe.experts = Bmm()
    convert(model, backend="reference")
    with pytest.raises(UnsupportedError, match="nvfp4.experts = false"):
        model.moe.experts(torch.randn(3, 32), COUNTS)


def test_weights_are_wrapped_only_inside_the_forward():
    experts, _, _ = converted()
    seen = []

    original = run_grouped
    globals()["run_grouped"] = lambda w1, *rest: seen.append(type(w1)) or original(w1, *rest)
    try:
        experts(torch.randn(32, 32), COUNTS)
    finally:
        globals()["run_grouped"] = original
    assert seen == [ExpertWeight] and type(experts.w1) is nn.Parameter
    with pytest.raises(ConfigError):
        experts(torch.randn(32, 31), COUNTS)
    assert type(experts.w1) is nn.Parameter


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_inside_the_forward(use_reentrant):
    class Checkpointed(Experts):
        def forward(self, x, counts):
            return checkpoint(super().forward, x, counts, use_reentrant=use_reentrant)

    results = []
    for cls in (Experts, Checkpointed):
        torch.manual_seed(0)
        model = Model()
        model.moe.experts = cls()
        convert(model, backend="reference")
        torch.manual_seed(1)
        results.append(step(model.moe.experts, torch.randn(32, 32, requires_grad=True)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inference_mode_and_pickle(tmp_path):
    experts, _, _ = converted()
    x = torch.randn(32, 32)
    with torch.inference_mode():
        inferred = experts(x, COUNTS)
    assert torch.equal(inferred, experts(x, COUNTS))
    torch.save(experts, tmp_path / "experts.pt")
    loaded = torch.load(tmp_path / "experts.pt", weights_only=False)
    assert torch.equal(loaded(x, COUNTS), inferred)


def test_weights_that_others_read_are_kept():
    model = Model()
    model.moe.experts = nn.Module()
    model.moe.experts.num_experts = 4
    model.moe.experts.w1 = nn.Parameter(torch.randn(4, 8, 8))
    report = convert(model, backend="reference")
    assert "moe.experts.w1" in report.kept and "no forward" in str(report)
