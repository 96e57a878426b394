"""torchtitan's experts sharded by EP, TP and ETP: the codes and scales of one device.

Each rank records what the backend made of its shards; the test compares that with the whole, expert
by expert. Tokens are fed so that every expert sees the same ones in the same order.
"""

from functools import cache

import pytest
import torch
from support import recording
from torch import distributed, multiprocessing
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh

from nvfp4_titan.titan import cpu_runtime

# Here and not in the fixtures: spawned ranks import this file alone.
cpu_runtime.install()
cpu_runtime.patch_moe()

DIM, HIDDEN, EXPERTS = 64, 96, 4
# Tokens per expert of each of two data ranks; one expert gets none.
COUNTS = ((5, 0, 40, 17), (12, 0, 3, 33))
STYLES = {"tp": (1, 2), "ep": (2, 1), "ep_etp": (2, 2)}  # EP and TP degrees


def inputs():
    """Per data rank: tokens sorted by expert, and the gradients of their outputs."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-2, 0, DIM)

    def draw(counts):
        return torch.randn(sum(counts), DIM, generator=generator) * scale

    return [(draw(counts), draw(counts).flip(1)) for counts in COUNTS]


def experts(fault=None):
    """torchtitan's experts, converted, with a recorder at each weight; and the recordings."""
    from torchtitan.models.moe.moe import GroupedExperts
    from torchtitan.models.moe.utils import set_token_group_alignment_size_m

    from nvfp4_titan.recipe import RECIPES
    from nvfp4_titan.training.experts import ExpertOptions, convert_experts

    set_token_group_alignment_size_m(16)
    module = GroupedExperts(DIM, HIDDEN, EXPERTS, use_grouped_mm=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_().mul_(torch.logspace(-2, 0, weight.shape[-1]))
    recipe, made = RECIPES["nvfp4"], {}
    recipes = dict.fromkeys(("w1", "w2", "w3"), recipe)
    convert_experts(module, recipes, {recipe: None}, "moe.experts", 3)
    for name, (key, _) in module._converted.items():
        backend, made[name] = recording(fault)
        module._converted[name] = (key, ExpertOptions(recipe, backend))
    return module, made


def worker(rank, style, fault, folder):
    from torchtitan.distributed.expert_parallel import (
        ExpertParallel,
        ExpertTensorParallel,
        TensorParallel,
    )

    torch.set_num_threads(1)
    ep, tp = STYLES[style]
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ep * tp
    )
    names = {"tp": ("tp",), "ep": ("ep",), "ep_etp": ("ep", "etp")}[style]
    sizes = tuple(size for size in (ep, tp) if size > 1)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    module, made = experts(fault)
    plan = {"tp": TensorParallel, "ep": ExpertParallel, "ep_etp": ExpertTensorParallel}[style]()
    module = plan._apply(module, mesh)
    if ep == 1:
        counts, x, dy = whole_inputs()
    else:
        (x, dy), counts = inputs()[rank // tp], torch.tensor(COUNTS[rank // tp])
    x.requires_grad_()
    y = module(x, counts)
    y.backward(dy)
    y, dx = (funcol.wait_tensor(t.detach()) for t in (y, x.grad))
    results = y, dx, {n: p.grad.full_tensor() for n, p in module.named_parameters()}
    torch.save((made, results), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


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


@cache
def whole():
    """Operands and results of one process."""
    module, made = experts()
    counts, x, dy = whole_inputs()
    x.requires_grad_()
    # A test that ran a compiled MoE in this process leaves torchtitan's function compiled.
    with torch.compiler.set_stance("force_eager"):
        y = module(x, counts)
        y.backward(dy)
    return made, (y.detach(), x.grad, {n: p.grad for n, p in module.named_parameters()})


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


def mismatches(made, style, rank):
    """Operands of one rank whose codes, scales or amax are not the whole's part."""
    ep, tp = STYLES[style]
    ep_rank, tp_rank = divmod(rank, tp)
    mine = range(ep_rank * EXPERTS // ep, (ep_rank + 1) * EXPERTS // ep)
    sizes = padded(torch.tensor(COUNTS).sum(0).tolist())
    wrong = []
    for weight, operands in whole()[0].items():
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
                        if not torch.equal(a, b):
                            wrong.append(f"{weight} {name} {side} {field} of expert {e}")
    return wrong


def spawn(style, fault, folder):
    ep, tp = STYLES[style]
    multiprocessing.spawn(worker, (style, fault, str(folder)), nprocs=ep * tp)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ep * tp)]


@pytest.mark.parametrize("style", STYLES)
def test_operands_are_those_of_one_process(style, tmp_path):
    _, (y, dx, grads) = whole()
    ep, tp = STYLES[style]
    ranks = spawn(style, None, tmp_path)
    assert [name for r, (made, _) in enumerate(ranks) for name in mismatches(made, style, r)] == []
    # TP leaves partial sums in y; EP returns the tokens to the ranks that sent them.
    outputs = [sum(ranks[e * tp + t][1][0].float() for t in range(tp)) for e in range(ep)]
    gathered = torch.cat(outputs)
    if ep == 1:
        assert (gathered - y).norm() <= 1e-2 * y.norm()  # bf16 partial sums
    else:
        expert = [torch.arange(EXPERTS).repeat_interleave(torch.tensor(c)) for c in COUNTS]
        order = torch.cat(expert).argsort(stable=True)
        expected = torch.empty_like(y).index_copy_(0, order, y)
        # Without TP no sum is split.
        assert (gathered - expected).norm() <= (0 if tp == 1 else 1e-2) * expected.norm()
    for _, (_, _, rank_grads) in ranks:
        for name, grad in rank_grads.items():
            if tp == 1:
                assert torch.equal(grad, grads[name])
            else:
                assert (grad - grads[name]).norm() <= 1e-2 * grads[name].norm()


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("no reduction", "w1 w rows amax of expert 0"),
        ("no reduction", "w2 x rows amax of expert 2"),
        ("noise tied to a rank", "w3 dy rows codes of expert 2"),
    ],
)
def test_faults_are_seen(fault, seen, tmp_path):
    ranks = spawn("tp", fault, tmp_path)
    assert seen in [name for r, (made, _) in enumerate(ranks) for name in mismatches(made, "tp", r)]
