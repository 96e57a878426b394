#!/usr/bin/env python
"""Compare recipes on a TOML of yours: scripts/compare_recipes.py CONFIG --output results/name

Runs one job per recipe and writes OUTPUT.json, OUTPUT.png and the table to OUTPUT.md. Interrupted,
by Ctrl-C, SIGTERM or --time-limit, it goes on when called again, in the middle of a run. --pack
writes the finished runs into one file, --take reads such files. NGPU=8 gives each job 8 processes;
with --gpus 0 1 2 3 jobs run side by side, one per GPU. Options after -- go to every job:

    scripts/compare_recipes.py train_configs/llama3_150m.toml --output o -- --training.steps 1000

Exit status: 0 the table is whole; 1 a run failed; 2 a setting that cannot be used; 3 the time limit
came first.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from nvfp4_titan.command import exit_status, result_file, runs_folder, split_options
from nvfp4_titan.convergence.archive import carried
from nvfp4_titan.convergence.check import Found, Plan, run_all
from nvfp4_titan.convergence.recipes import CONTROL, ROWS, format_table, table
from nvfp4_titan.convergence.slots import Slots
from nvfp4_titan.convergence.variants import parse_variant

FAILED = 1


@dataclass
class Arguments:
    """Run a job per recipe and compare them with the first."""

    config: tyro.conf.Positional[Path]
    """TOML of the job; validation must be enabled."""
    output: Path
    """Path of the results, without a suffix."""
    rows: tuple[str, ...] = ROWS
    """Recipes, or variants as check_convergence.py takes them; bf16, the control, comes first; fp8
    is torchtitan's own float8."""
    runs: Path | None = None
    """Folder of the jobs' dump folders; outputs/compare_recipes/CONFIG by default."""
    seed: int = 0
    """Of weights and stochastic rounding."""
    time_limit: float | None = None
    """Seconds after which the runs in flight are saved and stopped (allow half a minute for it)."""
    gpus: tuple[str, ...] = ()
    """Ids, as for CUDA_VISIBLE_DEVICES (the machine's own, whatever is set now), of GPUs that
    runs are made on side by side, one on each."""
    checkpoint_interval: int = 500
    """Steps between checkpoints."""
    pack: Path | None = None
    """Write the finished runs into this .tar.gz, each as it ends, however far the comparison
    gets."""
    take: tuple[Path, ...] = ()
    """Archives of --pack to take finished runs from, made elsewhere with the same options."""


def main(argv: list[str]) -> int:
    own, options = split_options(argv)
    arguments = tyro.cli(Arguments, args=own)
    return exit_status(lambda: _compare(arguments, options))


def _compare(arguments: Arguments, options: tuple[str, ...]) -> int:
    runs = runs_folder(arguments.runs, "compare_recipes", arguments.config)
    plan = Plan(
        arguments.config,
        runs,
        tuple(map(parse_variant, arguments.rows)),
        (arguments.seed,),
        options=options,
        checkpoint_interval=arguments.checkpoint_interval,
    )
    slots = Slots(arguments.gpus)
    result_file(arguments.output, ".json")  # before hours of work
    with carried(runs, arguments.take, arguments.pack) as pack:
        found = run_all(plan, slots, arguments.time_limit, pack)
    return _report(arguments.output, found)


def _report(output: Path, found: Found) -> int:
    # matplotlib takes a second.
    from nvfp4_titan.convergence.results import write_results

    runs = {row: run for (row, _), run in found.runs.items()}
    if CONTROL in runs:  # what failed was printed when it came
        figures = table(runs)
        write_results(output, {"rows": figures}, runs)
        missing = [f"\n{row} failed: {error}" for (row, _), error in found.errors.items()]
        text = "\n".join([format_table(figures), *missing])
        result_file(output, ".md").write_text(text + "\n")
        print(text)
    return FAILED if found.errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
