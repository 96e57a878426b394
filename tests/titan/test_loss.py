"""What makes the gradients of sharded losses those of one process (runs: test_invariance.py)."""

from types import SimpleNamespace

import pytest
import torch
from ranks import spawn
from torch import nn

from nvfp4_titan.titan import cpu_runtime

# Here and not in a fixture: spawned ranks import this file alone.
cpu_runtime.install()


def dims(**degrees):
    from torchtitan.distributed import ParallelDims

    world = 1
    for degree in degrees.values():
        world *= degree
    ones = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp"), 1)
    return ParallelDims(**ones | degrees, world_size=world)


@pytest.mark.parametrize("divisor", [3, torch.tensor(346)])
def test_a_divided_loss_has_its_value_and_a_divided_gradient(divisor):
    from nvfp4_titan.titan.loss import DividedLoss

    divided = DividedLoss(lambda x, scale: scale * x.square().sum())
    gradients = []
    for loss_fn in (divided, lambda x, scale: divided.loss_fn(x, scale) / divisor):
        x = torch.randn(5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        divided.divisor = divisor
        loss_fn(x, scale=2.0).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    loss = divided(x, 2.0)
    assert loss == divided.loss_fn(x, 2.0)
    loss.detach_()  # as zero-bubble schedules do


def test_copies_that_ddp_averages_over():
    from nvfp4_titan.titan.loss import replicas, sum_over_replicas

    assert replicas(dims(dp_replicate=4)) == 4
    assert replicas(dims(dp_replicate=2, dp_shard=2)) == 1
    assert replicas(dims(dp_replicate=2, cp=2)) == 1
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.grad = torch.ones(2, 2)  # of the others there is none
    sum_over_replicas([model], 4)
    assert model[0].weight.grad.eq(4).all() and model[1].weight.grad is None


def counted(rank, device):
    """Tokens of a batch as torchtitan's Validator counts them, on ranks that hold parts of it."""
    from torchtitan.distributed import utils

    from nvfp4_titan.titan.validate import TokensOfSequences

    given = dims(cp=2)
    given.build_mesh()
    seen = TokensOfSequences(given)
    mine = torch.tensor(5 + rank)  # some labels are ignored
    assert seen.dp_enabled and seen.cp_enabled and not given.dp_enabled
    assert seen.get_mesh("cp") == given.get_mesh("cp")
    return utils.dist_sum(mine, seen.get_mesh("batch"), None)


def test_tokens_of_sequences_in_parts(tmp_path):
    assert spawn(counted, "cpu", 2, tmp_path) == [11, 11]


def test_a_validator_counts_them_so():
    from nvfp4_titan.titan.validate import TokensOfSequences, prepare_validator

    for degrees, replaced in (({"cp": 2}, True), ({"dp_shard": 2}, False)):
        loader = SimpleNamespace(dataset=SimpleNamespace(state_dict=dict))
        validator = SimpleNamespace(
            validation_dataloader=loader,
            parallel_dims=dims(**degrees),
            should_validate=None,
            validate=None,
        )
        prepare_validator(validator, 1)
        assert isinstance(validator.parallel_dims, TokensOfSequences) == replaced
