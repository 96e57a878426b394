"""A job's model without weights: built, converted and sharded as torchtitan's trainer does it."""

import copy

import torch
from torch import nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model_converter import ModelConvertersContainer, build_model_converters
from torchtitan.protocols.train_spec import BaseModelArgs, get_train_spec

from ..errors import ConfigError


def parallel_dims(job_config: JobConfig, world_size: int) -> ParallelDims:
    """Torchtitan's parallel dimensions of a job.

    Raises:
        ConfigError: degrees that do not fit the number of ranks.
    """
    p = job_config.parallelism
    try:
        return ParallelDims(
            dp_shard=p.data_parallel_shard_degree,
            dp_replicate=p.data_parallel_replicate_degree,
            cp=p.context_parallel_degree,
            tp=p.tensor_parallel_degree,
            pp=p.pipeline_parallel_degree,
            ep=p.expert_parallel_degree,
            etp=p.expert_tensor_parallel_degree,
            world_size=world_size,
        )
    except AssertionError as error:
        raise ConfigError(f"the degrees do not fit {world_size} ranks: {error}") from error


def model_args(job_config: JobConfig) -> BaseModelArgs:
    """Arguments of a job's model: its flavor's, with what the settings change."""
    args = copy.deepcopy(get_train_spec(job_config.model.name).model_args[job_config.model.flavor])
    args.update_from_config(job_config)
    return args


def meta_model(job_config: JobConfig, args: BaseModelArgs | None = None) -> nn.Module:
    """A job's model on the meta device; `args` in place of `model_args`."""
    with torch.device("meta"):
        return get_train_spec(job_config.model.name).model_cls(args or model_args(job_config))


def sharded_model(
    job_config: JobConfig, dims: ParallelDims, args: BaseModelArgs | None = None
) -> tuple[nn.Module, ModelConvertersContainer]:
    """A job's model on the meta device, converted and parallelized, and what converted it.

    Args:
        job_config: Settings, without pipeline parallelism.
        dims: Of them; a process group must be there.
        args: In place of `model_args`.
    """
    model = meta_model(job_config, args)
    converters = build_model_converters(job_config, dims)
    converters.convert(model)
    model = get_train_spec(job_config.model.name).parallelize_fn(model, dims, job_config)
    return model, converters
