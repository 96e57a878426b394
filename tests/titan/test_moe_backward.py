"""MoE models under TP have the gradients of one process, which torchtitan alone does not give."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ranks import spawn
from torch.distributed.tensor import DTensor

from nvfp4_titan.titan import cpu_runtime

# Here and not in a fixture: spawned ranks import this file alone.
cpu_runtime.install()
cpu_runtime.patch_moe()

ROWS, LENGTH = 4, 32
DEGREES = {  # TP, EP, expert TP; the rest of four ranks shards the data
    "tp": (2, 1, 1),
    "tp and ep": (2, 2, 2),
    "tp lent to ep": (2, 2, 1),
}
CASES = [(name, before) for name in DEGREES for before in (False, True)]


def job(name):
    from torchtitan.config import JobConfig

    tp, ep, etp = DEGREES[name]
    config = JobConfig()
    config.model.name, config.training.seq_len = "deepseek_v3", LENGTH
    config.training.mixed_precision_param = "float32"
    config.activation_checkpoint.mode = "none"
    parallelism = config.parallelism
    parallelism.tensor_parallel_degree, parallelism.expert_parallel_degree = tp, ep
    parallelism.expert_tensor_parallel_degree = etp
    parallelism.data_parallel_shard_degree = 2
    parallelism.disable_loss_parallel = True
    return config


def model(config, score_before_experts):
    from torchtitan.protocols.train_spec import get_train_spec

    spec = get_train_spec("deepseek_v3")
    args = spec.model_args["debugmodel"]
    experts = replace(args.moe_args, score_before_experts=score_before_experts)
    args = replace(
        args, n_layers=2, dim=64, inter_dim=64, moe_inter_dim=64, vocab_size=64, moe_args=experts
    )
    args.update_from_config(config)
    torch.manual_seed(0)
    made = spec.model_cls(args)
    with torch.no_grad():
        made.init_weights(buffer_device=torch.device("cpu"))
        # As large as after some training: experts matter, then.
        for parameter in made.layers["1"].moe.parameters():
            parameter.mul_(10)
    return spec, made


def gradients(net, tokens, labels):
    logits = net(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (loss / (ROWS * LENGTH)).backward()
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in net.named_parameters()
    }


def errors(name, before, completes):
    """Relative errors of a parallel model's gradients against one process's, by parameter."""
    from nvfp4_titan.titan.moe_backward import complete
    from nvfp4_titan.titan.sharding import parallel_dims

    config = job(name)
    tokens, labels = torch.randint(
        64, (2, ROWS, LENGTH), generator=torch.Generator().manual_seed(1)
    )
    _, net = model(config, before)
    whole = gradients(net, tokens, labels)
    dims = parallel_dims(config, 4)
    dims.build_mesh()
    spec, net = model(config, before)
    net = spec.parallelize_fn(net, dims, config)
    cpu_runtime.prepare_trainer([net])
    if completes:
        complete([net], dims)
    rank = dims.get_mesh("fsdp").get_local_rank()
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    parts = gradients(net, tokens[mine], labels[mine])
    return {n: ((parts[n] - whole[n]).norm() / whole[n].norm()).item() for n in whole}


def run(rank, device):
    alone = [(name, False, False) for name in DEGREES]
    return {case: errors(*case) for case in [(*case, True) for case in CASES] + alone}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return spawn(run, "cpu", 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "before"), CASES)
def test_gradients_are_those_of_one_process(ranks, name, before):
    for of_rank in ranks:
        assert max(of_rank[name, before, True].values()) < 1e-4


def test_torchtitan_alone_loses_parts(ranks):
    """Otherwise what completes them can go."""
    lost = {name: ranks[0][name, False, False] for name in DEGREES}
    for of_name in lost.values():
        assert of_name["layers.1.moe.router.gate.weight"] > 0.1
    assert lost["tp lent to ep"]["layers.0.attention.wq.weight"] > 0.01
