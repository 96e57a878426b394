#!/usr/bin/env python
"""Compare recipes on a TOML of yours: scripts/compare_recipes.py CONFIG --output results/name

Runs one job per recipe and writes OUTPUT.json, OUTPUT.png and the table to OUTPUT.md. Interrupted,
it goes on when called again. NGPU=8 gives each job 8 processes; options after -- go to every job:
scripts/compare_recipes.py train_configs/llama3_150m.toml --output o -- --training.steps 1000
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from nvfp4_titan.convergence.recipes import ROWS, format_table, run_rows, table
from nvfp4_titan.convergence.results import write_results
from nvfp4_titan.errors import UserError


@dataclass
class Arguments:
    """Run a job per recipe and compare them with the first."""

    config: tyro.conf.Positional[Path]
    """TOML of the job; validation must be enabled."""
    output: Path
    """Path of the results, without a suffix."""
    rows: tuple[str, ...] = ROWS
    """Recipes; bf16 is the control, fp8 torchtitan's own float8."""
    runs: Path = Path("outputs/compare_recipes")
    """Folder of the jobs' dump folders."""


def main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    arguments = tyro.cli(Arguments, args=argv[:split])
    try:
        found = run_rows(arguments.config, list(arguments.rows), arguments.runs, argv[split + 1 :])
        figures = table(found)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_results(arguments.output, {"rows": figures}, found)
    arguments.output.with_suffix(".md").write_text(format_table(figures) + "\n")
    print(format_table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
