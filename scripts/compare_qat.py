#!/usr/bin/env python
"""bf16 / PTQ / QAT of a TOML of yours: scripts/compare_qat.py CONFIG --output results/qat

Writes OUTPUT.json, .md and .png as recipes finish: a table per model and machine, which one file
can hold together. Options after -- go to every run:

    scripts/compare_qat.py CONFIG --output o -- --compile.no-enable

Interrupted, by Ctrl-C, SIGTERM or --time-limit, it goes on when called again with the same --runs.
On a machine that keeps no folder, a recipe that OUTPUT.json or a --take file holds is not made
again. Exit status: 0 done, 2 a setting that cannot be used, 3 the time limit came first.
"""

import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from nvfp4_titan.command import exit_status, result_file, runs_folder, split_options
from nvfp4_titan.deploy.table import (
    TableOptions,
    format_tables,
    merge,
    place,
    plot_tables,
    read_tables,
    write_tables,
)
from nvfp4_titan.errors import ConfigError
from nvfp4_titan.titan import cpu_runtime


@dataclass
class Arguments:
    """Train a base in bf16, tune it in bf16 and by QAT, and evaluate bf16, PTQ and QAT."""

    config: tyro.conf.Positional[Path]
    """TOML of the job; validation must be enabled."""
    output: Path
    """Path of the results, without a suffix."""
    runs: Path | None = None
    """Folder of the runs and checkpoints; outputs/compare_qat/CONFIG by default."""
    take: tuple[Path, ...] = ()
    """Results files of earlier calls, whose recipes are taken over."""
    time_limit: float | None = None
    """Seconds after which the run in flight is saved and stopped (allow half a minute for it)."""
    plot: bool = True
    """Off writes no PNG."""
    commit: str | None = None
    """Commit of the source, where it is no git checkout."""
    table: tyro.conf.OmitArgPrefixes[TableOptions] = field(default_factory=TableOptions)
    """What is trained and evaluated."""


def main(argv: list[str]) -> int:
    own, extra = split_options(argv)
    arguments = tyro.cli(Arguments, args=own)
    cpu_runtime.install()
    command = shlex.join(("scripts/compare_qat.py", *argv))
    return exit_status(lambda: _compare(arguments, extra, command))


def _compare(arguments: Arguments, extra: tuple[str, ...], command: str) -> int:
    from nvfp4_titan.titan.qat_table import Comparison

    options = arguments.table
    deadline = arguments.time_limit and time.monotonic() + arguments.time_limit
    tables = read_tables(result_file(arguments.output, ".json"))
    for file in arguments.take:
        if not file.is_file():
            raise ConfigError(f"--take {file} is not there")
        merge(tables, read_tables(file))
    runs = runs_folder(arguments.runs, "compare_qat", arguments.config)
    comparison = Comparison(arguments.config, runs, options, extra, deadline)
    request = options.request(arguments.config, extra)
    table = place(tables, arguments.config.stem, _device(options.device), request)
    missing = tuple(recipe for recipe in options.recipes if recipe not in table["recipes"])
    for recipe, part in comparison.parts(missing) if missing else ():
        part["commit"] = arguments.commit or part["commit"]
        table["recipes"][recipe] = part | {"command": command}
        write_tables(arguments.output, tables)
    write_tables(arguments.output, tables)
    if arguments.plot:
        plot_tables(arguments.output, tables)
    print(format_tables(tables))
    return 0


def _device(name: str) -> str:
    from nvfp4_titan.titan.evaluate import check_device

    check_device(name)
    return torch.cuda.get_device_name() if name.startswith("cuda") else name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
