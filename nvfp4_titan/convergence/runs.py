"""Finished runs as TensorBoard recorded them, and their comparison with a control.

A run is a job's dump folder: TensorBoard's event files, run_record.json, and, for converted models,
conversion.json. Runs are only compared when corpus, tokenizer, steps and data settings agree, and,
where both recorded it, the tokens of every logged step and the initial weights.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from ..errors import ConfigError
from ..scalars import (
    ACTIVE_GIB,
    CHECKSUM,
    CONVERSION,
    EXPERT_TOKENS,
    RECORD,
    STEP_SECONDS,
    TOKENS,
    TOKENS_PER_SECOND,
    TRAIN_LOSS,
    VALIDATION_LOSS,
    read_scalars,
)

_SAME = (
    ("corpus_sha256",),
    ("tokenizer_sha256",),
    ("config", "model", "flavor"),
    ("config", "training", "dataset"),
    ("config", "training", "dataset_path"),
    ("config", "training", "seq_len"),
    ("config", "training", "local_batch_size"),
    ("config", "training", "global_batch_size"),
    ("config", "training", "max_norm"),
    ("config", "training", "steps"),
    ("config", "optimizer"),
    ("config", "lr_scheduler"),
    ("config", "validation"),
)
"""Parts of the record that must agree between compared runs, beside the seed."""
_SEED = ("config", "debug", "seed")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: The job's dump folder.
        record: run_record.json.
        conversion: conversion.json; None for a run without the converter.
        tokens_per_expert: tokens_per_expert.json; None for a model without experts.
        train: Training loss by step.
        validation: Validation loss by step.
        seconds: Seconds of each logged step by step.
        throughput: Tokens per second and device by step.
        memory: Peak of the memory in use, GiB, by step.
        checksums: Checksum of the tokens by step; {} where none was recorded.
        tokens: Tokens seen so far, of all ranks, by step; {} where not recorded.
    """

    folder: Path
    record: dict
    conversion: dict | None
    tokens_per_expert: dict[str, list[float]] | None
    train: dict[int, float]
    validation: dict[int, float]
    seconds: dict[int, float]
    throughput: dict[int, float]
    memory: dict[int, float]
    checksums: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, float] = field(default_factory=dict)

    @property
    def flops_share(self) -> float:
        """Share of the linears' and experts' forward FLOPs that the converter quantized."""
        return self.conversion["flops_share"] if self.conversion else 0.0

    @property
    def smallest_expert_share(self) -> float | None:
        """Tokens of the least fed expert of all layers in the last validation, of an even share.

        None without experts, or where nothing was validated at the end.
        """
        counts = (self.tokens_per_expert or {}).values()
        if not any(map(any, counts)):
            return None
        return min(min(tokens) * len(tokens) / sum(tokens) for tokens in counts)

    @property
    def steps(self) -> int:
        """Training steps that the run was to make."""
        return self.record["config"]["training"]["steps"]

    def missing_steps(self) -> list[int]:
        """Steps that are logged in a whole run and are not in this one."""
        every = self.record["config"]["metrics"]["log_freq"]
        return sorted({1, *range(every, self.steps + 1, every)} - self.train.keys())

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps that are typical."""
        return median(self.seconds[step] for step in self._typical_steps)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second and device, median over the steps that are typical."""
        return median(self.throughput[step] for step in self._typical_steps)

    @property
    def _typical_steps(self) -> list[int]:
        """Steps after the first ten (or half, in short runs), without validation.

        torchtitan counts a validation into the next step's time, so steps after one are left out
        (unless a short run has no others).
        """
        warm = sorted(self.seconds)[min(10, len(self.seconds) // 2) :]
        return [step for step in warm if step - 1 not in self.validation] or warm


def read_run(folder: Path | str) -> Run:
    """Read a job's dump folder.

    Raises:
        ConfigError: something is missing, or a loss is NaN or infinite.
    """
    folder = Path(folder)
    recorded = read_scalars(folder)

    def scalars(tag: str) -> dict[int, float]:
        if tag not in recorded:
            raise ConfigError(f"{folder} has no {tag}: enable validation and TensorBoard")
        return recorded[tag]

    run = Run(
        folder,
        read_record(folder),
        _json(folder / CONVERSION, optional=True),
        _json(folder / EXPERT_TOKENS, optional=True),
        *(
            scalars(tag)
            for tag in (TRAIN_LOSS, VALIDATION_LOSS, STEP_SECONDS, TOKENS_PER_SECOND, ACTIVE_GIB)
        ),
        recorded.get(CHECKSUM, {}),
        recorded.get(TOKENS, {}),
    )
    for name, losses in (("training", run.train), ("validation", run.validation)):
        bad = [step for step, loss in losses.items() if not math.isfinite(loss)]
        if bad:
            raise ConfigError(f"{folder}: {name} loss is not finite at step {bad[0]}")
    return run


def read_record(folder: Path) -> dict:
    """A run's record, from its start on.

    Raises:
        ConfigError: it is not there, or damaged.
    """
    record = _json(folder / RECORD)
    if "config" not in record:
        raise _damaged(folder / RECORD)
    return record


def check_comparable(control: Run, run: Run) -> None:
    """Check that two runs differ in nothing but what is compared.

    Raises:
        ConfigError: other data, tokens, initial weights, settings or steps.
    """
    check_settings(control.record, run.record, control.folder, run.folder)
    _check_same(_SEED, *(_at(r.record, _SEED) for r in (control, run)), control.folder, run.folder)
    if sorted(control.train) != sorted(run.train):
        raise ConfigError(f"{control.folder} and {run.folder} did not run the same steps")
    steps = sorted(control.checksums.keys() & run.checksums)
    if other := [step for step in steps if control.checksums[step] != run.checksums[step]]:
        raise ConfigError(
            f"{control.folder} and {run.folder} saw other tokens from step {other[0]} on: the "
            "order of the data differs; use one corpus, and the same number of processes"
        )
    weights = [r.record.get("initial_weights") for r in (control, run)]
    if None not in weights and not math.isclose(*weights, rel_tol=1e-6):
        raise ConfigError(
            f"{control.folder} and {run.folder} began with other weights (squares sum to "
            f"{weights[0]} and {weights[1]}): use one debug.seed and one kind of device"
        )


def check_settings(control: dict, record: dict, *folders: Path) -> None:
    """Check that two runs' records agree in what must be the same, whatever the seeds.

    Args:
        control: A run's record.
        record: Another's.
        folders: The runs' dump folders, for the message.

    Raises:
        ConfigError: other texts, tokenizers, models, settings of data, optimizer or validation.
    """
    sides = [_without_places(r) for r in (control, record)]
    for path in _SAME:
        _check_same(path, *(_at(side, path) for side in sides), *folders)


def _check_same(path: tuple[str, ...], value, other, *folders: Path) -> None:
    if value != other:
        raise ConfigError(
            f"{'.'.join(path)} differs between {folders[0]} and {folders[1]}: {value} and {other}; "
            "run both with the same settings"
        )


def _without_places(record: dict) -> dict:
    """A record in which a text whose hash is known is the same wherever it lies."""
    config = dict(record["config"])
    for section in record["corpus_sha256"]:
        config[section] = {**config[section], "dataset_path": None}
    return {**record, "config": config}


def compare(control: Run, run: Run) -> dict:
    """Figures of a run against its control.

    Returns:
        Final validation losses, the relative gap between them, seconds per step and their ratio,
        the share of FLOPs quantized; for MoE models the smallest share that an expert got.

    Raises:
        ConfigError: the two did not see the same data, or did not run the same steps.
    """
    check_comparable(control, run)
    last = max(control.validation)
    gap = run.validation[last] / control.validation[last] - 1
    figures = {
        "steps": max(control.train),
        "validation_step": last,
        "control_validation_loss": control.validation[last],
        "validation_loss": run.validation[last],
        "relative_gap": gap,
        "control_seconds_per_step": control.seconds_per_step,
        "seconds_per_step": run.seconds_per_step,
        "step_time_ratio": run.seconds_per_step / control.seconds_per_step,
        "flops_share": run.flops_share,
    }
    shares = control.smallest_expert_share, run.smallest_expert_share
    if None not in shares:
        figures |= zip(
            ("control_smallest_expert_share", "smallest_expert_share"), shares, strict=True
        )
    return figures


def _json(path: Path, optional: bool = False) -> dict | None:
    if path.is_file():
        try:
            content = json.loads(path.read_text())
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise _damaged(path)
        return content
    if optional:
        return None
    raise ConfigError(f"{path} is not there: start the run with python -m nvfp4_titan.train")


def _damaged(path: Path) -> ConfigError:
    return ConfigError(f"{path} is damaged: make its run again")


def _at(record: dict, path: tuple[str, ...]):
    for key in path:
        record = record[key]
    return record
