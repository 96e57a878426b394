"""Compiled models fake-quantize to the bits of the deployed ones."""

import copy

import pytest
import torch
from torch import nn

from nvfp4_titan.deploy import DEPLOY_RECIPES, convert_prepared, prepare
from nvfp4_titan.deploy.fake import fake_quantize, known

ACTIVATIONS = {
    codec.name: codec
    for recipe in DEPLOY_RECIPES.values()
    for codec in (recipe.weight, recipe.activation)
    if codec is not None
}


def check(recipe, backend, device="cpu"):
    """Forward of a compiled QAT model against the converted one, in bf16, and its gradients."""
    # inductor adds a bias unrounded, to what a SiLU reads and in a GEMM that it sees (that of
    # mxfp8), in bf16 models of any kind.
    layers = nn.Sequential(
        nn.Linear(256, 128, bias=False), nn.SiLU(), nn.Linear(128, 64, bias=recipe != "mxfp8")
    )
    prepared = layers.to(device, torch.bfloat16)
    prepare(prepared, recipe)
    converted, eager = copy.deepcopy(prepared), copy.deepcopy(prepared)
    convert_prepared(converted)
    x = torch.randn(64, 256, device=device, dtype=torch.bfloat16)
    torch._dynamo.reset()
    y = torch.compile(prepared, backend=backend, fullgraph=True)(x)
    assert torch.equal(y, converted(x))
    y.float().square().sum().backward()
    eager(x).float().square().sum().backward()
    for ours, expected in zip(prepared.parameters(), eager.parameters(), strict=True):
        pair = (of.grad.float().flatten() for of in (ours, expected))
        assert torch.cosine_similarity(*pair, 0) > 0.999


def test_traced_equals_converted():
    check("mxfp4", "aot_eager")


def test_inductor_changes_no_integer():
    """It leaves roundings to bf16 out, of which integers are made: 3.6% of y, where it looks in."""
    check("int8_act_int4_weight", "inductor")


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", DEPLOY_RECIPES)
def test_compiled_on_a_gpu_equals_converted(recipe):
    check(recipe, "inductor", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gpu_gives_the_bits_of_a_cpu(name, dtype):
    codec = known(ACTIVATIONS[name])
    for columns in (128, 4096, 1152):
        x = (torch.randn(333, columns) * torch.logspace(-4, 4, 333)[:, None]).to(dtype)
        assert torch.equal(fake_quantize(x.cuda(), codec).cpu(), codec.round_trip(x))
