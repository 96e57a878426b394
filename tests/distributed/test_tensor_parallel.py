"""A linear over two ranks' DTensors: the codes and scales of one device, every operand.

Losses cannot see a missing amax reduction or noise tied to a rank; codes and scales can. Each rank
records what the backend made of its shards; the test compares that with the whole.
"""

import pytest
import torch
from ranks import DEVICES, spawn
from support import recording
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from nvfp4_titan.backends import BACKENDS
from nvfp4_titan.errors import UnsupportedError
from nvfp4_titan.training import key_tensor, linear

WORLD = 2
STYLES = {
    # x, w, y: dims that are sharded, None for replicated, "partial" for sums
    "colwise": (None, 0, -1),
    "rowwise": (-1, 1, "partial"),
    "none": (None, None, None),
}


def inputs(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 64, generator=generator)
    w = torch.randn(96, 64, generator=generator) * torch.logspace(-2, 0, 64)
    dy = torch.randn(2, 24, 96, generator=generator) * torch.logspace(0, -2, 96)
    return x.to(device), w.to(device), dy.to(device)


def run(rank, device, style, fault):
    x_dim, w_dim, _ = STYLES[style]
    mesh = init_device_mesh(device.type, (WORLD,), mesh_dim_names=("tp",))

    def place(t, dim):
        placement = Replicate() if dim is None else Shard(dim % t.dim())
        return distribute_tensor(t, mesh, [placement]).requires_grad_()

    x, w, dy = inputs(device)
    x, w = place(x, x_dim), place(w, w_dim)
    backend, made = recording(fault)
    y = linear(x, w, backend=backend, key=key_tensor(3, "wq"))
    dy_dim = -1 if style == "colwise" else None
    y.redistribute(placements=[Replicate()] if style == "rowwise" else y.placements).backward(
        place(dy, dy_dim).detach()
    )
    found = list(made), [t.full_tensor().detach() for t in (y, x.grad, w.grad)]
    if fault is None:
        check_compiled(x, w, y)
    if style == "colwise" and fault is None:
        uneven = linear(x, place(w.full_tensor().detach()[:33], 0), backend=backend)
        assert uneven.full_tensor().shape == (2, 24, 33)
        with pytest.raises(UnsupportedError, match="ColwiseParallel"):
            linear(place(inputs(device)[0], 0), w, backend=backend)
        with pytest.raises(UnsupportedError, match="parallelize the module"):
            linear(inputs(device)[0], w, backend=backend)
    return found


def check_compiled(x, w, y):
    """One graph, the same bits forward, and finite gradients."""
    backend = BACKENDS["reference"]
    key = key_tensor(3, "wq")

    def function(x, w):
        return linear(x, w, backend=backend, key=key)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    result = compiled(x, w)
    assert torch.equal(result.to_local(), y.to_local())
    result.to_local().sum().backward()
    assert x.grad.to_local().isfinite().all() and w.grad.to_local().isfinite().all()


def whole():
    """Operands and results of one process on a CPU."""
    x, w, dy = inputs()
    x, w = x.requires_grad_(), w.requires_grad_()
    backend, made = recording()
    y = linear(x, w, backend=backend, key=key_tensor(3, "wq"))
    y.backward(dy)
    return made, [t.detach() for t in (y, x.grad, w.grad)]


def mismatches(made, expected, style, rank):
    """Operands of one rank whose codes, scales or amax are not the whole's part."""
    x_dim, w_dim, _ = STYLES[style]
    shards = {"x": x_dim, "w": w_dim, "dy": -1 if style == "colwise" else None}
    wrong = []
    for (name, *ours), (_, *theirs) in zip(made, expected, strict=True):
        dim = shards[name]
        for side, part, full in zip(("rows", "cols"), ours, theirs, strict=True):
            if full is None:
                continue
            # The column use is of the transpose: its dims are swapped.
            along = None if dim is None else (dim % 2 if side == "rows" else 1 - dim % 2)
            for field, mine, all_of in zip(("codes", "scale", "amax"), part, full, strict=True):
                if along is not None and field != "amax":
                    all_of = all_of.chunk(WORLD, along)[rank]
                if not torch.equal(mine, all_of):
                    wrong.append(f"{name} {side} {field}")
    return wrong


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("style", STYLES)
def test_operands_are_those_of_one_device(style, device, tmp_path):
    expected_made, expected = whole()
    for rank, (made, results) in enumerate(spawn(run, device, WORLD, tmp_path, style, None)):
        assert mismatches(made, expected_made, style, rank) == []
        for actual, wanted in zip(results, expected, strict=True):
            assert (actual - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("fault", "seen"), [("no reduction", "w rows amax"), ("noise tied to a rank", "dy rows codes")]
)
def test_faults_are_seen(fault, seen, device, tmp_path):
    expected_made, _ = whole()
    wrong = [
        name
        for rank, (made, _) in enumerate(spawn(run, device, WORLD, tmp_path, "colwise", fault))
        for name in mismatches(made, expected_made, "colwise", rank)
    ]
    assert seen in wrong
