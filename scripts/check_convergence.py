#!/usr/bin/env python
"""Does a recipe train like bf16? scripts/check_convergence.py CONFIG --output docs/results/name

Runs a job per variant and seed and writes OUTPUT.json (a list of runs), OUTPUT_verdict.json,
OUTPUT.md and OUTPUT.png. Options after -- go to every job. NGPU=8 gives each job 8 processes; with
--gpus 0 1 2 3 jobs run side by side, one per GPU, or --per-gpu N (whose step times say nothing).

    scripts/check_convergence.py train_configs/llama3_150m.toml --output o --seeds 0 1 2 \
        --variants bf16 nvfp4 no_rht -- --training.steps 3000

A variant is a recipe (see docs/recipes.md), an ablation (no_tail, tail_05, tail_15, tail_30, no_sr,
no_rht, weights_1x16, sr_forward, fprop_switch), or "name=recipe option option ..". The first is the
control. Interrupted, by Ctrl-C, SIGTERM or --time-limit, it goes on when called again, in the
middle of a run. --pack writes the finished runs into one file, --take reads such files.

Exit status: 0 all judged variants pass; 1 one does not, or a run failed, is missing or does not fit
its control; 2 a setting that cannot be used; 3 the time limit came first.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from nvfp4_titan.command import exit_status, result_file, runs_folder, split_options
from nvfp4_titan.convergence.archive import carried
from nvfp4_titan.convergence.check import Found, Plan, read_all, run_all, verdicts
from nvfp4_titan.convergence.slots import Slots
from nvfp4_titan.convergence.variants import parse_variant
from nvfp4_titan.convergence.verdict import Thresholds

NOT_PASSED = 1


@dataclass
class Arguments:
    """Run variants against a control over seeds, and judge them."""

    config: tyro.conf.Positional[Path]
    """TOML of the jobs; validation must be enabled."""
    output: Path
    """Path of the results, without a suffix."""
    variants: tuple[str, ...] = ("bf16", "nvfp4")
    """The control, then recipes, ablations, or "name=recipe option option .."."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights and stochastic rounding."""
    ablation_seeds: tuple[int, ...] = ()
    """Seeds of the ablations; the first of --seeds if empty."""
    runs: Path | None = None
    """Folder of the jobs' dump folders; outputs/check_convergence/CONFIG by default."""
    time_limit: float | None = None
    """Seconds after which the runs in flight are saved and stopped (allow half a minute for it)."""
    gpus: tuple[str, ...] = ()
    """Ids, as for CUDA_VISIBLE_DEVICES (the machine's own, whatever is set now), of GPUs that
    runs are made on side by side."""
    per_gpu: int = 1
    """Runs that share a GPU of --gpus; their step times then say nothing."""
    checkpoint_interval: int = 500
    """Steps between checkpoints."""
    launch: bool = True
    """Off reads finished runs and starts none."""
    report: bool = True
    """Off makes runs and judges nothing, as where only a part of them is made."""
    pack: Path | None = None
    """Write the finished runs into this .tar.gz, each as it ends, however far the check gets."""
    take: tuple[Path, ...] = ()
    """Archives of --pack to take finished runs from, made elsewhere with the same options."""
    commit: str | None = None
    """Commit of the source, where it is no git checkout."""
    thresholds: tyro.conf.OmitArgPrefixes[Thresholds] = field(default_factory=Thresholds)
    """What decides."""


def main(argv: list[str]) -> int:
    own, options = split_options(argv)
    arguments = tyro.cli(Arguments, args=own)
    return exit_status(lambda: _check(arguments, options))


def _check(arguments: Arguments, options: tuple[str, ...]) -> int:
    runs = runs_folder(arguments.runs, "check_convergence", arguments.config)
    plan = Plan(
        arguments.config,
        runs,
        tuple(map(parse_variant, arguments.variants)),
        arguments.seeds,
        arguments.ablation_seeds,
        options,
        arguments.checkpoint_interval,
    )
    if arguments.report:
        result_file(arguments.output, ".json")  # before hours of work
    slots = Slots(arguments.gpus, arguments.per_gpu)
    with carried(runs, arguments.take, arguments.pack) as pack:
        launched = arguments.launch
        found = run_all(plan, slots, arguments.time_limit, pack) if launched else read_all(plan)
    if not (arguments.report and found.runs):
        for error in found.errors.values():
            print(f"error: {error}", file=sys.stderr)
        return NOT_PASSED if found.errors else 0
    return _report(arguments, plan, found)


def _report(arguments: Arguments, plan: Plan, found: Found) -> int:
    # matplotlib takes a second.
    from nvfp4_titan.convergence.report import passed, write_report

    limits = arguments.thresholds
    result = verdicts(plan, found, limits)
    print(write_report(arguments.output, plan, found, result, limits, arguments.commit))
    return 0 if passed(result) else NOT_PASSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
