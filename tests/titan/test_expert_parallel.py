"""torchtitan's experts sharded by EP, TP and ETP: the codes and scales of one device.

Each rank records what the backend made of its shards; the test compares that with the whole, expert
by expert. Tokens are fed so that every expert sees the same ones in the same order.

On GPUs a GEMM of another size may sum in another order, so there operands that come out of GEMMs
need only agree but for a few roundings.
"""

import pytest
import torch
from ranks import DEVICES, on_devices, spawn
from support import recording
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nvfp4_titan.titan import cpu_runtime

# Here and not in the fixtures: spawned ranks import this file alone.
cpu_runtime.install()
cpu_runtime.patch_moe()

DIM, HIDDEN, EXPERTS = 64, 96, 4
# Tokens per expert of each of two data ranks; one expert gets none.
COUNTS = ((5, 0, 40, 17), (12, 0, 3, 33))
STYLES = {"tp": (1, 2), "ep": (2, 1), "ep_etp": (2, 2)}  # EP and TP degrees
FED = {("w1", "x"), ("w3", "x"), ("w2", "dy")} | {(f"w{i}", "w") for i in (1, 2, 3)}
"""What no GEMM comes before."""


def inputs():
    """Per data rank: tokens sorted by expert, and the gradients of their outputs."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 0, DIM)

    def draw(counts):
        return torch.randn(sum(counts), DIM, generator=generator) * scale

    return [(draw(counts), draw(counts).flip(1)) for counts in COUNTS]


def experts(device, fault=None):
    """torchtitan's experts, converted, with a recorder at each weight; and the recordings."""
    from torchtitan.models.moe.moe import GroupedExperts
    from torchtitan.models.moe.utils import set_token_group_alignment_size_m

    from nvfp4_titan.backends import BACKENDS
    from nvfp4_titan.recipe import RECIPES
    from nvfp4_titan.training.experts import ExpertOptions, convert_experts

    set_token_group_alignment_size_m(16)
    module = GroupedExperts(DIM, HIDDEN, EXPERTS, use_grouped_mm=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_().mul_(torch.logspace(-2, 0, weight.shape[-1]))
    module.to(device)
    recipe, made = RECIPES["nvfp4"], {}
    recipes = dict.fromkeys(("w1", "w2", "w3"), recipe)
    convert_experts(module, recipes, {recipe: BACKENDS["reference"]}, "moe.experts", 3)
    for name, (key, _) in module._converted.items():
        backend, made[name] = recording(fault)
        module._converted[name] = (key, ExpertOptions(recipe, backend))
    return module, made


def run(rank, device, style, fault):
    """What one rank saw; and, from the first, what one process sees."""
    from torchtitan.distributed.expert_parallel import (
        ExpertParallel,
        ExpertTensorParallel,
        TensorParallel,
    )

    ep, tp = STYLES[style]
    one = whole(device) if rank == 0 else None
    names = {"tp": ("tp",), "ep": ("ep",), "ep_etp": ("ep", "etp")}[style]
    sizes = tuple(size for size in (ep, tp) if size > 1)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    module, made = experts(device, fault)
    plan = {"tp": TensorParallel, "ep": ExpertParallel, "ep_etp": ExpertTensorParallel}[style]()
    module = plan._apply(module, mesh)
    if ep == 1:
        counts, x, dy = whole_inputs()
    else:
        (x, dy), counts = inputs()[rank // tp], torch.tensor(COUNTS[rank // tp])
    results = forward_backward(module, x, counts, dy, device)
    return made, results, one


def forward_backward(module, x, counts, dy, device):
    """Outputs, gradients of the tokens, and whole gradients of the weights."""
    x = x.to(device).requires_grad_()
    y = module(x, counts.to(device))
    y.backward(dy.to(device))
    y, dx = (funcol.wait_tensor(t.detach()) for t in (y, x.grad))
    grads = {n: p.grad for n, p in module.named_parameters()}
    return y, dx, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}


def whole_inputs():
    """All tokens sorted by expert, the first rank's before the second's, as EP dispatches them."""
    counts = torch.tensor(COUNTS)
    parts = [
        [t.split(list(rank_counts)) for t in pair]
        for pair, rank_counts in zip(inputs(), COUNTS, strict=True)
    ]
    x, dy = (
        torch.cat([parts[rank][i][e] for e in range(EXPERTS) for rank in range(2)])
        for i in range(2)
    )
    return counts.sum(0), x, dy


def whole(device):
    """Operands and results of one process."""
    module, made = experts(device)
    counts, x, dy = whole_inputs()
    return made, forward_backward(module, x, counts, dy, device)


def padded(counts):
    """Tokens of each expert after padding; torchtitan pads an empty expert to one block."""
    return [max(16, -(-c // 16) * 16) for c in counts]


def split_tokens(side, tensors, sizes):
    codes, scale, amax = tensors
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    spans = list(zip(ends[:-1], ends[1:], amax, strict=True))
    if side == "rows":
        return [(codes[a:b], scale[a:b], m) for a, b, m in spans]
    return [(codes[:, a // 2 : b // 2], scale[:, a // 16 : b // 16], m) for a, b, m in spans]


def same(a, b, exact):
    """Whether two tensors of codes, scales or amaxes agree."""
    if exact:
        return torch.equal(a, b)
    if a.is_floating_point() and a.dtype.itemsize == 4:  # an amax
        return bool((a - b).abs() <= 1e-2 * b.abs())
    return a.shape == b.shape and (a != b).float().mean() <= 0.03


def mismatches(made, expected, style, rank, device):
    """Operands of one rank whose codes, scales or amax are not the whole's part."""
    ep, tp = STYLES[style]
    ep_rank, tp_rank = divmod(rank, tp)
    mine = range(ep_rank * EXPERTS // ep, (ep_rank + 1) * EXPERTS // ep)
    sizes = padded(torch.tensor(COUNTS).sum(0).tolist())
    wrong = []
    for weight, operands in expected.items():
        # Dims of (rows, contraction) that TP shards, in the row use.
        cut = {"x": 1, "w": 1, "dy": None} if weight == "w2" else {"x": None, "w": 0, "dy": 1}
        for (name, *ours), (_, *theirs) in zip(made[weight], operands, strict=True):
            for side, part, full in zip(("rows", "cols"), ours, theirs, strict=True):
                if full is None:
                    continue
                if name == "w":
                    part, full = (list(zip(*t, strict=True)) for t in (part, full))
                else:
                    part = split_tokens(side, part, [sizes[e] for e in mine])
                    full = split_tokens(side, full, sizes)
                dim = cut[name] if side == "rows" or cut[name] is None else 1 - cut[name]
                for local, e in enumerate(mine):
                    for field, a, b in zip(
                        ("codes", "scale", "amax"), part[local], full[e], strict=True
                    ):
                        if dim is not None and field != "amax" and tp > 1:
                            b = b.chunk(tp, dim)[tp_rank]
                        if not same(a, b, device == "cpu" or (weight, name) in FED):
                            wrong.append(f"{weight} {name} {side} {field} of expert {e}")
    return wrong


def run_ranks(style, device, folder, fault=None):
    """What each rank saw, what one process saw, and the mismatches."""
    ep, tp = STYLES[style]
    ranks = spawn(run, device, ep * tp, folder, style, fault)
    expected, results = ranks[0][2]
    wrong = [
        name
        for rank, (made, _, _) in enumerate(ranks)
        for name in mismatches(made, expected, style, rank, device)
    ]
    return [found for _, found, _ in ranks], results, wrong


@pytest.mark.parametrize(
    ("style", "device"), on_devices({name: ep * tp for name, (ep, tp) in STYLES.items()})
)
def test_operands_are_those_of_one_process(style, device, tmp_path):
    ep, tp = STYLES[style]
    ranks, (y, _, grads), wrong = run_ranks(style, device, tmp_path)
    assert wrong == []
    # TP leaves partial sums in y; EP returns the tokens to the ranks that sent them.
    outputs = [sum(ranks[e * tp + t][0].float() for t in range(tp)) for e in range(ep)]
    gathered = torch.cat(outputs)
    if ep == 1:
        assert (gathered - y).norm() <= 1e-2 * y.norm()  # bf16 partial sums
    else:
        expert = [torch.arange(EXPERTS).repeat_interleave(torch.tensor(c)) for c in COUNTS]
        order = torch.cat(expert).argsort(stable=True)
        expected = torch.empty_like(y).index_copy_(0, order, y)
        # Without TP no sum is split.
        limit = 0 if tp == 1 and device == "cpu" else 1e-2
        assert (gathered - expected).norm() <= limit * expected.norm()
    for _, _, rank_grads in ranks:
        for name, grad in rank_grads.items():
            if tp == 1 and device == "cpu":
                assert torch.equal(grad, grads[name])
            else:
                assert (grad - grads[name]).norm() <= 1e-2 * grads[name].norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("no reduction", "w1 w rows amax of expert 0"),
        ("no reduction", "w2 x rows amax of expert 2"),
        ("noise tied to a rank", "w3 dy rows codes of expert 2"),
    ],
)
def test_faults_are_seen(fault, seen, device, tmp_path):
    assert seen in run_ranks("tp", device, tmp_path, fault)[2]
