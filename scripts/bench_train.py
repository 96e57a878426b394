#!/usr/bin/env python
"""Training under torchtitan end to end, NVFP4 against bf16: tokens per second, peak memory.

    scripts/bench_train.py --output docs/results/bench_train

Writes OUTPUT.json (a list of rows) and OUTPUT.png; the runs' own folders lie in --folder. With
NGPU=N each run takes N GPUs, as scripts/run_train.sh does. Options after -- go to every run.
"""

import sys
from functools import partial
from pathlib import Path

import tyro

from nvfp4_titan.bench import Environment, print_table, require_gpu, write
from nvfp4_titan.bench.training import bench_train
from nvfp4_titan.command import reporting, split_options

CONFIGS = Path(__file__).parents[1] / "train_configs"


@reporting
def main(
    options: tuple[str, ...],
    /,
    output: Path = Path("outputs/bench_train"),
    folder: Path = Path("outputs/bench_train_runs"),
    configs: tuple[Path, ...] = (CONFIGS / "llama3_1b.toml", CONFIGS / "deepseek_v3_200m.toml"),
    steps: int = 40,
    repeats: int = 3,
) -> int:
    """Train each config with and without NVFP4.

    Args:
        output: Path of the results, without a suffix.
        folder: New folder for the runs' dump folders.
        configs: Job configs.
        steps: Training steps of a run; the first 10 are not counted.
        repeats: Runs of each; a row has their median.
    """
    require_gpu()
    rows = bench_train(list(configs), folder, steps, repeats, options)
    print_table(rows)
    write(rows, output, "ratio_to_bf16", "Training, tokens per second", Environment.current())
    return 0


if __name__ == "__main__":
    own, options = split_options(sys.argv[1:])
    sys.exit(tyro.cli(partial(main, options), args=own))
