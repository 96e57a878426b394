"""Checks of a job's settings that torchtitan makes late, as an assertion, or not at all."""

import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
from tokenizers import Tokenizer
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.hf_datasets.text_datasets import DATASETS
from torchtitan.protocols.model_converter import _registry_model_converter_cls as CONVERTERS
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger

from ..errors import ConfigError, UnsupportedError
from . import cpu_runtime
from .checkpoints import checkpoint_folder, saved_steps
from .converter import OURS, check_cuda_graphs, check_early_steps, check_settings, without_settings
from .datasets import dataset_corpus
from .qat import check_qat
from .record import compiles_model
from .sharding import parallel_dims


def check(job_config: JobConfig, world_size: int) -> None:
    """Check what can be known from settings, files and the number of processes.

    Args:
        job_config: torchtitan's JobConfig.
        world_size: Processes of the job.

    Raises:
        ConfigError: a setting or a folder that cannot be used; the message names the fix.
        UnsupportedError: something this machine cannot do.
    """
    dims = check_shape(job_config, world_size)
    _check_optimizer(job_config.optimizer.name)
    _check_compile(job_config, dims)
    check_cuda_graphs(job_config, dims)
    if set(OURS) & set(job_config.model.converters):
        check_early_steps(job_config, dims)
    _check_tokenizer(job_config.model)
    if "nvfp4" in job_config.model.converters:
        check_settings(job_config)
    if "qat" in job_config.model.converters:
        check_qat(job_config)
    _warn_of_unused(job_config)
    _check_dataset("training", job_config.training)
    if job_config.validation.enable:
        _check_dataset("validation", job_config.validation)
    _check_checkpoint(job_config)
    _check_profiling(job_config.profiling)
    _check_device(job_config)
    _check_folder(job_config.job.dump_folder)


def check_shape(job_config: JobConfig, world_size: int) -> ParallelDims:
    """Check model, sizes and degrees alone; arguments and errors as of `check`."""
    _check_types(job_config)
    check_model(job_config.model)
    _check_parallelism(job_config, world_size)
    dims = parallel_dims(job_config, world_size)
    _check_sizes(job_config, dims.dp_replicate * dims.dp_shard)
    return dims


_TYPES = {
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: ("an integer", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    float: ("a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool)),
    str: ("a string", lambda v: isinstance(v, str)),
    list[str]: (
        'a list of strings, ["a", "b"]',
        lambda v: isinstance(v, list) and all(isinstance(item, str) for item in v),
    ),
}


_OPTIMIZERS = ("Adam", "AdamW")


def _check_optimizer(name: str) -> None:
    if name not in _OPTIMIZERS:
        raise ConfigError(
            f"optimizer.name {name!r} is unknown to torchtitan: use one of {', '.join(_OPTIMIZERS)}"
        )


_TP_COMPILES_BEFORE = "2.12"
"""torch 2.11 compiles models under TP; 2.13 does not, and 2.12 was not tried."""


def _check_compile(job_config: JobConfig, dims: ParallelDims) -> None:
    under_tp = compiles_model(job_config) and dims.tp_enabled
    if under_tp and torch.__version__ >= _TP_COMPILES_BEFORE:
        raise UnsupportedError(
            f"torch {torch.__version__} fails in the backward of a model that torchtitan compiles "
            "under TP, or loses the embedding's gradient: set --compile.no-enable, or use torch "
            "2.11"
        )


_OF_GPUS = {
    ("training", "enable_cpu_offload"): "needs a GPU to offload from",
    ("profiling", "enable_profiling"): "needs a GPU, whose kernels torchtitan records",
    ("profiling", "enable_memory_snapshot"): "needs a GPU, whose memory torchtitan records",
}
"""Settings that torchtitan fails with on a CPU."""


def _check_device(job_config: JobConfig) -> None:
    for (section, name), why in _OF_GPUS.items():
        if getattr(getattr(job_config, section), name) and cpu_runtime.active():
            raise UnsupportedError(f"{section}.{name} {why}: leave it out")
    checkpoint = job_config.checkpoint
    pinned = checkpoint.enable and checkpoint.async_mode == "async_with_pinned_mem"
    if pinned and cpu_runtime.active():
        raise UnsupportedError(
            "checkpoint.async_mode = 'async_with_pinned_mem' needs a GPU, whose memory it copies: "
            "use 'async'"
        )


def _check_types(section, path: str = "") -> None:
    """Check plain types: torchtitan takes a TOML's values as they come, "no" as true."""
    for field in fields(section):
        value, name = getattr(section, field.name), f"{path}{field.name}"
        if is_dataclass(field.type):
            if not is_dataclass(value):
                raise ConfigError(f"{name} = {value!r} must be a section: [{name}]")
            _check_types(value, f"{name}.")
        elif get_origin(field.type) is Literal:
            if value not in get_args(field.type):
                raise ConfigError(f"{name} = {value!r} must be one of {get_args(field.type)}")
        elif field.type in _TYPES:
            wanted, fits = _TYPES[field.type]
            if not fits(value):
                raise ConfigError(f"{name} = {value!r} must be {wanted}")


def _warn_of_unused(job_config: JobConfig) -> None:
    """Say which settings of a converter do nothing, as it is not asked for."""
    if os.environ.get("RANK", "0") != "0":
        return
    for converter in OURS:
        settings = getattr(job_config, converter, None)
        if settings is None or converter in job_config.model.converters:
            continue
        default = type(settings)()
        names = [
            f.name
            for f in fields(settings)
            if getattr(settings, f.name) != getattr(default, f.name)
        ]
        if names:
            logger.warning(
                f"[{converter}] {', '.join(names)}: without effect, as model.converters has no "
                f"{converter}"
            )


def check_model(model) -> None:
    """Check the settings of a [model].

    Raises:
        ConfigError: a model, a flavor or a converter that is unknown.
    """
    try:
        flavors = get_train_spec(model.name).model_args
    except ValueError as error:
        raise ConfigError(f"model.name {model.name!r} is unknown: {error}") from error
    if model.flavor not in flavors:
        raise ConfigError(
            f"model.flavor {model.flavor!r} is unknown for {model.name}: use one of "
            f"{', '.join(flavors)}"
        )
    for name in model.converters:
        if name not in CONVERTERS:
            if name in OURS:
                raise without_settings(name)
            raise ConfigError(f"converter {name!r} is unknown: use one of {', '.join(CONVERTERS)}")


def _check_parallelism(job_config: JobConfig, world_size: int) -> None:
    p = job_config.parallelism
    degrees = {
        "data_parallel_replicate_degree": p.data_parallel_replicate_degree,
        "tensor_parallel_degree": p.tensor_parallel_degree,
        "context_parallel_degree": p.context_parallel_degree,
        "pipeline_parallel_degree": p.pipeline_parallel_degree,
    }
    others = 1
    for degree in degrees.values():
        others *= degree
    shard = p.data_parallel_shard_degree
    if shard == -1 and others >= 1 and world_size % others == 0:
        shard = world_size // others
    if min(degrees.values()) < 1 or shard < 1 or others * shard != world_size:
        given = ", ".join(f"{name} = {degree}" for name, degree in degrees.items())
        need = others * shard if shard > 0 else f"a multiple of {others}"
        raise ConfigError(
            f"the job has {world_size} processes, but {given}, data_parallel_shard_degree = "
            f"{p.data_parallel_shard_degree} need {need}: change NGPU or the degrees"
        )
    experts = p.expert_parallel_degree * p.expert_tensor_parallel_degree
    ranks = shard * p.context_parallel_degree * p.tensor_parallel_degree
    if p.expert_parallel_degree > 1 and ranks % experts:
        raise ConfigError(
            f"expert_parallel_degree = {p.expert_parallel_degree} does not divide the {ranks} "
            "ranks of data, context and tensor parallelism: change NGPU or the degree"
        )
    if p.expert_parallel_degree > 1 and shard * p.context_parallel_degree == 1:
        raise ConfigError(
            f"expert_parallel_degree = {p.expert_parallel_degree} on ranks of TP alone fails in "
            "torchtitan: give data or context parallelism two ranks or more, or set it to 1 (TP "
            "shards the experts, then)"
        )
    alone = p.data_parallel_replicate_degree > 1 and shard * p.context_parallel_degree == 1
    if alone and max(p.tensor_parallel_degree, p.pipeline_parallel_degree) > 1:
        raise ConfigError(
            "data_parallel_replicate_degree without shards beside TP or PP fails in torchtitan, or "
            "trains each replica by itself: give data_parallel_shard_degree two ranks or more"
        )
    both = min(p.expert_parallel_degree, p.expert_tensor_parallel_degree) > 1
    if job_config.model.name == "gpt_oss" and both:
        raise ConfigError(
            "torchtitan adds the biases of gpt_oss' experts once for every rank that shares one: "
            "set expert_tensor_parallel_degree = 1"
        )
    if p.context_parallel_degree > 1 and cpu_runtime.active():
        raise UnsupportedError(
            "context parallelism needs a GPU (DTensor has no rule for the CPU's attention): set "
            "parallelism.context_parallel_degree = 1"
        )


def _check_sizes(job_config: JobConfig, data_parallel: int) -> None:
    training, p = job_config.training, job_config.parallelism
    _check_positive(job_config)
    divisor = 2 * p.tensor_parallel_degree * p.context_parallel_degree
    if training.seq_len % divisor:
        raise ConfigError(
            f"training.seq_len = {training.seq_len} must be a multiple of {divisor} (2 x TP x CP)"
        )
    at_once = training.local_batch_size * data_parallel
    if training.global_batch_size > 0 and training.global_batch_size % at_once:
        raise ConfigError(
            f"training.global_batch_size = {training.global_batch_size} must be a multiple of "
            f"{at_once}: local_batch_size = {training.local_batch_size} on {data_parallel} ranks "
            "of data parallelism"
        )
    size = p.pipeline_parallel_microbatch_size
    if p.pipeline_parallel_degree > 1 and (size < 1 or training.local_batch_size % size):
        raise ConfigError(
            f"parallelism.pipeline_parallel_microbatch_size = {size} must divide "
            f"training.local_batch_size = {training.local_batch_size}"
        )
    if job_config.validation.enable:
        _check_validation(job_config)


def _check_validation(job_config: JobConfig) -> None:
    """Check the sizes of a validation, which torchtitan finds wrong at the first one."""
    training, validation = job_config.training, job_config.validation
    p = job_config.parallelism
    if validation.seq_len > training.seq_len:
        raise ConfigError(
            f"validation.seq_len = {validation.seq_len} is longer than training.seq_len = "
            f"{training.seq_len}, which the model's positions are made for: set it to that at most"
        )
    cp = p.context_parallel_degree
    divisor = p.tensor_parallel_degree * (2 * cp if cp > 1 else 1)
    if validation.seq_len % divisor:
        raise ConfigError(
            f"validation.seq_len = {validation.seq_len} must be a multiple of {divisor}: TP and CP "
            "split sequences"
        )
    if p.pipeline_parallel_degree == 1:
        return
    microbatches = training.local_batch_size // p.pipeline_parallel_microbatch_size
    if validation.local_batch_size % microbatches:
        raise ConfigError(
            f"validation.local_batch_size = {validation.local_batch_size} must be a multiple of "
            f"{microbatches}: the schedule splits every batch into as many microbatches"
        )
    if p.pipeline_parallel_schedule.lower() in ("zbvzerobubble", "dualpipev"):
        raise ConfigError(
            f"schedule {p.pipeline_parallel_schedule} cannot validate: use --validation.no-enable, "
            "or InterleavedZeroBubble"
        )


def _check_positive(job_config: JobConfig) -> None:
    wanted = {
        "training": ["seq_len", "local_batch_size", "steps", "max_norm"],
        "metrics": ["log_freq"],
        "checkpoint": ["interval"] if job_config.checkpoint.enable else [],
        "validation": ["freq", "local_batch_size"] if job_config.validation.enable else [],
    }
    for section, names in wanted.items():
        for name in names:
            value = getattr(getattr(job_config, section), name)
            if not value > 0:
                raise ConfigError(f"{section}.{name} = {value} must be positive")
    for section, name in (("optimizer", "lr"), ("lr_scheduler", "warmup_steps")):
        value = getattr(getattr(job_config, section), name)
        if not value >= 0:
            raise ConfigError(f"{section}.{name} = {value} must be 0 or more")


def _check_tokenizer(model) -> None:
    path = model.hf_assets_path
    if not os.path.isdir(path):
        raise ConfigError(
            f"model.hf_assets_path {path} is not there: give the folder of a tokenizer, or leave "
            "the key out for the built-in one"
        )
    file = os.path.join(path, "tokenizer.json")
    if not os.path.isfile(file):
        if any(os.path.isfile(os.path.join(path, name)) for name in ("vocab.json", "vocab.txt")):
            return  # torchtitan reads these, too
        what = "holds no tokenizer" if os.listdir(path) else "is empty"
        raise ConfigError(f"model.hf_assets_path {path} {what}: no tokenizer.json is in it")
    try:
        size = Tokenizer.from_file(file).get_vocab_size()
    except Exception as error:  # the tokenizers package raises no other class
        raise ConfigError(f"{file} cannot be read as a tokenizer: {error}") from error
    vocabulary = getattr(get_train_spec(model.name).model_args[model.flavor], "vocab_size", None)
    if vocabulary is not None and size > vocabulary:
        raise ConfigError(
            f"the tokenizer in {path} has {size} tokens, {model.name} {model.flavor} only "
            f"{vocabulary}: use another model.flavor or model.hf_assets_path"
        )


def _check_dataset(section: str, settings) -> None:
    name, path = settings.dataset.lower(), settings.dataset_path
    if name not in DATASETS:
        raise ConfigError(
            f"{section}.dataset {name!r} is unknown: use one of {', '.join(DATASETS)}"
        )
    if dataset_corpus(name, path) is not None:
        return  # built, or its own error raised
    # Hugging Face hub names ("allenai/c4") are not folders; every other path is.
    place = path or DATASETS[name].path
    on_hub = place.count("/") == 1 and not place.startswith((".", "/", "~"))
    if not on_hub and not os.path.exists(place):
        raise ConfigError(
            f"{section}.dataset_path {place} is not there: give an existing folder, or use "
            f"{section}.dataset = 'stdlib'"
        )


def _check_checkpoint(job_config: JobConfig) -> None:
    checkpoint, own = job_config.checkpoint, checkpoint_folder(job_config)
    there = saved_steps(own)
    if checkpoint.enable and checkpoint.load_step not in (-1, *there):
        known = ", ".join(map(str, sorted(there))) or "another run (this one has none)"
        raise ConfigError(
            f"checkpoint.load_step = {checkpoint.load_step}, and {own}/step-{checkpoint.load_step} "
            f"is not there: use one of {known}, or -1 for the newest"
        )
    path = checkpoint.initial_load_path
    if not path:
        return
    if not checkpoint.enable:
        raise ConfigError(
            f"checkpoint.initial_load_path {path} is not loaded without checkpoint.enable = true: "
            "set it, or drop the path"
        )
    # Paths of other file systems (s3://..) are left to torchtitan.
    if "://" in path:
        return
    if not os.path.isdir(path):
        raise ConfigError(f"checkpoint.initial_load_path {path} is not there")
    inside = saved_steps(Path(path))
    if inside and not os.path.isfile(os.path.join(path, ".metadata")):
        raise ConfigError(
            f"checkpoint.initial_load_path {path} holds checkpoints and is none: give one of them, "
            f"such as {inside[max(inside)]}"
        )


def _check_profiling(profiling) -> None:
    cycle = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < cycle:
        raise ConfigError(
            f"profiling.profile_freq = {profiling.profile_freq} must be at least {cycle}, "
            f"profiler_warmup = {profiling.profiler_warmup} and profiler_active = "
            f"{profiling.profiler_active} steps"
        )


def _check_folder(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"job.dump_folder {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"job.dump_folder {folder} cannot be written: give another")
