"""Every recipe over two ranks: the operands and results of one device.

All recipes and styles run in one pair of processes; shards are whole blocks of 16 and 32.
"""

from dataclasses import replace

import pytest
import torch
from ranks import DEVICES, spawn
from test_tensor_parallel import STYLES, WORLD
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from nvfp4_titan import RECIPES
from nvfp4_titan.backends import BACKENDS
from nvfp4_titan.training import key_tensor, linear

CASES = {name: recipe for name, recipe in RECIPES.items() if recipe.quantized}
CASES["nvfp4_single"] = RECIPES["nvfp4"].switched(tensor_scale=False)


def inputs(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 64, generator=generator)
    w = torch.randn(128, 64, generator=generator) * torch.logspace(-2, 0, 64)
    dy = torch.randn(64, 128, generator=generator) * torch.logspace(0, -2, 128)
    return x.to(device), w.to(device), dy.to(device)


def recording():
    """The reference backend, the operands that it makes, and the formats whose amax it takes."""
    reference, made, amaxes = BACKENDS["reference"], [], set()

    def quantize(t, rows, cols, *args):
        operands = reference.quantize(t, rows, cols, *args)
        made.append([o and (o.codes.view(torch.uint8), o.block_scale.view(torch.uint8))
                     for o in operands])  # fmt: skip
        return operands

    def amax(t, rows, cols, offs=None):
        amaxes.update(use.format.format.name for use in (rows, cols) if use)
        return reference.amax(t, rows, cols, offs)

    return replace(reference, quantize=quantize, amax=amax), made, amaxes


def run(recipe, device="cpu", place=lambda t, dim: t, style="none"):
    """Operands, results and reduced formats of one linear."""
    x_dim, w_dim, _ = STYLES[style]
    x, w, dy = inputs(device)
    x, w = place(x, x_dim).requires_grad_(), place(w, w_dim).requires_grad_()
    backend, made, amaxes = recording()
    y = linear(x, w, recipe=recipe, backend=backend, key=key_tensor(3, "wq"))
    whole = y.redistribute(placements=[Replicate()]) if style == "rowwise" else y
    whole.backward(place(dy, -1 if style == "colwise" else None).detach())
    return made, [t.detach() for t in (y, x.grad, w.grad)], amaxes


def all_runs(rank, device):
    mesh = init_device_mesh(device.type, (WORLD,), mesh_dim_names=("tp",))

    def place(t, dim):
        placement = Replicate() if dim is None else Shard(dim % t.dim())
        return distribute_tensor(t, mesh, [placement])

    found = {}
    for style in STYLES:
        for name, recipe in CASES.items():
            made, results, amaxes = run(recipe, device, place, style)
            found[style, name] = made, [t.full_tensor() for t in results], amaxes
    return found


@pytest.fixture(scope="module", params=DEVICES)
def ranks(request, tmp_path_factory):
    return spawn(all_runs, request.param, WORLD, tmp_path_factory.mktemp("ranks"))


def quantized_tensors(recipe) -> list[str]:
    """What the function quantizes, in order."""
    backward = ["dy"] if recipe.dgrad else []
    again = ["x", "w"] if recipe.dequantized and recipe.dgrad else []
    return ["x", "w", *again, *backward]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("style", STYLES)
def test_operands_and_results_are_those_of_one_device(ranks, style, name):
    recipe = CASES[name]
    expected_made, expected, _ = run(recipe)
    x_dim, w_dim, _ = STYLES[style]
    shards = {"x": x_dim, "w": w_dim, "dy": -1 if style == "colwise" else None}
    for rank, found in enumerate(ranks):
        made, results, amaxes = found[style, name]
        tensors = quantized_tensors(recipe)
        assert len(made) == len(expected_made) == len(tensors)
        for tensor, ours, theirs in zip(tensors, made, expected_made, strict=True):
            for side, part, full in zip(("rows", "cols"), ours, theirs, strict=True):
                if full is None:
                    assert part is None
                    continue
                dim = shards[tensor]
                along = None if dim is None else (dim % 2 if side == "rows" else 1 - dim % 2)
                for mine, whole in zip(part, full, strict=True):
                    whole = whole if along is None else whole.chunk(WORLD, along)[rank]
                    assert torch.equal(mine, whole), (tensor, side)
        for actual, wanted in zip(results, expected, strict=True):
            assert (actual - wanted).norm() <= 1e-5 * wanted.norm()
        # Where no use of a tensor has a scale per tensor, nothing is reduced.
        if name.startswith("mxfp8"):
            assert not amaxes
