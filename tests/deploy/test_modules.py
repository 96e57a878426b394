"""Prepared models compute, bit for bit, what the converted ones do, and train with gradients."""

import copy
import io

import pytest
import torch
from support import relative_error
from torch import nn

from nvfp4_titan import convert
from nvfp4_titan.backends.native import STAND_IN
from nvfp4_titan.deploy import DEPLOY_RECIPES, DeployRecipe, convert_prepared, prepare
from nvfp4_titan.deploy.modules import FakeQuantizedLinear
from nvfp4_titan.errors import ConfigError
from nvfp4_titan.training import NVFP4Linear

K, N = 256, 96


def model(bias: bool, dtype: torch.dtype) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(K, N, bias=bias), nn.GELU(), nn.Linear(N, 32, bias=bias))
    return layers.to(dtype)


class Experts(nn.Module):
    """torchtitan's way with expert weights."""

    def __init__(self, experts=3, size=64):
        super().__init__()
        self.num_experts = experts
        self.w1 = nn.Parameter(torch.randn(experts, size, size) / 8)

    def forward(self, x, offs):
        return torch._grouped_mm(x, self.w1.to(x.dtype).transpose(-2, -1), offs=offs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recipe", DEPLOY_RECIPES)
def test_prepared_equals_converted(recipe, bias, dtype):
    prepared = model(bias, dtype)
    skip = ["2"] if N % DEPLOY_RECIPES[recipe].weight.multiple else []
    prepare(prepared, recipe, skip=skip)
    plain = copy.deepcopy(prepared)
    converted = copy.deepcopy(prepared)
    convert_prepared(converted)
    x = torch.randn(2, 8, K, dtype=dtype)
    y = prepared(x)
    assert torch.equal(y, converted(x))
    unquantized = model(bias, dtype)
    unquantized.load_state_dict(plain.state_dict())
    assert not torch.equal(y, unquantized(x))


@pytest.mark.parametrize("recipe", DEPLOY_RECIPES)
def test_both_states_are_copied_and_pickled(recipe):
    module = model(True, torch.float32)
    prepare(module, recipe, skip=["2"] if N % DEPLOY_RECIPES[recipe].weight.multiple else [])
    x = torch.randn(8, K)
    for next_state in (convert_prepared, None):
        y, file = module(x), io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        assert torch.equal(copy.deepcopy(module)(x), y)
        assert torch.equal(torch.load(file, weights_only=False)(x), y)
        if next_state:
            next_state(module)
    with pytest.raises(ConfigError, match="was converted before"):
        convert_prepared(module)


def test_prepared_equals_converted_in_native_layouts():
    """Padded (the second linear's 96), with blocked scales."""
    prepared = nn.ModuleDict({"dense": model(True, torch.bfloat16), "experts": Experts(size=48)})
    prepare(prepared, "nvfp4", backend=STAND_IN)
    converted = copy.deepcopy(prepared)
    convert_prepared(converted, torch.bfloat16)
    x, offs = torch.randn(24, K, dtype=torch.bfloat16), torch.tensor([5, 5, 24], dtype=torch.int32)
    assert torch.equal(prepared["dense"](x), converted["dense"](x))
    x = x[:, :48].contiguous()
    assert torch.equal(prepared["experts"](x, offs), converted["experts"](x, offs))


@pytest.mark.parametrize("recipe", DEPLOY_RECIPES)
def test_prepared_equals_converted_under_autocast(recipe):
    prepared = model(True, torch.float32)
    skip = ["2"] if N % DEPLOY_RECIPES[recipe].weight.multiple else []
    prepare(prepared, recipe, skip=skip)
    x = torch.randn(2, 8, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = prepared(x)
        convert_prepared(prepared, torch.bfloat16)
        assert torch.equal(prepared(x), y) and y.dtype == torch.bfloat16


def test_the_report_is_that_of_the_conversion():
    class Extra(nn.Sequential):
        def __init__(self):
            super().__init__(*model(False, torch.float32))
            self.extra = nn.Parameter(torch.zeros(8, 8))

    report = prepare(Extra(), "int8_act_int4_weight")
    assert any("extra" in note for note in report.notes)


def test_a_codec_of_the_same_parameters_is_the_same():
    from nvfp4_titan.deploy import codecs

    assert codecs.int_group(4, 32) == codecs.int_group(4, 32) != codecs.int_group(4, 64)
    mine = DeployRecipe("mine", None, codecs.int_group(4, 32), None, None)
    prepare(model(False, torch.float32), "int8_act_int4_weight")
    assert prepare(model(False, torch.float32), mine).converted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_single", "mxfp8"])
def test_experts_prepared_equal_converted(recipe, dtype):
    prepared = nn.ModuleDict({"experts": Experts()})
    report = prepare(prepared, recipe)
    assert report.converted == ("experts.w1",)
    converted = copy.deepcopy(prepared)
    convert_prepared(converted, dtype)
    x, offs = torch.randn(24, 64, dtype=dtype), torch.tensor([5, 5, 24], dtype=torch.int32)
    y = prepared["experts"](x, offs)
    assert torch.equal(y, converted["experts"](x, offs))
    assert not torch.equal(y, Experts.forward(_plain(prepared["experts"]), x, offs))


def _plain(experts: Experts) -> Experts:
    plain = Experts()
    plain.load_state_dict(experts.state_dict())
    return plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", DEPLOY_RECIPES)
def test_gradients_are_straight_through(recipe, dtype):
    """Small losses too: a gradient that is cast to float8 on its way would be zeros there."""
    prepared = nn.Sequential(nn.Linear(K, N, bias=False, dtype=dtype))
    reference = copy.deepcopy(prepared)
    prepare(prepared, recipe)
    x = torch.randn(64, K, dtype=dtype)
    grad = torch.randn(64, N, dtype=dtype) * 1e-5
    found = []
    for module in (prepared, reference):
        own = x.clone().requires_grad_()
        module(own).backward(grad)
        found.append((own.grad, module[0].weight.grad))
    for ours, exact in zip(*found, strict=True):
        assert torch.cosine_similarity(ours.flatten().double(), exact.flatten().double(), 0) > 0.97


@pytest.mark.parametrize("recipe", DEPLOY_RECIPES)
def test_gradients_are_those_of_the_quantized_weight(recipe):
    """dx multiplies what the forward did; the original weight is in the same direction, too."""
    prepared = nn.Sequential(nn.Linear(K, N, bias=False))
    prepare(prepared, recipe)
    w, codec = prepared[0].weight.detach(), DEPLOY_RECIPES[recipe].weight
    x, grad = torch.randn(64, K, requires_grad=True), torch.randn(64, N)
    prepared(x).backward(grad)
    assert relative_error(x.grad, grad @ codec.round_trip(w)) < 1e-6
    assert relative_error(x.grad, grad @ w) > 1e-3


def test_torchaos_float8_gradients_are_wrong():
    """What the test above guards against: torchao's own float8 QAT fails it."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    from torchao.quantization.qat import QATConfig

    module = nn.Sequential(nn.Linear(K, N, bias=False))
    reference = copy.deepcopy(module)
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(module, QATConfig(config, step="prepare"))
    x, grad = torch.randn(64, K), torch.randn(64, N) * 1e-5
    for m in (module, reference):
        m(x).backward(grad)
    ours, exact = module[0].weight.grad.flatten(), reference[0].weight.grad.flatten()
    assert torch.cosine_similarity(ours, exact, 0) < 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_symmetric_integers_arithmetic(dtype):
    """Groups of 32 in int4, tokens in int8, written out; the least scale is the dtype's eps."""
    recipe = DEPLOY_RECIPES["int8_act_int4_weight"]
    eps = torch.finfo(dtype).eps
    x = torch.randn(4, 64, dtype=dtype) * torch.tensor([1.0, 30.0, eps, 1e-12]).unsqueeze(1)
    x = x.to(dtype)
    for codec, group, low, high, largest in (
        (recipe.weight, 32, -8, 7, 7.5),
        (recipe.activation, 64, -128, 127, 127.5),
    ):
        expected = []
        for part in x.reshape(-1, group):
            step = (part.abs().max() / torch.tensor(largest, dtype=dtype)).clamp(min=eps)
            expected.append((part / step).clamp(low, high).round() * step)
        assert torch.equal(codec.round_trip(x), torch.stack(expected).view_as(x))


def test_int4_kernels_arithmetic():
    """The two int4 kernels' arithmetic, written out element by element from its description."""
    w = torch.randn(4, 256) * torch.tensor([1.0, 30.0, 1e-4, 1e-9]).unsqueeze(1)
    for name, kernel in (
        ("float8_act_int4_weight", _float8_then_int4),
        ("int4_weight_only", _asymmetric_int4),
    ):
        fake = DEPLOY_RECIPES[name].weight.round_trip(w)
        assert torch.equal(fake, torch.stack([kernel(row) for row in w])), name


def _float8_then_int4(row: torch.Tensor) -> torch.Tensor:
    scale = max(row.abs().max().item() / 448, 1e-12)
    row_scale = torch.tensor(scale, dtype=torch.float32)
    w8 = (row / row_scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * row_scale
    out = []
    for group in w8.split(128):
        step = (group.abs().max() / 8).clamp(min=1e-6)
        out += [torch.clamp(torch.round(v / step), -8, 7) * step for v in group]
    return torch.stack(out)


def _asymmetric_int4(row: torch.Tensor) -> torch.Tensor:
    out = []
    for group in row.split(128):
        low = group.min()
        step = (group.max() - low).clamp(min=1e-6) / 15
        for v in group:
            code = torch.clamp(torch.round((v - low) / step), 0, 15) - 8
            out.append(code * step + (low + step * 8))
    return torch.stack(out)


def test_bad_input():
    with pytest.raises(ConfigError, match="unknown: use one of nvfp4"):
        prepare(model(True, torch.float32), "int3")
    with pytest.raises(ConfigError, match="matches no linear"):
        prepare(model(True, torch.float32), "nvfp4", skip=["nothing"])
    with pytest.raises(ConfigError, match="group of 128: add its name to skip"):
        prepare(nn.Sequential(nn.Linear(96, 32)), "int4_weight_only")
    with pytest.raises(ConfigError, match="nothing in the model is prepared"):
        convert_prepared(model(True, torch.float32))


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_single", "mxfp8"])
def test_a_converted_model_moves_to_a_device(recipe):
    model = nn.Sequential(nn.Linear(64, 64))
    prepare(model, recipe, backend="reference")
    convert_prepared(model)
    x = torch.randn(16, 64)
    y = model(x)
    assert torch.equal(model.to("cpu")(x), y)
    weight = model.to("meta")[0].weight
    parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    assert {part.device.type for part in (weight, *parts)} == {"meta"}


def test_one_module_is_not_converted_twice():
    for recipe, kind in (("nvfp4", NVFP4Linear), ("int8_act_int4_weight", FakeQuantizedLinear)):
        prepared = model(True, torch.float32)
        prepare(prepared, recipe)
        assert isinstance(prepared[0], kind)
        with pytest.raises(ConfigError):
            convert(prepared)
        with pytest.raises(ConfigError):
            prepare(prepared, recipe)
    trained = model(True, torch.float32)
    convert(trained)
    with pytest.raises(ConfigError, match="was converted before"):
        prepare(trained, "int8_act_int4_weight")


def test_an_error_leaves_the_model_as_it_was():
    layers = nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 128))
    with pytest.raises(ConfigError, match="1.*add its name to skip"):
        prepare(layers, "int4_weight_only")
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Linear]
    prepare(layers, "int4_weight_only", skip=["1"])
    assert [type(layer) for layer in layers] == [FakeQuantizedLinear, nn.Linear]
