"""Comparing recipes: one run of a user's TOML per row, and their table.

Rows are recipes by name; "bf16" is the control (no converter), "fp8" torchtitan's float8 (every
linear but the lm head and routers). Each row runs in a process of its own, with its own dump folder
and log. A row that has finished with the same TOML and options is not run again, so an interrupted
comparison goes on with the row that it was at; that row begins anew.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from ..errors import ConfigError
from ..recipe import get_recipe
from .runs import Run, compare, read_run

CONTROL, FLOAT8 = "bf16", "fp8"
ROWS = (CONTROL, FLOAT8, "mxfp8", "nvfp4_mxfp8", "nvfp4_bf16", "nvfp4")
"""Rows of the published comparison (PyTorch's FP4 QAT study on Qwen3-8B), NVFP4 QAT being
nvfp4_bf16, and full NVFP4."""

_REQUEST, _LOG = "request.json", "log.txt"


def row_options(row: str) -> list[str]:
    """Options of torchtitan that make a run one row of the comparison.

    Raises:
        ConfigError: neither a recipe nor "fp8".
    """
    if row == CONTROL:
        return ["--model.converters", ""]
    if row != FLOAT8:
        get_recipe(row)
        return ["--model.converters=nvfp4", f"--nvfp4.recipe={row}"]
    converter = "quantize.linear.float8"
    options = [f"--model.converters={converter}", f"--{converter}.filter_fqns=output,router"]
    hardware = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    return options if hardware else [*options, f"--{converter}.emulate"]


def run_rows(config: Path, rows: list[str], folder: Path, options: list[str]) -> dict[str, Run]:
    """Run the rows that have not finished, and read all of them.

    Args:
        config: TOML of the job, with validation.
        rows: Names of the rows.
        folder: Where each row gets its dump folder.
        options: Further torchtitan options, for every row; NGPU in the environment is the number of
            processes.

    Returns:
        Runs by row.

    Raises:
        ConfigError: an unknown row, a folder that holds something else, or a run that failed.
    """
    if not config.is_file():
        raise ConfigError(f"config file {config} is not there: see train_configs/ for examples")
    arguments = {row: [*options, *row_options(row)] for row in rows}
    return {row: _run(config, folder / row, given) for row, given in arguments.items()}


def _run(config: Path, folder: Path, options: list[str]) -> Run:
    request = {
        "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest(),
        "options": options,
        "ngpu": os.environ.get("NGPU", "1"),
    }
    asked = folder / _REQUEST
    if asked.is_file():
        content = json.loads(asked.read_text())
        if content == request | {"finished": True}:
            return read_run(folder)
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds something else than a row: use another folder")
    folder.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps(request))
    command = [
        sys.executable,
        "-m",
        "nvfp4_titan.train",
        f"--job.config_file={config}",
        *options,
        f"--job.dump_folder={folder}",
        "--metrics.enable_tensorboard",
        "--metrics.save_tb_folder=tb",
    ]
    print(" ".join(command[1:]), flush=True)
    with open(folder / _LOG, "w") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if status:
        raise ConfigError(f"the run of {folder.name} failed: see {folder / _LOG}")
    run = read_run(folder)
    asked.write_text(json.dumps(request | {"finished": True}))
    return run


def table(runs: dict[str, Run]) -> dict[str, dict]:
    """Figures of each row, against the first.

    Raises:
        ConfigError: runs that did not see the same data.
    """
    control = next(iter(runs.values()))
    rows = {}
    for name, run in runs.items():
        figures = compare(control, run)
        rows[name] = {
            "seconds_per_step": run.seconds_per_step,
            "step_time_ratio": figures["step_time_ratio"],
            "tokens_per_second": run.tokens_per_second,
            "peak_memory_gib": max(run.memory.values()),
            "validation_loss": figures["validation_loss"],
            "relative_gap": figures["relative_gap"],
            # torchtitan's float8 writes no report.
            "flops_share": run.conversion["flops_share"] if run.conversion else None,
        }
    return rows


def format_table(rows: dict[str, dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| recipe | step, s | of the control's | tokens/s | memory, GiB | validation | gap |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['seconds_per_step']:.3f} | {row['step_time_ratio']:.2f} "
        f"| {row['tokens_per_second']:,.0f} | {row['peak_memory_gib']:.2f} "
        f"| {row['validation_loss']:.4f} | {row['relative_gap']:+.2%} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)
