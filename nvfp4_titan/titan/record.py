"""The run's record: what it was trained with, beside its TensorBoard files."""

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn
from torch._inductor import config as inductor
from torch.distributed.tensor import DTensor
from torchtitan.components.metrics import TensorBoardLogger
from torchtitan.tools import utils

from ..errors import ConfigError
from ..scalars import CONVERSION, EXPERT_TOKENS, NUMERICS, RECORD
from ..training import Report
from ..version import __version__, source_commit
from . import corpus
from .datasets import dataset_corpus

_COUNTS = "tokens_per_expert"  # torchtitan's name for the buffer of its MoE
PACKAGES = ("torch", "torchtitan", "torchao", "triton", "datasets", "tokenizers")


def clear(job_config) -> None:
    """Remove what an earlier start in the same dump folder converted: it may not fit this one.

    Its record stays until `write` puts this one's in its place: a start may die before.
    """
    _remove(job_config, CONVERSION)


def clear_outcomes(job_config) -> None:
    """Remove what an earlier start found; where no step is left to train it stands."""
    _remove(job_config, EXPERT_TOKENS, NUMERICS)


def check_text(job_config) -> None:
    """Check that a run that resumes goes on with the text and the tokenizer of its record.

    A corpus of the files of this machine changes with them. A dataset that was changed by name or
    path is the user's own wish.

    Raises:
        ConfigError: it would go on with others.
    """
    path = Path(job_config.job.dump_folder, RECORD)
    if not path.is_file():
        return
    try:
        earlier, training = json.loads(path.read_text()), job_config.training
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged, so nobody can tell what text its run began with: remove it to go "
            "on all the same"
        ) from error
    anew = "or train anew in another job.dump_folder"
    tokenizer = _tokenizer_sha256(job_config)
    if earlier["tokenizer_sha256"] != tokenizer:
        raise ConfigError(
            f"the run in {path.parent} resumes with another tokenizer than it began with: give its "
            f"own as model.hf_assets_path, {anew}"
        )
    dataset = training.dataset, training.dataset_path
    made, before = dataset_corpus(*dataset), earlier["corpus_sha256"].get("training")
    if list(dataset) != earlier["datasets"]["training"] or made is None or before == made.sha256:
        return
    name = earlier.get("corpora", {}).get("training", "")
    kept = corpus.cache_root() / name
    give = f"training.dataset_path = {kept}" if name and kept.is_dir() else "the files that it had"
    raise ConfigError(
        f"the text of training.dataset {training.dataset!r} is no longer what the run in "
        f"{path.parent} began with (sha256 {before[:12]}.., now {made.sha256[:12]}..: Python files "
        f"or packages have changed): give {give}, {anew}"
    )


def write(job_config, model_parts: list[nn.Module]) -> Path:
    """Write `run_record.json` into the job's dump folder.

    Args:
        job_config: torchtitan's JobConfig.
        model_parts: The models as they were initialised, before a checkpoint is loaded.

    Returns:
        The file's path.
    """
    training, validation = job_config.training, job_config.validation
    datasets = {"training": (training.dataset, training.dataset_path)}
    if validation.enable:
        datasets["validation"] = (validation.dataset, validation.dataset_path)
    corpora = {key: dataset_corpus(*value) for key, value in datasets.items()}
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": utils.device_module.get_device_name(),
        "python": platform.python_version(),
        "versions": {"nvfp4_titan": __version__} | {name: _version(name) for name in PACKAGES},
        "commit": source_commit(),
        "threads": torch.get_num_threads(),
        "cuda_graphs": uses_cuda_graphs(job_config),
        "datasets": {key: list(value) for key, value in datasets.items()},
        "corpus_sha256": {key: made.sha256 for key, made in corpora.items() if made},
        "corpora": {key: made.path.name for key, made in corpora.items() if made},
        "tokenizer_sha256": _tokenizer_sha256(job_config),
        "initial_weights": _energy(model_parts),
        "config": job_config.to_dict(),
    }
    return _write(job_config, RECORD, record)


def _tokenizer_sha256(job_config) -> str | None:
    path = Path(job_config.model.hf_assets_path) / "tokenizer.json"
    return corpus.file_sha256(path) if path.is_file() else None


def flush(metrics_processor) -> None:
    """Write out TensorBoard's events now: a killed run must not lose those before a checkpoint."""
    for logger in getattr(metrics_processor.logger, "_loggers", ()):
        if isinstance(logger, TensorBoardLogger):
            logger.writer.flush()


def write_conversion(job_config, report: Report) -> Path:
    """Write the conversion's report beside the run's record, as `conversion.json`."""
    content = {
        "flops_share": report.flops_share,
        "backends": report.backends,
        "entries": [asdict(entry) for entry in report.entries],
    }
    return _write(job_config, CONVERSION, content)


def write_tokens_per_expert(job_config, model_parts: list[nn.Module]) -> Path | None:
    """Write the tokens that each expert got since the last optimizer step, by MoE layer.

    With a validation on the last step these are the validation's tokens, on this rank.

    Returns:
        Path of `tokens_per_expert.json`; None for a model without experts.
    """
    counts = {name: count.tolist() for name, count in token_counts(model_parts).items()}
    return _write(job_config, EXPERT_TOKENS, counts) if counts else None


def token_counts(model_parts: list[nn.Module]) -> dict[str, torch.Tensor]:
    """Counts of the tokens that experts got, torchtitan's buffers themselves, by MoE layer."""
    buffers = (item for part in model_parts for item in part.named_buffers())
    return {
        name.removesuffix(f".{_COUNTS}"): buffer
        for name, buffer in buffers
        if name.endswith(_COUNTS)
    }


@contextmanager
def kept_token_counts(model_parts: list[nn.Module]) -> Iterator[None]:
    """Have what runs inside leave the counts of experts' tokens as they were."""
    counts = token_counts(model_parts).values()
    before = [count.clone() for count in counts]
    yield
    for count, kept in zip(counts, before, strict=True):
        count.copy_(kept)


def compiles_model(job_config) -> bool:
    """Whether the model is compiled, and not the loss alone."""
    return job_config.compile.enable and "model" in job_config.compile.components


def uses_cuda_graphs(job_config) -> bool:
    """Whether inductor's CUDA graphs run the model's compiled parts."""
    return bool(compiles_model(job_config) and inductor.triton.cudagraphs)


@torch.no_grad()
def _energy(model_parts: list[nn.Module]) -> float:
    """Sum of this rank's squared parameters: equal where two runs start from the same weights."""
    parameters = [p for part in model_parts for p in part.parameters()]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    sums = [p.double().square().sum().cpu() for p in local if p.device.type != "meta"]
    return float(torch.stack(sums).sum()) if sums else 0.0


def _remove(job_config, *names: str) -> None:
    for name in names:
        Path(job_config.job.dump_folder, name).unlink(missing_ok=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _write(job_config, name: str, content: dict) -> Path:
    """Write a file whole or not at all."""
    path = Path(job_config.job.dump_folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2))
    return unfinished.replace(path)
