"""Formats that change at a step: parsing, switching modules, one more graph under compile."""

import copy
from dataclasses import replace

import pytest
import torch
from test_experts import COUNTS, Model
from torch import nn

from nvfp4_titan import RECIPES, convert
from nvfp4_titan.backends import BACKENDS
from nvfp4_titan.errors import ConfigError, UnsupportedError
from nvfp4_titan.recipe import Change, parse_rules, parse_schedule
from nvfp4_titan.training import NVFP4Linear, linear
from nvfp4_titan.training.schedule import FormatSchedule


@pytest.mark.parametrize(
    ("text", "steps", "change"),
    [
        ("0.82:fprop=bf16", 100, Change(83, "fprop", "bf16")),
        ("0.82:fprop=bf16", 50, Change(42, "fprop", "bf16")),
        ("0.99:dgrad=mxfp8", 10, Change(10, "dgrad", "mxfp8")),
        ("0:wgrad=nvfp4_46", 10, Change(1, "wgrad", "nvfp4_46")),
        (" 7 : wgrad = bf16 ", 10, Change(8, "wgrad", "bf16")),
    ],
)
def test_parse(text, steps, change):
    assert parse_schedule([text, ""], steps) == (change,)


@pytest.mark.parametrize(
    ("texts", "fragment"),
    [
        (["fprop=bf16"], "of the form"),
        (["0.5:fprop"], "of the form"),
        (["0.5:output=bf16"], "one of fprop, dgrad, wgrad"),
        (["1.5:fprop=bf16"], "of the form"),
        (["-1:fprop=bf16"], "of the form"),
        (["nan:fprop=bf16"], "of the form"),
        (["0.5:fprop=fp5"], "use one of nvfp4"),
        (["10:fprop=bf16"], "never reached"),
        (["0.5:fprop=bf16", "5:fprop=mxfp8"], "twice at step 6"),
    ],
)
def test_errors_name_the_fix(texts, fragment):
    with pytest.raises(ConfigError, match=fragment):
        parse_schedule(texts, 10)


def test_changes_hold_from_their_step_on():
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    convert(model, rules=["2=mxfp8"], backend="reference")
    changes = parse_schedule(["2:fprop=bf16", "5:wgrad=mxfp8", "5:fprop=nvfp4_46"], 10)
    schedule = FormatSchedule([model], changes)
    x = torch.randn(16, 32)
    assert schedule.before_step(1) == schedule.before_step(2) == []
    assert model[0].recipe is RECIPES["nvfp4"]
    assert len(schedule.before_step(3)) == 1 and schedule.before_step(4) == []
    assert torch.equal(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias))
    assert model[0].recipe.dgrad == RECIPES["nvfp4"].dgrad and model[0].recipe is model[1].recipe
    assert model[2].recipe.fprop is None and model[2].recipe.wgrad == RECIPES["mxfp8"].wgrad
    # A run restored at step 9 makes all changes at once, and is where the other one gets to.
    resumed = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    convert(resumed, rules=["2=mxfp8"], backend="reference")
    assert len(FormatSchedule([resumed], changes).before_step(9)) == 3
    schedule.before_step(9)
    assert [m.recipe for m in resumed] == [m.recipe for m in model]
    assert model[0].recipe.fprop == RECIPES["nvfp4_46"].fprop


def test_switches_hold_for_what_comes():
    model = nn.Sequential(nn.Linear(32, 32))
    convert(model, recipe="mxfp8", sr=False, backend="reference")
    changes = parse_schedule(["1:dgrad=nvfp4"], 2)
    FormatSchedule([model], changes, {"sr": False}).before_step(2)
    assert model[0].recipe.dgrad.left.rounding == "rtne"


def test_experts_change_too():
    model = Model()
    convert(model, backend="reference")
    before = copy.deepcopy(model)
    changes = parse_schedule(["1:fprop=bf16", "1:dgrad=bf16", "1:wgrad=bf16"], 2)
    FormatSchedule([model], changes).before_step(2)
    x = torch.randn(32, 32)
    results = [m.moe.experts(x, COUNTS) for m in (model, before, Model())]
    assert not torch.equal(results[0], results[1])
    plain = Model()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(results[0], plain.moe.experts(x, COUNTS))


def test_validation_in_another_recipe():
    model = Model()
    convert(model, rules=["*w2=mxfp8"], backend="reference")
    plain = Model()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(32, 32)

    def run(m):
        return m.moe.experts(x, COUNTS)

    def recipes(m):
        return {
            (path, name): recipe
            for path, module in m.named_modules()
            for name, (recipe, _) in getattr(module, "recipes", dict)().items()
        }

    before, outputs = recipes(model), run(model)
    assert len(set(before.values())) == 2
    schedule = FormatSchedule([model], validation="bf16")
    with pytest.raises(KeyboardInterrupt), schedule.validating():
        assert torch.equal(run(model), run(plain))
        raise KeyboardInterrupt
    after = recipes(model)
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
    assert torch.equal(run(model), outputs) and not torch.equal(outputs, run(plain))
    with FormatSchedule([model]).validating():
        assert torch.equal(run(model), outputs)
    backend = replace(BACKENDS["reference"], formats=frozenset({"nvfp4"}))
    model = nn.Sequential(nn.Linear(32, 32))
    convert(model, backend=backend)
    with pytest.raises(UnsupportedError, match="lacks the formats mxfp8"):
        FormatSchedule([model], validation="mxfp8")


def test_a_format_that_the_backend_lacks_is_refused_at_the_start():
    backend = replace(BACKENDS["reference"], formats=frozenset({"nvfp4"}))
    model = nn.Sequential(nn.Linear(32, 32))
    convert(model, backend=backend)
    with pytest.raises(UnsupportedError, match="lacks the formats mxfp8"):
        FormatSchedule([model], parse_schedule(["5:wgrad=mxfp8"], 10))


def test_compiled_layers_share_one_more_graph():
    torch._dynamo.reset()
    layers = nn.Sequential(
        *(NVFP4Linear(32, 32, name=str(i), backend="reference") for i in range(10))
    )
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph

    compiled = [torch.compile(layer, backend=backend, fullgraph=True) for layer in layers]
    x = torch.randn(16, 32, requires_grad=True)
    schedule = FormatSchedule([layers], parse_schedule(["1:fprop=bf16"], 4))
    for step, graphs in ((1, 1), (2, 2), (3, 2)):
        schedule.before_step(step)
        for layer, function in zip(layers, compiled, strict=True):
            expected = linear(x, layer.weight, layer.bias, recipe=layer.recipe, backend="reference")
            assert torch.equal(function(x), expected)
        assert len(compiles) == graphs


def test_a_validation_costs_one_graph():
    torch._dynamo.reset()
    layer = NVFP4Linear(32, 32, backend="reference")
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(16, 32, requires_grad=True)
    schedule = FormatSchedule([layer], validation="mxfp8")
    y = compiled(x)
    for _ in range(2):
        with schedule.validating():
            expected = linear(x, layer.weight, layer.bias, recipe="mxfp8", backend="reference")
            assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x), y)
        assert len(compiles) == 2


def test_rules_in_conflict():
    with pytest.raises(ConfigError, match="conflict: 'a' is to get 'bf16' and 'mxfp8'"):
        parse_rules(["a=bf16", "b=bf16", "a=mxfp8"])
    assert len(parse_rules(["a=bf16", "a=bf16"])) == 2
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with pytest.raises(ConfigError, match="'0=bf16' decides nothing"):
        convert(model, rules=["0=bf16", "*=mxfp8"], backend="reference")
    report = convert(model, rules=["*=mxfp8", "0=nvfp4_46"], backend="reference")
    assert [(e.recipe, e.reason) for e in report.entries] == [
        ("nvfp4_46", "rule 0"),
        ("mxfp8", "rule *"),
    ]
    assert "nvfp4_46" in str(report) and "rule *" in str(report)
