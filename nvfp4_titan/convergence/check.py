"""A convergence check from end to end: a run per variant and seed, begun in order, then a verdict.

    folder/VARIANT_seedN/    a run's dump folder (launch.Job)

The control comes first for each seed, so that a check that was cut short has pairs to compare. A
failed run does not stop the others: it is an error in the end, and never a pass.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import ConfigError, OutOfTime
from ..toml import read_toml
from .launch import Job, read_request, settings, validates
from .progress import Progress
from .recipes import CONTROL, machine_options
from .runs import Run, read_run
from .slots import Slots, attempt, check_time_limit, run_jobs
from .variants import Variant
from .verdict import Thresholds, Verdict, judge, noise

_OWN = {
    *("debug.seed", "nvfp4.seed", "nvfp4.recipe", "model.converters", "job.dump_folder"),
    *("checkpoint.enable", "checkpoint.interval", "checkpoint.folder", "checkpoint.keep_latest_k"),
}
"""torchtitan's options that a plan gives each run."""


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        config: TOML of the jobs.
        folder: Where each run gets its dump folder.
        variants: The control first.
        seeds: Of weights and of stochastic rounding. Ablations get the first alone.
        ablation_seeds: Seeds of ablations in its place.
        options: torchtitan's options for every run.
        checkpoint_interval: Steps between checkpoints, from which an interrupted run goes on.
    """

    config: Path
    folder: Path
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    ablation_seeds: tuple[int, ...] = ()
    options: tuple[str, ...] = ()
    checkpoint_interval: int = 500

    def __post_init__(self):
        config = read_toml(self.config)
        if taken := [name for name in settings(self.options) if name in _OWN]:
            raise ConfigError(
                f"--{taken[0]} after -- is set for each run by this command's own options: leave "
                "it out"
            )
        if self.checkpoint_interval < 1:
            raise ConfigError(f"--checkpoint-interval {self.checkpoint_interval}: give 1 or more")
        if not self.variants or self.variants[0].recipe != CONTROL:
            raise ConfigError(f"the first variant must be the control, {CONTROL}")
        if not validates(config, self.options):
            raise ConfigError(
                f"validation losses are compared, and the jobs have none: set validation.enable in "
                f"{self.config}, or give -- --validation.enable"
            )
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names) or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"a variant or a seed is named twice: {names}, seeds {self.seeds}")
        if missing := set(self.ablation_seeds) - set(self.seeds):
            raise ConfigError(f"the control has no seeds {sorted(missing)}: add them to --seeds")
        if not self.seeds:
            raise ConfigError("give at least one seed")

    def seeds_of(self, variant: Variant) -> tuple[int, ...]:
        """Seeds that a variant is run with."""
        return (self.ablation_seeds or self.seeds[:1]) if variant.ablation else self.seeds

    def jobs(self) -> dict[tuple[str, int], Job]:
        """Jobs by variant and seed, judged variants seed by seed, then the ablations."""
        judged = [v for v in self.variants if not v.ablation]
        ablations = [v for v in self.variants if v.ablation]
        pairs = [(v, seed) for seed in self.seeds for v in judged]
        pairs += [(v, seed) for v in ablations for seed in self.seeds_of(v)]
        return {(v.name, seed): self._job(v, seed) for v, seed in pairs}

    def _job(self, variant: Variant, seed: int) -> Job:
        options = (
            *self.options,
            *variant.arguments(),
            f"--debug.seed={seed}",
            f"--nvfp4.seed={seed}",
            "--metrics.disable_color_printing",
            "--checkpoint.enable",
            f"--checkpoint.interval={self.checkpoint_interval}",
            "--checkpoint.keep_latest_k=2",
        )
        folder = self.folder / f"{variant.name}_seed{seed}"
        return Job(
            self.config,
            folder,
            options,
            keep_checkpoints=False,
            machine_options=tuple(machine_options(variant.recipe)),
        )

    def steps(self) -> int | None:
        """Training steps of a run, for the time left; None where only torchtitan knows."""
        steps = read_toml(self.config).get("training", {}).get("steps")
        for i, option in enumerate(self.options):
            name, _, value = option.partition("=")
            if name == "--training.steps":
                value = value or next(iter(self.options[i + 1 :]), "")
                if not value.isdecimal():
                    raise ConfigError(f"--training.steps {value!r} is no number of steps")
                steps = int(value)
        return steps


@dataclass
class Found:
    """Runs of a plan.

    Attributes:
        runs: By variant and seed.
        errors: What went wrong instead.
    """

    runs: dict[tuple[str, int], Run] = field(default_factory=dict)
    errors: dict[tuple[str, int], str] = field(default_factory=dict)

    def of(self, variant: Variant) -> dict[int, Run]:
        """A variant's runs by seed."""
        return {seed: run for (name, seed), run in self.runs.items() if name == variant.name}


def run_all(
    plan: Plan,
    slots: Slots,
    time_limit: float | None = None,
    ended: Callable[[], object] = lambda: None,
) -> Found:
    """Make the runs that have not finished; read all.

    Args:
        plan: What.
        slots: Where.
        time_limit: Seconds after which the runs in flight are told to save and stop.
        ended: Called when runs have ended while others are in flight.

    Raises:
        OutOfTime: the time limit came first.
        ConfigError: a folder holds something else, a GPU is not there, or the limit is too short
            for anything.
    """
    deadline = None if time_limit is None else time.monotonic() + time_limit
    jobs, found = plan.jobs(), Found()
    done = [job.folder for job in jobs.values() if job.finished()]
    like = next(iter(done), None)
    todo = {key: replace(job, like=like) for key, job in jobs.items() if job.folder not in done}
    made: dict[tuple[str, int], Run | ConfigError] = {}
    if todo:
        check_time_limit(time_limit)
        progress = Progress(plan.steps(), len(todo))
        made = run_jobs(todo, slots, deadline, progress, ended)
    if left := len(todo) - len(made):
        raise OutOfTime(f"{left} of {len(jobs)} runs are left: start again to go on")
    for key, job in jobs.items():
        outcome = made[key] if key in made else attempt(job)
        if isinstance(outcome, ConfigError):
            found.errors[key] = str(outcome)
        else:
            found.runs[key] = outcome
    return found


def read_all(plan: Plan) -> Found:
    """Read the runs of a plan without starting any; what has not finished is an error.

    A run counts by its folder's name and the options in its request.json, wherever it was made.
    """
    found = Found()
    for key, job in plan.jobs().items():
        try:
            _check_request(job)
            found.runs[key] = read_run(job.folder)
        except ConfigError as error:
            found.errors[key] = str(error)
    return found


def _check_request(job: Job) -> None:
    content = read_request(job.folder)
    if not content:
        raise ConfigError(f"{job.folder} is not there: the run is missing")
    if not content.get("finished"):
        raise ConfigError(f"{job.folder} has not finished")
    # However many processes this shell would start: what they saw is compared (runs.py).
    if differing := [what for what in job.differing(content) if what != "NGPU"]:
        raise ConfigError(
            f"{job.folder} was run with other {', '.join(differing)}: ask for the same"
        )


def verdicts(plan: Plan, found: Found, limits: Thresholds) -> dict[str, Verdict | str]:
    """A verdict per variant but the control; a message where there can be none."""
    control, result = found.of(plan.variants[0]), {}
    for variant in plan.variants[1:]:
        seeds = plan.seeds_of(variant)
        wanted = [(name, s) for s in seeds for name in (plan.variants[0].name, variant.name)]
        errors = [found.errors[key] for key in wanted if key in found.errors]
        if errors:
            result[variant.name] = "; ".join(errors)
            continue
        try:
            judged = not variant.ablation
            result[variant.name] = judge(control, found.of(variant), limits, judged=judged)
        except ConfigError as error:
            result[variant.name] = str(error)
    return result


def control_noise(plan: Plan, found: Found, limits: Thresholds) -> float | None:
    """Relative spread of the control's seeds; None of one seed or where a run is missing."""
    runs = found.of(plan.variants[0])
    whole = all(run.steps in run.validation for run in runs.values())
    return noise(runs, limits.final_fraction) if len(runs) == len(plan.seeds) and whole else None
