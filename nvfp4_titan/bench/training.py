"""Training end to end under torchtitan: tokens per second and peak memory against bf16.

Each run is a process of its own (`python -m nvfp4_titan.train`), in random order; a figure is the
median over the logged steps after the warm-up.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from ..errors import ConfigError
from ..scalars import RESERVED_GIB, TOKENS_PER_SECOND, read_scalars
from .rows import BenchRow, ratios
from .timing import schedule

VARIANTS = {
    "bf16": ["--model.converters", ""],
    "triton": ["--model.converters", "nvfp4", "--nvfp4.backend", "triton"],
}
WARMUP_STEPS = 10


def check_new(folder: Path) -> None:
    """Check that a folder for runs holds nothing yet.

    Raises:
        ConfigError: it does.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give another --folder for the runs")


def options(
    config: Path, folder: Path, steps: int, variant: str, given: tuple[str, ...] = ()
) -> list[str]:
    """Torchtitan's command line of one run.

    Args:
        config: TOML of the job.
        folder: Dump folder, new.
        steps: Training steps.
        variant: Key of VARIANTS.
        given: Further options.
    """
    return [
        *("--job.config_file", str(config), "--job.dump_folder", str(folder)),
        *("--training.steps", str(steps), "--metrics.log_freq", "1"),
        *("--validation.no-enable", "--checkpoint.no-enable"),
        *VARIANTS[variant],
        *given,
    ]


def run(
    config: Path, folder: Path, steps: int, variant: str, given: tuple[str, ...] = ()
) -> dict[str, float]:
    """Train once, arguments as of `options`; tokens per second of a GPU and its peak memory.

    Raises:
        ConfigError: the run failed.
    """
    arguments = options(config, folder, steps, variant, given)
    command = [sys.executable, "-m", "nvfp4_titan.train", *arguments]
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ)
    if done.returncode != 0:
        raise ConfigError(f"{' '.join(command)} failed, see {log}")
    recorded = read_scalars(folder)
    return {
        "tokens_per_s": median(list(recorded[TOKENS_PER_SECOND].values())[WARMUP_STEPS:]),
        "peak_gib": max(recorded[RESERVED_GIB].values()),
    }


def bench_train(
    configs: list[Path],
    folder: Path,
    steps: int,
    repeats: int,
    given: tuple[str, ...] = (),
    train: Callable[[Path, Path, int, str, tuple[str, ...]], dict[str, float]] = run,
) -> list[BenchRow]:
    """Train each config with and without NVFP4; rows with tokens_per_s, peak_gib, ratio_to_bf16.

    Args:
        configs: TOMLs.
        folder: For the runs' dump folders.
        steps: Training steps of a run, more than WARMUP_STEPS.
        repeats: Runs of each variant; the row has the median.
        given: torchtitan's options for every run; part of the rows' case.
        train: Trains once.

    Raises:
        ConfigError: too few steps, a folder that holds something, or a run failed.
    """
    if steps <= WARMUP_STEPS:
        raise ConfigError(f"steps={steps} must be more than {WARMUP_STEPS}, which are left out")
    names = [config.stem for config in configs]
    if len(set(names)) < len(names):
        raise ConfigError(f"two TOMLs have one name, {', '.join(names)}: rename one")
    check_new(folder)
    rows = []
    for config in configs:
        results: dict[str, list[dict]] = {name: [] for name in VARIANTS}
        for i, name in enumerate(schedule(list(VARIANTS), repeats, seed=0)):
            dump = folder / f"{config.stem}_{i}_{name}"
            results[name].append(train(config, dump, steps, name, given))
        case = " ".join([config.stem, *given])
        for name, runs in results.items():
            values = {key: median(run[key] for run in runs) for key in runs[0]}
            rows.append(BenchRow(name, case, {"steps": steps, "repeats": repeats}, values))
    return ratios(rows, "bf16", "ratio_to_bf16", lambda row: row.values["tokens_per_s"])
